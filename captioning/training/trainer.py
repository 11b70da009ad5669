"""Our Seq2SeqTrainer: a loss over real tokens, one generated caption per image, learning rates by part."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    TrainerCallback,
    VisionEncoderDecoderModel,
    get_scheduler,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from captioning import InputError
from captioning.model.captioner import PARTS, Bundle, part_of
from captioning.model.generate import decode, generate_tokens
from captioning.model.packing import IGNORED, LabelledProjection, decoder_mask
from captioning.model.parts import Pixels
from captioning.scores.metrics import coco_scores
from captioning.training.batches import LengthSampler
from captioning.training.progress import Progress
from captioning.training.resilience import LossWatch, StopSignals, explained, in_own_group, whole_checkpoint
from captioning.training.self_critical import SelfCritical, sample_captions


def caption_loss(
    logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross-entropy in nats per token.

    Args:
        logits: (..., vocabulary)
        labels: (...), aligned with `logits` (not shifted again); -100 counts for nothing.
        num_items: tokens to divide by, which under gradient accumulation are those of the whole update; None: those
            of this batch.
        smoothing: label smoothing (https://arxiv.org/abs/1512.00567), 0 to 1.
    """
    reduction = "mean" if num_items is None else "sum"
    loss = functional.cross_entropy(
        logits.flatten(0, -2).float(),
        labels.flatten(),
        ignore_index=IGNORED,
        reduction=reduction,
        label_smoothing=smoothing,
    )
    return loss if num_items is None else loss / num_items


class CaptionTrainer(Seq2SeqTrainer):
    """Trains and scores a captioner on the batches of `captioning.batch.Collator`.

    Args:
        bundle: the model with its tokenizer and image processor.
        references: every evaluated image's captions, by image id.
        learning_rates: one for each of PARTS; `args.learning_rate` where a part has none.
        waiting: epochs at the start of training in which a part keeps its weights while the others move.
        self_critical: for the last epochs of training, see `SelfCritical`.
        kwargs: those of `Seq2SeqTrainer`.
    """

    def __init__(
        self,
        bundle: Bundle,
        references: Mapping[int, list[str]],
        learning_rates: Mapping[str, float],
        waiting: Mapping[str, float] | None = None,
        self_critical: SelfCritical | None = None,
        **kwargs,
    ):
        args = kwargs["args"]
        super().__init__(
            model=bundle.model,
            processing_class=bundle.tokenizer,
            compute_metrics=self._score,
            compute_loss_func=self._loss,
            **kwargs,
        )
        # The model's own forward takes any keyword, which the Trainer reads as "computes its own scaled loss".
        self.model_accepts_loss_kwargs = False
        self.bundle = bundle
        self.references = references
        self.waiting = dict(waiting or {})
        self.self_critical = self_critical
        self.advantages: torch.Tensor | None = None  # of each labelled token, where labels are sampled captions
        self.learning_rates = {part: learning_rates.get(part, args.learning_rate) for part in PARTS}
        self.pixels = Pixels(bundle.image_processor)
        self.projection = LabelledProjection(bundle.model.get_output_embeddings())
        self.predictions: dict[int, str] = {}  # of the last evaluation
        self.rewards: list[float] = []  # mean over the samples of each self-critical batch since the last log
        # What training did so far: in this process, since it was started
        self.images = self.captions = 0
        self.waited = self.evaluated = 0.0  # seconds spent waiting for data, and on evaluations
        for theirs in (ProgressCallback, PrinterCallback):  # they print dicts on stdout, which is for results
            self.remove_callback(theirs)
        self.progress = Progress(self)
        self.add_callback(self.progress)
        self.add_callback(Resumed(self))
        self.losses = LossWatch()
        self.stop = StopSignals(speak=self.is_world_process_zero())
        # Processes agree on stopping by messages between hosts: those between devices would make them wait.
        self._hosts = torch.distributed.new_group(backend="gloo") if args.world_size > 1 else None
        self._step_seen = -1
        self._sampler: LengthSampler | None = None

    # ---- batches

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move a batch to the device and turn it into what the model's forward takes."""
        inputs = super()._prepare_inputs(inputs)
        if self.model.training and self._is_self_critical():
            inputs = self._sampled(inputs)
        inputs.pop("image_id", None)
        inputs.pop("image_of_row", None)
        self.projection.positions = inputs.pop("label_positions")
        if "features" in inputs:
            inputs["encoder_outputs"] = (inputs.pop("features").float(),)
        else:
            inputs["pixel_values"] = self.pixels.normalise(inputs["pixel_values"])
        if "segment_ids" in inputs:
            inputs["decoder_attention_mask"] = decoder_mask(self.bundle.model, inputs.pop("segment_ids"))
        inputs["use_cache"] = False
        return inputs

    def get_batch_samples(self, *args, **kwargs):
        started = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self.waited += time.perf_counter() - started
        self.images += sum(len(inputs["image_id"]) for inputs in batches)
        for inputs in batches:  # not counted on the host, which would wait for the device
            self.captions = self.captions + (inputs["labels"] == self.processing_class.eos_token_id).sum()
        return batches, num_items

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper hands on what is read, not written
        inner.worker_init_fn = functools.partial(in_own_group, then=inner.worker_init_fn)
        # A loader draws its workers' seed whenever it starts them, which a resumed run does at other times: not from
        # the generator that dropout draws from.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    # ---- loss

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses(loss, self.state.global_step + 1, inputs["image_id"])
        return loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not any(parameter.requires_grad for parameter in self.bundle.model.encoder.parameters()):
            # A frozen encoder gives the same features every time: those that a cache would hold.
            self.bundle.model.encoder.eval()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _is_self_critical(self) -> bool:
        begin = self.state.max_steps - self._self_critical_updates()
        return self.self_critical is not None and self.state.global_step >= begin

    def _self_critical_updates(self) -> int:
        return round(self.self_critical.epochs * self._updates_per_epoch()) if self.self_critical else 0

    def _updates_per_epoch(self) -> int:
        together = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return math.ceil(len(self.train_dataset) / together)

    def _sampled(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with captions that the model itself makes up in the place of people's."""
        settings, eos = self.self_critical, self.bundle.tokenizer.eos_token_id
        self.model.eval()
        with torch.no_grad(), self.accelerator.autocast():
            if "features" in inputs:
                features = inputs["features"].float()
            else:
                features = self.bundle.model.encoder(self.pixels.normalise(inputs["pixel_values"])).last_hidden_state
            grouped = sample_captions(self.bundle.model, features, settings.samples, settings.max_new_tokens)
        # The update is without dropout too, for samples must come from the model that they teach: with it the model
        # thinks less of them, and pushes bad ones ever further away (with CLIP's features, captions fell apart).
        for module in self.model.modules():
            module.training = getattr(module, "gradient_checkpointing", False)
        captions = [caption for of_image in grouped for caption in of_image]
        ids = inputs["image_id"].repeat_interleave(settings.samples).tolist()
        rewards = settings.reward(
            ids, decode(self.bundle.tokenizer, captions), [caption[-1] == eos for caption in captions]
        )
        rewards = torch.tensor(rewards).view(-1, settings.samples)
        # What the image's other samples earn is what this one is measured against (leave-one-out).
        others = (rewards.sum(1, keepdim=True) - rewards) / (settings.samples - 1)
        self.rewards.append(rewards.mean().item())
        advantages = (rewards - others).flatten().tolist()
        self.advantages = torch.tensor(
            [a for a, caption in zip(advantages, captions, strict=True) for _ in caption], device=self.args.device
        )
        sampled = {k: v.to(self.args.device) for k, v in self.data_collator.targets(grouped).items()}
        return {**inputs, **sampled}

    def _loss(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        labels = labels.flatten()[self.projection.positions]
        self.projection.positions = None
        if self.advantages is not None:
            likelihood = -functional.cross_entropy(outputs.logits[0].float(), labels, reduction="none")
            loss = -(self.advantages * likelihood).sum() / num_items_in_batch
            self.advantages = None
            return loss
        return caption_loss(outputs.logits[0], labels, num_items_in_batch, self.args.label_smoothing_factor)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if self.rewards and "loss" in logs:
            # Of sampled captions the loss says nothing (its mean is near 0 however good they are), their reward does.
            logs = {"reward": statistics.fmean(self.rewards), **logs}
            del logs["loss"]
            self.rewards.clear()
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        together = self.args.train_batch_size * self.args.world_size
        sort = self.args.train_sampling_strategy == "group_by_length"
        self._sampler = LengthSampler(dataset.lengths(), together, seed, sort)
        return self._sampler

    def _get_eval_sampler(self, eval_dataset):
        return torch.utils.data.SequentialSampler(eval_dataset)

    # ---- learning rates

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The Trainer's optimiser, its parameter groups divided by part, each with its own learning rate."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        parts = {id(parameter): part_of(name) for name, parameter in self.model.named_parameters()}
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
        begins = {part: epochs * self._updates_per_epoch() for part, epochs in self.waiting.items()}
        begins = {part: begin for part, begin in begins.items() if 0 < begin < num_training_steps}
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

    # ---- stopping and going on

    def train(self, *args, **kwargs):
        """As the Trainer's.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; after the first there is a checkpoint of the update it came in.
            InputError: the loss was not finite.
        """
        with self.stop, contextlib.closing(self.progress):
            trained = super().train(*args, **kwargs)
            if self._stop_asked():
                raise KeyboardInterrupt
        return trained

    def _run_epoch(self, **kwargs):
        # The Trainer would train one update more where a checkpoint is that of the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        if self._sampler is not None:  # behind a loader that skips batches it would not be told
            self._sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _stop_asked(self) -> bool:
        """Whether any process was asked to stop; all processes have to call this together."""
        asked = torch.tensor(int(self.stop.asked))
        if self._hosts is not None:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self._hosts)
        return bool(asked)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, *args, **kwargs):
        """What follows an update, and an epoch; here a run stops that was asked to, once it has a checkpoint.

        After an epoch's last update this is called twice: only the second time it is known what follows the epoch. An
        evaluation that is due is left to the run that goes on, which the checkpoint tells (see `Resumed`).
        """
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.losses.check()
        comes_again = self.state.epoch == epoch + 1 and self.state.global_step != self._step_seen
        self._step_seen = self.state.global_step
        if comes_again or not self._stop_asked():
            try:
                return super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
            except EvaluationStopped:
                pass
        self._save_checkpoint(model, trial)
        raise KeyboardInterrupt

    # ---- checkpoints

    def _save_checkpoint(self, model, trial):
        self.losses.check()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with whole_checkpoint(folder) if self.args.should_save else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What is written next says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def _save(self, output_dir=None, state_dict=None):
        """A checkpoint is a run folder too: `inference.py --model_path run/checkpoint-100` works."""
        super()._save(output_dir, state_dict)
        self.bundle.image_processor.save_pretrained(output_dir or self.args.output_dir)

    def save_model(self, output_dir=None, _internal_call=False):
        # push_to_hub saves once more, perhaps after an evaluation in half precision: the folder holds better weights.
        if output_dir is not None or not _internal_call:
            super().save_model(output_dir, _internal_call)

    def create_model_card(self, *args, **kwargs) -> None:
        """Nothing: the run folder has a model card of its own."""

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        return self._restore(resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return super()._load_best_model()
        return self._restore(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str) -> None:
        """Load a checkpoint's weights, every one of them.

        transformers 5 saves ViT layers under other names than the model has, and its Trainer reads them back with
        `strict=False`: the encoder then silently keeps the weights it had. `from_pretrained` knows the names.
        """
        saved = VisionEncoderDecoderModel.from_pretrained(checkpoint, dtype=torch.float32, use_safetensors=True)
        self.model.load_state_dict(saved.state_dict())

    # ---- evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **generation):
        """Caption each image of the batch once, and measure the loss on its references.

        Returns:
            (None, (token ids (images, length), summed loss (images,), number of tokens (images,)), ids (images,)).
            Sums, not means, so that the loss of a split does not depend on how it was cut into batches.
        """
        if self.is_in_train and self._stop_asked():
            raise EvaluationStopped
        image_id = inputs["image_id"].to(self.args.device)
        image_of_row = inputs["image_of_row"].to(self.args.device)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        positions = self.projection.positions
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
            losses = functional.cross_entropy(outputs.logits[0].float(), labels.flatten()[positions], reduction="none")
        self.projection.positions = None  # generation needs every position
        image_of_token = image_of_row[positions // labels.shape[1]]
        zeros = torch.zeros(len(image_id), device=losses.device)
        summed = zeros.index_add(0, image_of_token, losses)
        counted = zeros.index_add(0, image_of_token, torch.ones_like(losses))

        first_row_of_image = torch.searchsorted(image_of_row, torch.arange(len(image_id), device=image_of_row.device))
        states = outputs.encoder_last_hidden_state[first_row_of_image]
        with torch.no_grad(), self.accelerator.autocast():
            settings = {**getattr(self, "_gen_kwargs", {}), **generation}
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                # Parameters are spread over processes: all must go on until the last has finished.
                tokens = self.model.generate(encoder_outputs=BaseModelOutput(states), synced_gpus=True, **settings)
            else:
                tokens = generate_tokens(self.bundle.model, states, **settings)
        return None, (tokens, summed, counted), image_id

    def evaluation_loop(self, dataloader, *args, **kwargs):
        self._images = len(dataloader.dataset)
        with explained(self.args, evaluating=True):
            return super().evaluation_loop(dataloader, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        started = time.perf_counter()
        scores = super().evaluate(*args, **kwargs)
        self.evaluated += time.perf_counter() - started
        return scores

    def _score(self, evaluation) -> dict[str, float]:
        """Scores of an evaluated split; every image counts once, however many processes took part.

        Processes that run out of images repeat some, so that all have as many batches: the second time is left out.
        """
        tokens, summed, counted = evaluation.predictions
        ids, first = np.unique(evaluation.label_ids, return_index=True)
        if len(ids) != self._images:
            raise RuntimeError(f"{len(ids):,} images came back from an evaluation of {self._images:,}")
        tokens = np.where(tokens == IGNORED, self.bundle.tokenizer.pad_token_id, tokens)[first]
        self.predictions = dict(zip(ids.tolist(), decode(self.bundle.tokenizer, tokens), strict=True))
        scores = coco_scores(self.predictions, {image_id: self.references[image_id] for image_id in self.predictions})
        return {"loss": float(summed[first].sum() / counted[first].sum()), **scores}


class EvaluationStopped(Exception):
    """Training was asked to stop while it evaluated."""


class Resumed(TrainerCallback):
    """What a checkpoint knows and the Trainer leaves there: an evaluation that is due, and how far patience went."""

    def __init__(self, trainer: CaptionTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, saved = self.trainer, state.stateful_callbacks
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback) and type(callback).__name__ in saved:
                waited = saved[type(callback).__name__]["attributes"]["early_stopping_patience_counter"]
                callback.early_stopping_patience_counter = waited
                control.should_training_stop |= waited >= callback.early_stopping_patience
        if saved["TrainerControl"]["args"]["should_evaluate"]:
            try:
                metrics = trainer._evaluate(None, None)
            except EvaluationStopped:
                raise KeyboardInterrupt from None
            if trainer._determine_best_metric(metrics, None) and state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))
