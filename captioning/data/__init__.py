"""Annotations in, images opened safely, downloads, choosing images, processed_data/ written and read. No torch."""
