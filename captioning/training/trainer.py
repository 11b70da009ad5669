"""Trains and scores a captioner: updates over real tokens, one caption per image, learning rates by part.

How training stops and goes on stands in `captioning.training.resumable`; what the last epochs may do instead of raising
the likelihood in `captioning.training.self_critical`; how captions share a row in `captioning.model.packing`.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional
from transformers import EarlyStoppingCallback, get_scheduler, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from captioning import InputError
from captioning.model import lora
from captioning.model.captioner import PARTS, Bundle, let_others_read, part_of
from captioning.model.generate import decode, generate_tokens
from captioning.model.packing import IGNORED, LabelledProjection, decoder_mask
from captioning.model.parts import save_tokenizer
from captioning.scores.metrics import evaluate
from captioning.training.arguments import Length, length
from captioning.training.batches import Collator, LengthSampler
from captioning.training.loss import caption_loss
from captioning.training.progress import Progress, Throughput
from captioning.training.resumable import ResumableTrainer
from captioning.training.self_critical import SelfCritical, switch_off_dropout

# a caption, the references of its image -> a score
Score = Callable[[str, Sequence[str]], float]


class Forward(NamedTuple):
    """What the model makes of a batch, at the positions that have a label.

    Attributes:
        logits: (tokens, vocabulary)
        labels: (tokens,)
        states: the encoder's output, (images, or rows when not packed; encoder tokens; hidden size)
    """

    logits: torch.Tensor
    labels: torch.Tensor
    states: torch.Tensor


class Patience(EarlyStoppingCallback):
    """Ends a training when so many evaluations in a row were not better than the best one.

    Where self-critical epochs follow, it waits for them: they begin to rise again from where the others ended.
    """

    def __init__(self, evaluations: int, trainer: CaptionTrainer):
        super().__init__(evaluations)
        self.trainer = trainer

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if self.trainer.self_critical is None or state.global_step >= self.trainer.self_critical_begin():
            super().on_evaluate(args, state, control, metrics, **kwargs)


class CaptionTrainer(ResumableTrainer):
    """Trains and scores a captioner on the batches of `captioning.training.batches.Collator`.

    Args:
        bundle: the model with its tokenizer and image processor.
        references: every evaluated image's captions, by image id.
        learning_rates: one for each of PARTS; `args.learning_rate` where a part has none.
        waiting: epochs at the start of training in which a part keeps its weights while the others move.
        self_critical: for the last epochs of training.
        more_scores: of one caption besides the official scores, by name; that of a split is their mean.
        name_of: what people are shown of an image, from its id.
        kwargs: those of `Seq2SeqTrainer`.

    Attributes:
        predictions: the captions of the last evaluation, by image id.
        image_losses: of the last evaluation, by image id: nats of its references, and their tokens.
        throughput: what training did so far.
    """

    # `compute_loss` divides by the tokens of the whole update. The Trainer counts them for it.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        bundle: Bundle,
        references: Mapping[int, list[str]],
        learning_rates: Mapping[str, float],
        waiting: Mapping[str, float] | None = None,
        self_critical: SelfCritical | None = None,
        more_scores: Mapping[str, Score] | None = None,
        name_of: Callable[[int], str] = "image {}".format,
        **kwargs,
    ):
        super().__init__(model=bundle.model, processing_class=bundle.tokenizer, compute_metrics=self._score, **kwargs)
        self.model_accepts_loss_kwargs = True  # or the Trainer would not count an update's tokens
        self.bundle = bundle
        self.collator: Collator = kwargs["data_collator"]
        self.references = references
        self.training_images = len(kwargs.get("train_dataset") or ())
        self.waiting = dict(waiting or {})
        self.self_critical = self_critical
        self.more_scores = dict(more_scores or {})
        self.name_of = self.losses.name_of = name_of
        self.learning_rates = {part: learning_rates.get(part, self.args.learning_rate) for part in PARTS}
        self.projection = LabelledProjection(bundle.model.get_output_embeddings())
        self.predictions: dict[int, str] = {}
        self.image_losses: tuple[dict[int, float], dict[int, float]] = {}, {}
        self._only_loss = False
        self.throughput = Throughput()
        self.rewards: list[float] = []  # of each self-critical batch since the last log
        for theirs in (ProgressCallback, PrinterCallback):  # they print dicts on stdout, which is for results
            self.remove_callback(theirs)
        self.progress = Progress(self)
        self.add_callback(self.progress)

    # ---- loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The cross-entropy of people's captions, or in self-critical epochs the loss of captions that are sampled.

        Args:
            model: the model, or what wraps it for several processes.
            inputs: a batch, on the device.
            num_items_in_batch: tokens of the whole update, of all processes.
        """
        encoder = self.bundle.model.encoder
        if not any(parameter.requires_grad for parameter in encoder.parameters()):
            # A frozen encoder gives the same features every time: those that a cache would hold.
            encoder.eval()
        if self.self_critical is not None and self.state.global_step >= self.self_critical_begin():
            loss = self._self_critical_loss(model, inputs, num_items_in_batch)
        else:
            out = self.forward(model, inputs)
            loss = caption_loss(out.logits, out.labels, num_items_in_batch, self.args.label_smoothing_factor)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, None) if return_outputs else loss

    def forward(self, model, batch: Mapping[str, torch.Tensor]) -> Forward:
        """Run the model on a batch of the collator that is on the device."""
        inputs: dict[str, Any] = {"decoder_input_ids": batch["decoder_input_ids"], "use_cache": False}
        if "features" in batch:
            inputs["encoder_outputs"] = (batch["features"].float(),)
        else:
            inputs["pixel_values"] = self.bundle.pixels.normalise(batch["pixel_values"])
        if "segment_ids" in batch:
            inputs["decoder_position_ids"] = batch["decoder_position_ids"]
            inputs["decoder_attention_mask"] = decoder_mask(self.bundle.model, batch["segment_ids"])
        positions = batch["label_positions"]
        with self.projection.only(positions):
            outputs = model(**inputs)
        return Forward(outputs.logits[0], batch["labels"].flatten()[positions], outputs.encoder_last_hidden_state)

    def _self_critical_loss(self, model, batch, num_items) -> torch.Tensor:
        """Sample captions of the batch's images, and compute the loss that makes the better ones likelier."""
        net, settings = self.bundle.model, self.self_critical
        assert settings is not None
        net.eval()
        with torch.no_grad(), self.accelerator.autocast():
            if "features" in batch:
                features = batch["features"].float()
            else:
                pixels = self.bundle.pixels.normalise(batch["pixel_values"])
                features = net.encoder(pixels).last_hidden_state
            samples = settings.sample(self.bundle, features, batch["image_id"].tolist())
        switch_off_dropout(net)
        rows = self._prepare_inputs(self.collator.rows(samples.captions))
        out = self.forward(model, {**batch, **rows})
        self.rewards.append(samples.reward)
        # An image without captions is there to fill the batch only.
        counts = (batch["labels"] != IGNORED).any(1).tolist()
        of_tokens = [count for count, own in zip(counts, samples.captions, strict=True) for c in own for _ in c]
        advantages = samples.advantages * torch.tensor(of_tokens, device=samples.advantages.device)
        return settings.loss(out.logits, out.labels, advantages, num_items)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.rewards and "loss" in logs:
            # Of sampled captions the loss says nothing (its mean is near 0 however good they are), their reward does.
            mean = torch.tensor(statistics.fmean(self.rewards), device=self.args.device)
            logs = {"reward": self.accelerator.gather(mean).mean().item(), **logs}
            del logs["loss"]
            self.rewards.clear()
        super().log(logs, *args, **kwargs)

    # ---- batches

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        done = self.throughput
        done.waited += time.perf_counter() - started
        done.images += sum(len(inputs["image_id"]) for inputs in batches)
        for inputs in batches:  # not counted on the host, which would wait for the device
            done.captions = done.captions + (inputs["labels"] == self.processing_class.eos_token_id).sum()
        return batches, num_items

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self._train_batch_size * self.args.world_size
        strategy = self.args.train_sampling_strategy
        sampler = LengthSampler(
            dataset.lengths(),
            together,
            seed,
            sort=strategy == "group_by_length",
            shuffle=strategy != "sequential",
            accumulation=self.args.gradient_accumulation_steps,
            fill=self.args.world_size > 1,
        )
        self.set_epoch = sampler.set_epoch
        return sampler

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)

    # ---- learning rates

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, its parameter groups divided by part, each with its own learning rate."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        parts = {id(parameter): part_of(name) for name, parameter in self.bundle.model.named_parameters()}
        groups = []
        for part in PARTS:
            for group in optimizer.param_groups:
                parameters = [parameter for parameter in group["params"] if parts[id(parameter)] == part]
                if parameters:
                    groups.append({**group, "params": parameters, "lr": self.learning_rates[part], "part": part})
        optimizer.param_groups = groups
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """The Trainer's schedule; a part that waits has a rate of 0 until its time has come.

        The rate, and not `requires_grad`: processes that train together must agree on the gradients to be exchanged.
        Self-critical epochs have the same schedule once more, to themselves, from their own rate.

        Raises:
            InputError: a part waits or captions are sampled, and the schedule is not one of steps.
        """
        critical = min(self._self_critical_updates(), num_training_steps)
        likelihood = num_training_steps - critical
        scheduler = super().create_scheduler(max(1, likelihood), optimizer)
        begins = {part: self._length().updates(epochs) for part, epochs in self.waiting.items()}
        begins = {part: begin for part, begin in begins.items() if begin > 0}
        if not critical and not begins:
            return scheduler
        kind = self.args.lr_scheduler_type
        if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
            raise InputError(
                f"--lr_scheduler_type {kind.value} follows the scores; parts of a training need one of steps"
            )
        if critical:
            again = get_scheduler(
                kind,
                torch.optim.SGD([torch.zeros(1)]),
                self.args.get_warmup_steps(critical),
                critical,
                self.args.lr_scheduler_kwargs,
            ).lr_lambdas[0]
        for index, group in enumerate(scheduler.optimizer.param_groups):
            follow = scheduler.lr_lambdas[index]
            begin = begins.get(group["part"], 0)
            most = min(1.0, self.self_critical.learning_rate / group["initial_lr"]) if critical else 0.0

            def factor(step, follow=follow, begin=begin, most=most):
                if step < begin:
                    return 0.0
                if critical and step >= likelihood:
                    return most * again(step - likelihood)
                return follow(step)

            scheduler.lr_lambdas[index] = factor
            group["lr"] = group["initial_lr"] * factor(0)
        return scheduler

    def optimiser_flags(self) -> dict[str, str]:
        trained = {part_of(name) for name, weight in self.bundle.model.named_parameters() if weight.requires_grad}
        rates = {f"--{part}_lr": str(self.learning_rates[part]) for part in PARTS if part in trained}
        return {**rates, **super().optimiser_flags()}

    def self_critical_begin(self) -> int:
        """The first update that learns from sampled captions; the number of all updates where none does."""
        return self._length().total - self._self_critical_updates()

    def _self_critical_updates(self) -> int:
        return self._length().updates(self.self_critical.epochs) if self.self_critical else 0

    def _length(self) -> Length:
        return length(self.args, self.training_images)

    # ---- checkpoints

    def train(self, *args, **kwargs):
        # The Trainer gives each process the same seed, and with it the same dropout and the same samples.
        set_seed(self.args.seed + self.args.process_index)
        with contextlib.closing(self.progress):
            return super().train(*args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint is a run folder too: `inference.py --model_path run/checkpoint-100` works.

        So it holds the weights with their adapters merged, and the adapters beside, to go on from.
        """
        super()._save(output_dir, state_dict or lora.merged(self.bundle.model))
        if not self.args.should_save:  # the Trainer calls this in every process: two would write one file at once
            return
        folder = Path(output_dir or self.args.output_dir)
        lora.save(self.bundle.model, folder)
        save_tokenizer(self.bundle.tokenizer, folder)
        self.bundle.image_processor.save_pretrained(folder)
        let_others_read(folder)

    def hyperparameter_search(self, *args, **kwargs):
        """Refused: the Trainer builds a new model for each trial, and knows nothing of the rates and parts of this one.

        Raises:
            InputError: always; it says what to do instead.
        """
        raise InputError(
            "hyperparameter_search cannot work here: it changes the Trainer's arguments only, while learning rates by "
            "part, tokenizer and cached features are made before; call train.main once for each trial, as "
            "captioning/DESIGN.md shows for optuna"
        )

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the run folder has a model card of its own."""

    # ---- evaluation

    def losses_of(self, dataset) -> tuple[dict[int, float], dict[int, float]]:
        """The cross-entropy of each image's references in nats, and their tokens; no captions are generated.

        In float32, whatever the training computes in; of kept features it takes those that are kept.
        """
        self._only_loss = True
        try:
            self.predict(dataset)
            return self.image_losses
        finally:
            self._only_loss = False

    def evaluate(self, *args, **kwargs):
        started = time.perf_counter()
        scores = super().evaluate(*args, **kwargs)
        self.throughput.evaluated += time.perf_counter() - started
        return scores

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._images = len(dataloader.dataset)
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation):
        """Caption each image of the batch once, and measure the loss on its references.

        Returns:
            (None, (token ids (images, length), summed loss (images,), number of tokens (images,)), ids (images,)).
            Sums, not means, so that the loss of a split does not depend on how it was cut into batches.
        """
        self.check_stop()
        batch = self._prepare_inputs(inputs)
        image_id, image_of_row = batch["image_id"], batch["image_of_row"]
        if self._only_loss:  # past the autocast that accelerate put into the model's `forward`
            model = functools.partial(type(self.bundle.model).forward, self.bundle.model)
        with torch.no_grad(), self.compute_loss_context_manager():
            out = self.forward(model, batch)
            losses = functional.cross_entropy(out.logits.float(), out.labels, reduction="none")
        image_of_token = image_of_row[batch["label_positions"] // batch["labels"].shape[1]]
        zeros = torch.zeros(len(image_id), device=losses.device)
        summed = zeros.index_add(0, image_of_token, losses)
        counted = zeros.index_add(0, image_of_token, torch.ones_like(losses))

        if self._only_loss:
            return None, (torch.zeros_like(image_id)[:, None], summed, counted), image_id
        first_row_of_image = torch.searchsorted(image_of_row, torch.arange(len(image_id), device=image_of_row.device))
        states = out.states[first_row_of_image]
        with torch.no_grad(), self.accelerator.autocast():
            settings = {**getattr(self, "_gen_kwargs", {}), **generation}
            tokens = generate_tokens(self.bundle.model, states, **settings)
        return None, (tokens, summed, counted), image_id

    def _score(self, evaluation) -> dict[str, float]:
        """Scores of an evaluated split; every image counts once, however many processes took part.

        Processes that run out of images repeat some, so that all have as many batches: the second time is left out.
        """
        tokens, summed, counted = evaluation.predictions
        ids, first = np.unique(evaluation.label_ids, return_index=True)
        if len(ids) != self._images:
            raise RuntimeError(f"{len(ids):,} images came back from an evaluation of {self._images:,}")
        tokens = np.where(tokens == IGNORED, self.bundle.tokenizer.pad_token_id, tokens)[first]
        loss = float(summed[first].sum() / counted[first].sum())
        nats, number = (dict(zip(ids.tolist(), values[first].tolist(), strict=True)) for values in (summed, counted))
        self.image_losses = nats, number
        if self._only_loss:
            return {"loss": loss}
        self.predictions = dict(zip(ids.tolist(), decode(self.bundle.tokenizer, tokens), strict=True))
        references = {image_id: self.references[image_id] for image_id in self.predictions}
        return {"loss": loss, **evaluate(self.predictions, references, more=self.more_scores).scores}
