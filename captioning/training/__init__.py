"""Arguments, batches, cached features, the trainer, stopping and going on, self-critical training, progress."""
