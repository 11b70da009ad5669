"""A Seq2SeqTrainer that can be stopped at any time and goes on as if it had not been.

Whole checkpoints only; Ctrl-C and SIGTERM leave one; a resumed run ends with the weights of an undisturbed one. What is
trained is no business of this file, see `captioning.training.trainer`.

The Trainer has no public place for most of this, so private methods are overridden here, and only here.
`tests/test_resilience.py` holds what they must do, for the version of transformers in requirements.txt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import math
import multiprocessing.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    VisionEncoderDecoderModel,
)
from transformers.trainer_callback import ExportableState
from transformers.training_args import OptimizerNames

from captioning import InputError
from captioning.files import read_json
from captioning.foreign import Check, check, either, flag, list_of, null, number, object_of, shown, text, whole
from captioning.model import lora
from captioning.model.limits import check_files
from captioning.model.parts import literal, read_config, refusing
from captioning.model.weights import fingerprint, load_weights
from captioning.training import precision
from captioning.training.arguments import images_per_update
from captioning.training.resilience import (
    STATE,
    LossWatch,
    StopSignals,
    explained,
    in_own_group,
    kept_of_run,
    whole_checkpoint,
)

IMAGES = "images_per_update"  # what a checkpoint calls them

# What is used of a trainer_state.json, which may come from somebody else.
_entry = object_of(either(lambda value: None if isinstance(value, int | float) else "a number", text(), null))
_maybe_number = either(number(), null)
_callback = {
    "TrainerControl": {"args": object_of(flag), "attributes": object_of(flag, most=0)},
    "Resumed": {"args": object_of(flag, most=0), "attributes": object_of(either(text(), whole(0, 2**40)))},
    "Patience": {"args": object_of(number()), "attributes": object_of(whole(0, 2**40))},
}
STATE_SCHEMA: dict[str, Check] = {
    "global_step": whole(0, 2**40),
    "max_steps": whole(-1, 2**40),
    "epoch": either(number(0), null),
    "num_train_epochs": number(0),
    "logging_steps": number(0),
    "eval_steps": number(0),
    "save_steps": number(0),
    "train_batch_size": either(whole(1, 2**40), null),
    "num_input_tokens_seen": whole(0),
    "total_flos": number(0),
    "log_history": list_of(_entry),
    "best_metric": _maybe_number,
    "best_global_step": either(whole(0, 2**40), null),
    "best_model_checkpoint": either(text(), null),
    "is_local_process_zero": flag,
    "is_world_process_zero": flag,
    "is_hyper_param_search": flag,
    "trial_name": either(text(), null),
    "trial_params": either(object_of(_maybe_number), null),
}


def check_state(checkpoint: Path) -> None:
    """Refuse a checkpoint whose trainer_state.json the Trainer would stumble over.

    Raises:
        InputError: a value is of another kind, or an entry of the history says no step.
    """
    what, remedy = f"'{checkpoint / STATE}'", "name another checkpoint"
    state = read_json(checkpoint / STATE, remedy)
    check(state, STATE_SCHEMA, what, remedy, ("global_step", "stateful_callbacks", "log_history"))
    unknown = sorted(set(state) - {field.name for field in dataclasses.fields(TrainerState)})
    if unknown:
        raise InputError(f"{what} says {shown(unknown[0])}, which no training writes; {remedy}")
    for entry in state["log_history"]:
        check(entry, {"step": whole(0, 2**40), "epoch": number(0)}, f"the history in {what}", remedy, ("step",))
    callbacks = state["stateful_callbacks"]
    check(callbacks, {}, f"stateful_callbacks in {what}", remedy, ["TrainerControl"])
    for name, schema in _callback.items():
        if name in callbacks:
            check(callbacks[name], schema, f"{name} in {what}", remedy, ("args", "attributes"))
    kept = callbacks.get("Resumed", {"attributes": {}})["attributes"]
    check(kept, {IMAGES: whole(1, 2**40)}, f"Resumed in {what}", remedy)
    control = callbacks["TrainerControl"]["args"]
    switches = {field.name for field in dataclasses.fields(TrainerControl)}
    check(control, {}, f"TrainerControl in {what}", remedy, ["should_evaluate"])
    if set(control) - switches:
        raise InputError(f"TrainerControl in {what} says {shown(min(set(control) - switches))}; {remedy}")


def shared(collate: Callable[[Any], dict[str, torch.Tensor]], rows: Any) -> dict[str, torch.Tensor]:
    """A batch; in a data worker its tensors lie in shared memory already.

    Otherwise a thread of the worker's would put them there, and where there is no room the batch would be lost with a
    traceback on stderr. Here an error reaches the training.
    """
    batch = collate(rows)
    if torch.utils.data.get_worker_info() is not None:
        multiprocessing.util.get_temp_dir()  # where the socket lies that hands over memory
        for tensor in batch.values():
            tensor.share_memory_()
    return batch


def flags_for(images: int, args: TrainingArguments) -> str:
    """What to do for so many images per update."""
    size, accumulation = args.train_batch_size, args.gradient_accumulation_steps
    of_process, rest = divmod(images, args.world_size)
    if rest:
        return f"start another number of processes than {args.world_size}, which cannot share them evenly"
    if of_process % size == 0:
        return f"give --gradient_accumulation_steps {of_process // size}"
    if of_process % accumulation == 0:
        return f"give --per_device_train_batch_size {of_process // accumulation}"
    return f"give --per_device_train_batch_size {of_process} --gradient_accumulation_steps 1"


class EvaluationStopped(Exception):
    """Training was asked to stop while it evaluated."""


class ResumableTrainer(Seq2SeqTrainer):
    """
    Args:
        kwargs: those of `Seq2SeqTrainer`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self.resumed = Resumed(self)
        self.add_callback(self.resumed)
        self.losses = LossWatch()
        self.stop = StopSignals(speak=self.is_world_process_zero())
        # Told which epoch begins. The Trainer tells its loader, but one that skips batches does not hand it on.
        self.set_epoch: Callable[[int], None] = lambda epoch: None
        # Processes agree on stopping by messages between hosts: those between devices would make them wait.
        self._hosts = torch.distributed.new_group(backend="gloo") if self.args.world_size > 1 else None
        self._step_seen = -1

    # ---- training, and stopping it

    def train(self, *args, **kwargs):
        """As the Trainer's.

        Raises:
            KeyboardInterrupt: SIGINT or SIGTERM came; after the first there is a checkpoint of the update it came in.
            InputError: the loss was not finite, the checkpoint is of a run with other data, other trained parts or
                other settings of its updates, or processes do not begin alike.
        """
        if checkpoint := kwargs.get("resume_from_checkpoint"):
            check_state(Path(checkpoint))
        self._refuse_other_beginnings(checkpoint and Path(checkpoint))
        if checkpoint:
            self._refuse_another_run(Path(checkpoint))
        with self.stop:
            try:
                trained = super().train(*args, **kwargs)
            except EvaluationStopped:  # one before the first update
                raise KeyboardInterrupt from None
            if self.stop_asked():
                raise KeyboardInterrupt
        return trained

    def optimiser_flags(self) -> dict[str, str]:
        """Flags of the optimiser with their values: it goes on with those of the checkpoint, whatever is given."""
        names = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
        own = {f"--{name}": str(getattr(self.args, name)) for name in names}
        return {"--optim": OptimizerNames(self.args.optim).value, **own}

    def _refuse_another_run(self, checkpoint: Path) -> None:
        saved = kept_of_run(checkpoint)
        begun = f"'{checkpoint}' is of a run with"
        anew = f"start a new one from it with --model_path '{checkpoint}' and another --output_dir"
        for name, now in self.resumed.recipe.items():
            before = saved.get(name, now)
            if before != now:
                of = {"data": "other data", "base": "another decoder under its adapters"}
                what = of.get(name) or f"other parts being trained ({before}, now {now})"
                raise InputError(f"{begun} {what}, and a run goes on as it began; {anew}")
        changed = {flag: now for flag, now in self.optimiser_flags().items() if saved.get(flag, now) != now}
        if changed:
            before, now = (" ".join(f"{flag} {of[flag]}" for flag in changed) for of in (saved, changed))
            raise InputError(f"{begun} {before}, not {now}, and a run goes on as it began; give {before}, or {anew}")
        images = images_per_update(self.args)
        if saved.get(IMAGES, images) != images:
            raise InputError(
                f"{begun} {saved[IMAGES]} images per update, not {images}, and a run goes on as it began; "
                f"{flags_for(saved[IMAGES], self.args)}, or {anew}"
            )

    def _refuse_other_beginnings(self, checkpoint: Path | None) -> None:
        """Machines may see other folders under the same names."""
        if self._hosts is None:
            return
        update = read_json(checkpoint / STATE)["global_step"] if checkpoint else 0
        all_of_them: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(all_of_them, {"update": update, **self.resumed.recipe}, self._hosts)
        for name in all_of_them[0]:
            found = [of_process[name] for of_process in all_of_them]
            if len(set(found)) > 1:
                other = next(number for number, value in enumerate(found) if value != found[0])
                folder = "--output_dir" if name == "update" else "--data_path"
                raise InputError(
                    f"process {other} begins with another {name} than process 0 ({found[other]}, not {found[0]}); "
                    f"{folder} has to be the same folder on every machine, or a whole copy of it"
                )

    def training_step(self, model, inputs, *args, **kwargs):
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses(loss, self.state.global_step + 1, inputs["image_id"])
        return loss

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop; all processes have to call this together."""
        asked = torch.tensor(int(self.stop.asked))
        if self._hosts is not None:
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, self._hosts)
        return bool(asked)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        # Only --eval_on_start skips it. A run that goes on is not at its start: patience would count this one again.
        if skip_scheduler and self.state.global_step:
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def evaluation_loop(self, *args, **kwargs):
        with explained(self.args, evaluating=True):
            return super().evaluation_loop(*args, **kwargs)

    def check_stop(self) -> None:
        """To be called before each batch of an evaluation.

        Raises:
            EvaluationStopped: training was asked to stop.
        """
        if self.is_in_train and self.stop_asked():
            raise EvaluationStopped

    def _get_dataloader(self, *args, **kwargs):
        loader = super()._get_dataloader(*args, **kwargs)
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper hands on what is read, not written
        inner.worker_init_fn = functools.partial(in_own_group, then=inner.worker_init_fn)
        inner.collate_fn = functools.partial(shared, inner.collate_fn)
        # A loader draws its workers' seed whenever it starts them, which a resumed run does at other times: not from
        # the generator that dropout draws from.
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _run_epoch(self, **kwargs):
        # The Trainer would train one update more where a checkpoint is that of the last one.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        if self.control.should_training_stop:
            return
        self.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, epoch, *args, **kwargs):
        """What follows an update, and an epoch; here a run stops that was asked to, once it has a checkpoint.

        After an epoch's last update this is called twice: only the second time it is known what follows the epoch. An
        evaluation that is due is left to the run that goes on, which the checkpoint tells (see `Resumed`).
        """
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self.losses.check()
        comes_again = self.state.epoch == epoch + 1 and self.state.global_step != self._step_seen
        self._step_seen = self.state.global_step
        if comes_again or not self.stop_asked():
            try:
                return super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, *args, **kwargs)
            except EvaluationStopped:
                pass
        self._save_checkpoint(model, trial)
        raise KeyboardInterrupt

    # ---- checkpoints

    def _determine_best_metric(self, metrics, trial):
        """As the Trainer's; of equal scores the one with the lower loss is better, and the best has a checkpoint.

        The Trainer keeps the first of equals, and saves when a checkpoint is due, which may be some evaluations later.
        """
        before, kept = self.state.best_metric, self.state.best_global_step
        better = super()._determine_best_metric(metrics, trial)
        name = f"eval_{(self.args.metric_for_best_model or 'loss').removeprefix('eval_')}"
        if not better and kept and metrics[name] == before and metrics["eval_loss"] < self._loss_at(kept):
            self.state.best_global_step, better = self.state.global_step, True
        if better and self.args.load_best_model_at_end:
            self.control.should_save = True
        return better

    def _loss_at(self, step: int) -> float:
        """The validation loss that was logged at a step."""
        return min(
            (entry["eval_loss"] for entry in self.state.log_history if entry["step"] == step and "eval_loss" in entry),
            default=-math.inf,
        )

    def _save_checkpoint(self, model, trial):
        self.losses.check()
        folder = Path(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
        with whole_checkpoint(folder) if self.args.should_save else contextlib.nullcontext():
            super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What is written next says that the checkpoint is whole.
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir=None, _internal_call=False):
        # push_to_hub saves once more, perhaps after an evaluation in half precision: the folder holds better weights.
        if output_dir is not None or not _internal_call:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        return self._restore(resume_from_checkpoint)

    def _load_best_model(self):
        return self._restore(self.state.best_model_checkpoint)

    def _restore(self, checkpoint: str) -> None:
        """Load a checkpoint's weights, every one of them.

        transformers 5 saves ViT layers under other names than the model has, and its Trainer reads them back with
        `strict=False`: the encoder then silently keeps the weights it had. `from_pretrained` knows the names.
        """
        what = f"checkpoint '{checkpoint}'"
        check_files(Path(checkpoint), what)
        config = read_config(Path(checkpoint), "checkpoint")
        saved, _ = load_weights(VisionEncoderDecoderModel, Path(checkpoint), config, what)
        assert self.model is not None
        with refusing(literal(what) + " is not one of this training ({reason}); name another"):
            lora.restore(self.model, saved.state_dict(), Path(checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint):
        with refusing(_unfit(checkpoint, "optimizer and schedule")):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with refusing(_unfit(checkpoint, "random numbers")):
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint):
        with refusing(_unfit(checkpoint, "scale of the loss")):
            super()._load_scaler(checkpoint)

    def _load_callback_state(self):
        with refusing(_unfit(self.args.resume_from_checkpoint or "", "trainer_state.json")):
            super()._load_callback_state()


def _unfit(checkpoint: Any, part: str) -> str:
    where = literal(f"checkpoint '{checkpoint}'")
    return f"{where} cannot be continued from: its {part} does not fit this training ({{reason}}); name another"


class Resumed(TrainerCallback, ExportableState):
    """What a checkpoint knows and the Trainer leaves there: an evaluation that is due, and how far patience went.

    It also keeps there what a run cannot change on its way: its data, the parts that it trains, and what an update is.
    """

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    @functools.cached_property
    def recipe(self) -> dict[str, str]:
        """The data, as a digest of how many tokens each training image has, and the parts that are trained.

        Where the decoder learns by adapters, also a digest of what they are added to: a checkpoint does not hold it.
        """
        trainer = self.trainer
        lengths = np.asarray(getattr(trainer.train_dataset, "lengths", list)())
        assert trainer.model is not None
        parts = {name.split(".")[0] for name, weight in trainer.model.named_parameters() if weight.requires_grad}
        digest = hashlib.sha256(b"[")
        for start in range(0, len(lengths), 2**16):  # the text of a list, in pieces: it takes 4 bytes an image
            text = ", ".join(map(str, lengths[start : start + 2**16].tolist()))
            digest.update(f"{', ' if start else ''}{text}".encode())
        digest.update(b"]")
        recipe = {"data": digest.hexdigest()[:16]}
        if rank := lora.rank_of(trainer.model):
            parts = {f"decoder by adapters of rank {rank}" if part == "decoder" else part for part in parts}
            recipe["base"] = fingerprint(lora.base(trainer.model))
        return {**recipe, "parts": " and ".join(sorted(parts))}

    def state(self) -> dict:
        trainer = self.trainer
        kept = {**self.recipe, "precision": precision.name_of(trainer.args), IMAGES: images_per_update(trainer.args)}
        return {"args": {}, "attributes": {**kept, **trainer.optimiser_flags()}}

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, saved = self.trainer, state.stateful_callbacks
        for callback in trainer.callback_handler.callbacks:
            name = type(callback).__name__
            if isinstance(callback, EarlyStoppingCallback) and name in saved:
                waited = saved[name]["attributes"].get("early_stopping_patience_counter", 0)
                callback.early_stopping_patience_counter = waited
                control.should_training_stop |= waited >= callback.early_stopping_patience
            if isinstance(callback, ExportableState):
                saved.setdefault(name, {})  # the Trainer looks for each when it saves
        if saved["TrainerControl"]["args"]["should_evaluate"]:
            metrics = trainer._evaluate(None, None)
            if trainer._determine_best_metric(metrics, None) and state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(Path(args.output_dir, f"checkpoint-{state.global_step}"))
