"""What each flag of transformers' Seq2SeqTrainingArguments does here: it works, or it is refused with the reason.

    check(training, given)      # InputError: a flag cannot work here, has no effect, or its value cannot be

Every flag of the pinned version stands in one of `WORKS`, `HARMLESS`, `FIXED`, `REFUSED` and `OURS`, and
`tests/test_flags.py` holds the list against the library: a flag of a new version is in none of them, and is looked at
before it is accepted. What can be tried in a moment is tried: a schedule, an optimiser and a compiler, on one layer.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import netrc
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from captioning import InputError
from captioning.scores.names import CLIP_KEYS, SCORE_NAMES
from captioning.training import precision

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments

# Flags of train.py itself that the library has too.
OURS = {"output_dir", "resume_from_checkpoint", "debug"}

_WORKING = """
per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs
warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon optim_target_modules
gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode neftune_noise_alpha logging_strategy logging_steps
logging_first_step log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id
trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
eval_on_start eval_accumulation_steps save_strategy save_steps save_on_each_node save_total_limit push_to_hub
hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu dataloader_num_workers
dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
train_sampling_strategy ddp_backend ddp_timeout generation_max_length generation_num_beams
"""
WORKS = set(_WORKING.split())

# Flags that change nothing that anybody would miss: why.
HARMLESS = {
    "dataloader_pin_memory": "copies to a GPU are faster with it; without a GPU there are none",
    "ddp_broadcast_buffers": "the models have no buffers that change",
    "ddp_bucket_cap_mb": "how gradients are grouped when processes exchange them: the sum is the same",
    "ddp_find_unused_parameters": "every parameter that is trained has a gradient; to look for others takes time",
    "local_rank": "launchers of old give it; today's tell it by RANK and LOCAL_RANK",
    "log_on_each_node": "the first process of each machine writes to the trackers, or that of the first one alone",
    "logging_nan_inf_filter": "a training ends at the first loss that is not a number",
    "torch_empty_cache_steps": "gives memory back to the GPU's driver; without a GPU there is none",
}

SCORED = "every image is captioned and scored; leave it out"
# Flags that can have one value only, and why.
FIXED: dict[str, tuple[Any, str]] = {
    "average_tokens_across_devices": (True, "an update is to be the same on any number of processes; leave it out"),
    "batch_eval_metrics": (False, SCORED),
    "dataloader_drop_last": (False, SCORED),
    "dataloader_in_order": (True, "a run that goes on has to see the images in the same order; leave it out"),
    "do_eval": (True, "the checkpoint is chosen by evaluations; --eval_strategy no does without"),
    "do_predict": (True, SCORED),
    "do_train": (True, "without training, inference.py --data_path scores a run folder"),
    "eval_do_concat_batches": (True, SCORED),
    "predict_with_generate": (True, SCORED),
    "prediction_loss_only": (False, SCORED),
    "remove_unused_columns": (False, SCORED),
}

SPREAD = (
    "train.py does not spread one model over several processes; each has a whole one (accelerate launch --multi_gpu), "
    "and --activation_checkpointing, --optim adafactor and smaller batches with more accumulation save memory"
)
# Flags without a use here, and why.
REFUSED = {
    "accelerator_config": "train.py itself deals the images out to processes, each of them once",
    "auto_find_batch_size": "it trains again from its beginning on weights that have moved already; lower "
    "--per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor",
    "bf16_full_eval": "final scores are those of inference.py, which computes in float32",
    "ddp_static_graph": "parts of the model begin to move on the way",
    "deepspeed": SPREAD,
    "enable_jit_checkpoint": "Ctrl-C and SIGTERM leave a checkpoint anyway",
    "eval_use_gather_object": "an evaluation is gathered as tensors",
    "fp16_full_eval": "final scores are those of inference.py, which computes in float32",
    "fsdp": SPREAD,
    "fsdp_config": SPREAD,
    "generation_config": "captions are generated with --generation_num_beams and --generation_max_length; give those",
    "ignore_data_skip": "a run that goes on does so with the images that it has not seen",
    "include_for_metrics": "the scores need captions and references only",
    "include_num_input_tokens_seen": "it counts pixels; images and captions per second are said at the end",
    "label_names": "the labels are the captions of --data_path",
    "length_column_name": "lengths are those of the captions",
    "liger_kernel_config": "Liger has no kernels for image captioners",
    "parallelism_config": SPREAD,
    "restore_callback_states_from_checkpoint": "--resume_from_checkpoint does so",
    "save_only_model": "a training cannot go on from a checkpoint without its optimiser; --save_total_limit keeps few",
    "skip_memory_metrics": "the most memory that was used is said at the end",
    "sortish_sampler": "--train_sampling_strategy group_by_length is its like here",
    "use_cache": "training sees whole captions at once, and captions are always generated with a cache",
    "use_liger_kernel": "Liger has no kernels for image captioners",
}

# Those of them that take an object or a file: the library would stumble over a wrong one.
OBJECTS = (
    "accelerator_config",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "generation_config",
    "liger_kernel_config",
    "parallelism_config",
)

# Flags of numbers, the least that each can be, and what it has to stay below.
LIMITS = (
    ("per_device_train_batch_size", 1, math.inf),
    ("per_device_eval_batch_size", 1, math.inf),
    ("gradient_accumulation_steps", 1, math.inf),
    ("generation_num_beams", 1, math.inf),
    ("generation_max_length", 1, math.inf),
    ("dataloader_num_workers", 0, math.inf),
    ("dataloader_prefetch_factor", 1, math.inf),
    ("weight_decay", 0, math.inf),
    ("warmup_steps", 0, math.inf),
    ("label_smoothing_factor", 0, 1),
    ("adam_beta1", 0, 1),
    ("adam_beta2", 0, 1),
    ("adam_epsilon", 0, math.inf),
    ("max_grad_norm", 0, math.inf),
    ("neftune_noise_alpha", 0, math.inf),
    ("eval_accumulation_steps", 1, math.inf),
    ("eval_delay", 0, math.inf),
    ("save_total_limit", 1, math.inf),
    ("ddp_bucket_cap_mb", 1, math.inf),
    ("ddp_timeout", 1, math.inf),
    ("seed", 0, 2**32),
    ("data_seed", 0, 2**32),
)
ABOVE_ZERO = ("learning_rate", "num_train_epochs", "logging_steps", "eval_steps", "save_steps")

# Optimisers that cannot train here, by the beginning or the end of their names.
UNFIT_OPTIMISERS = {
    "lomo": "updates the weights while gradients are computed, with one learning rate for all parts",
    "schedule_free": "evaluates other weights than it trains, and checkpoints here hold one kind",
    "layerwise": "updates the weights while gradients are computed, with one learning rate for all parts",
}
CHECKPOINTING = {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
SAMPLING = ("group_by_length", "random", "sequential")
LOW_RANK = ("galore", "apollo")
# The package of each tracker that is not called like it.
TRACKERS = {"azure_ml": "azureml-sdk", "comet_ml": "comet-ml", "flyte": "flytekit"}


def check(training: Seq2SeqTrainingArguments, given: Mapping[str, str]) -> None:
    """Refuse what the Trainer would accept and then ignore, or stumble over later.

    Args:
        training: the Trainer's arguments.
        given: the words that they were read from, by flag, as in `{"--bf16": "True"}`.

    Raises:
        InputError: a flag cannot work here or has no effect, or a value cannot be.
    """
    names = {option.removeprefix("--").removeprefix("no_"): value for option, value in given.items()}
    _check_use(training, names)
    _check_numbers(training)
    _check_needs(training, names)
    _check_trackers(training)
    _try_schedule(training, names)
    _try_optimiser(training, names)
    _try_compiler(training)
    _try_checkpointing(training)


def refuse_words(given: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Refuse flags without a use here over whose values the library would stumble.

    Args:
        given: flags with their values, as in `{"--deepspeed": "zero3.json"}`.
        environment: a launcher puts the number of processes there.

    Raises:
        InputError: one of them has a value, or an object is no JSON.
    """
    for name in OBJECTS:
        if given.get(f"--{name}"):
            raise InputError(f"--{name} has no use here: {REFUSED[name]}")
    if "--ddp_backend" in given and environment.get("WORLD_SIZE", "1") == "1":
        raise InputError("--ddp_backend has no effect with one process; leave it out")
    for option in ("--lr_scheduler_kwargs", "--activation_checkpointing_kwargs", "--gradient_checkpointing_kwargs"):
        if (value := given.get(option, "")).startswith("{"):
            try:
                json.loads(value)
            except ValueError as error:
                raise InputError(f"{option} '{value}' is not a JSON object: {error}") from error


def refuse_sharding(environment: Mapping[str, str]) -> None:
    """Refuse what `accelerate launch` asks for by the environment: to spread one model over processes.

    Raises:
        InputError: FSDP, DeepSpeed, Megatron-LM or another kind of parallel parts.
    """
    kinds = {
        "FSDP": "FSDP",
        "DEEPSPEED": "DeepSpeed",
        "MEGATRON_LM": "Megatron-LM",
        "PARALLELISM_CONFIG": "parallelism",
    }
    for name, said in kinds.items():
        if environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes", "on", "y", "t"):
            raise InputError(f"accelerate was asked for {said}: {SPREAD}")


def _check_use(training: Seq2SeqTrainingArguments, names: Mapping[str, str]) -> None:
    from dataclasses import MISSING, fields

    for name, (must, reason) in FIXED.items():
        value = getattr(training, name)
        if name.startswith("do_"):  # the library derives these from others
            value = names.get(name, "true").lower() not in precision.NO
        if value != must:
            raise InputError(f"--{name} {value} cannot work here: {reason}")
    defaults = {
        field.name: field.default_factory() if field.default_factory is not MISSING else field.default
        for field in fields(training)
        if field.name in REFUSED
    }
    for name in names.keys() & REFUSED.keys():
        if name != "accelerator_config" and getattr(training, name) != defaults[name]:
            raise InputError(f"--{name} has no use here: {REFUSED[name]}")


def _check_numbers(training: Seq2SeqTrainingArguments) -> None:
    for name, least, limit in LIMITS:
        value = getattr(training, name)
        if value is not None and not least <= value < limit:
            reason = f"below {least}" if value < least else f"not between {least} and {limit}"
            raise InputError(f"--{name} {value} is {reason}")
    if training.max_steps < 1 and training.max_steps != -1:
        raise InputError(f"--max_steps {training.max_steps} is below 1")
    for name in ABOVE_ZERO:
        value = getattr(training, name)
        if value is not None and not 0 < value < math.inf:
            raise InputError(f"--{name} {value:g} is not above 0 and finite")
    if training.warmup_steps > 1 and training.warmup_steps != int(training.warmup_steps):
        raise InputError(f"--warmup_steps {training.warmup_steps} is neither below 1 nor a whole number")
    if training.train_sampling_strategy not in SAMPLING:
        wrong = training.train_sampling_strategy
        raise InputError(f"--train_sampling_strategy {wrong} is none of {', '.join(SAMPLING)}; choose one of them")
    metric = (training.metric_for_best_model or "loss").removeprefix("eval_")
    known = [name for name in SCORE_NAMES if name not in CLIP_KEYS]
    if metric not in known:
        raise InputError(f"--metric_for_best_model '{metric}' is not a score; choose from {', '.join(known)}")


def _check_needs(training: Seq2SeqTrainingArguments, names: Mapping[str, str]) -> None:
    """Flags that have an effect only together with another one."""
    evaluating, logging = _value(training.eval_strategy), _value(training.logging_strategy)
    optimiser, checkpointing = _value(training.optim), bool(training.activation_checkpointing)
    workers = training.dataloader_num_workers > 0
    needs = {
        "eval_delay": (evaluating != "no", f"--eval_strategy {evaluating}"),
        "eval_on_start": (evaluating != "no", f"--eval_strategy {evaluating}"),
        "save_total_limit": (_value(training.save_strategy) != "no", "--save_strategy no"),
        "logging_steps": (logging == "steps", f"--logging_strategy {logging}"),
        "activation_checkpointing_kwargs": (checkpointing, "--activation_checkpointing False"),
        "gradient_checkpointing_kwargs": (checkpointing, "--activation_checkpointing False"),
        "optim_target_modules": (optimiser.startswith(LOW_RANK), f"--optim {optimiser}"),
        "run_name": (training.report_to, "--report_to none"),
        "project": (training.report_to, "--report_to none"),
        "dataloader_persistent_workers": (workers, "--dataloader_num_workers 0"),
        "dataloader_multiprocessing_context": (workers, "--dataloader_num_workers 0"),
    }
    for name in names:
        if name.startswith("trackio_"):
            needs[name] = ("trackio" in (training.report_to or ()), "any other --report_to than trackio")
        elif name.startswith("hub_"):
            needs[name] = (training.push_to_hub, "--push_to_hub False")
    for name in names.keys() & needs.keys():
        works, other = needs[name]
        if not works and getattr(training, name) is not False:
            raise InputError(f"--{name} has no effect with {other}; leave one of the two out")
    if training.neftune_noise_alpha == 0:
        raise InputError("--neftune_noise_alpha 0 adds no noise; leave it out")


def _check_trackers(training: Seq2SeqTrainingArguments) -> None:
    if not training.report_to:
        return
    from transformers.integrations import integration_utils

    here = {*integration_utils.get_available_reporting_integrations()}
    here |= {"flyte"} if integration_utils.is_flytekit_available() else set()
    for tracker in training.report_to:
        if tracker not in integration_utils.INTEGRATION_TO_CALLBACK:
            known = ", ".join(integration_utils.INTEGRATION_TO_CALLBACK)
            raise InputError(f"--report_to '{tracker}' is unknown; choose from {known}, or none")
        if tracker == "kubeflow" and tracker not in here:
            raise InputError("--report_to kubeflow works inside a Kubeflow TrainJob only; leave it out")
        if tracker not in here:
            package = TRACKERS.get(tracker, tracker)
            raise InputError(f"--report_to {tracker} needs that package: pip install {package}")
        if tracker == "wandb" and not _knows_wandb():
            raise InputError("--report_to wandb needs a login: run 'wandb login', or set WANDB_MODE=offline")


def _knows_wandb() -> bool:
    """Whether Weights & Biases has a key, or needs none. Without one it would end in a traceback."""
    if os.environ.get("WANDB_MODE") in ("offline", "disabled") or os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return any("wandb" in host for host in netrc.netrc().hosts)
    return False


# ---- what is tried on one layer


def sentence(error: BaseException) -> str:
    """The first line of an error's message, with the next one after a colon, and without a full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).removesuffix(".")


def _value(choice: Any) -> str:
    """Of an enumeration, which the library's annotations call a string."""
    return str(getattr(choice, "value", choice))


def _layer(training: Seq2SeqTrainingArguments):
    import torch

    layer = torch.nn.Linear(64, 64).to(training.device)
    return layer, torch.ones(1, 64, device=training.device)


def _try_schedule(training: Seq2SeqTrainingArguments, names: Mapping[str, str]) -> None:
    import torch
    from transformers import get_scheduler

    kind, settings = _value(training.lr_scheduler_type), training.lr_scheduler_kwargs
    if settings is not None and not isinstance(settings, Mapping):
        raise InputError(f"--lr_scheduler_kwargs '{settings}' is not a JSON object, such as '{{\"num_cycles\": 2}}'")
    if "warmup_steps" in names and kind in ("constant", "reduce_lr_on_plateau", "greedy"):
        raise InputError(f"--warmup_steps has no effect with --lr_scheduler_type {kind}; leave one of the two out")
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=training.learning_rate)
    try:
        schedule = get_scheduler(kind, optimiser, training.get_warmup_steps(10), 10, settings)
        if isinstance(schedule, torch.optim.lr_scheduler.LambdaLR):
            optimiser.step()
            schedule.step()
    except Exception as error:
        said = sentence(error).rpartition("() ")[2]
        example = {"warmup_stable_decay": '{"num_decay_steps": 100}'}.get(kind, '{"min_lr_rate": 0.1}')
        raise InputError(
            f"--lr_scheduler_type {kind} cannot be used with --lr_scheduler_kwargs {settings}: {said}"
            + (f"; give it, such as --lr_scheduler_kwargs '{example}'" if "min_lr" in kind or "stable" in kind else "")
        ) from error


def _try_optimiser(training: Seq2SeqTrainingArguments, names: Mapping[str, str]) -> None:
    """One update of one layer by the optimiser, and whether its settings reach it."""
    from transformers import Trainer

    kind = _value(training.optim)
    for unfit, reason in UNFIT_OPTIMISERS.items():
        if kind.startswith(unfit) or kind.endswith(unfit):
            raise InputError(f"--optim {kind} cannot be used: it {reason}")
    if kind.startswith(LOW_RANK) and training.optim_target_modules is None:
        raise InputError(f"--optim {kind} needs --optim_target_modules, such as all-linear")
    layer, one = _layer(training)

    def settings_of(arguments: Seq2SeqTrainingArguments):
        return Trainer.get_optimizer_cls_and_kwargs(arguments, layer)

    try:
        if kind.startswith(LOW_RANK):
            trial = copy.copy(training)
            trial.optim_target_modules = "all-linear"
            settings_of(trial)
            return
        optimiser_class, settings = settings_of(training)
        optimiser = optimiser_class(layer.parameters(), **settings)
        layer(one).sum().backward()
        optimiser.step()
    except Exception as error:
        with_arguments = f" with --optim_args '{training.optim_args}'" if training.optim_args else ""
        raise InputError(f"--optim {kind} cannot be used{with_arguments}: {sentence(error)}") from error
    for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if name in names:
            other = copy.copy(training)
            setattr(other, name, getattr(training, name) / 2 + 0.1)
            if settings_of(other)[1] == settings:
                raise InputError(f"--{name} has no effect with --optim {kind}; leave one of the two out")
    pairs = [pair for pair in (training.optim_args or "").replace(" ", "").split(",") if pair]
    for pair in pairs:
        other = copy.copy(training)
        other.optim_args = ",".join(rest for rest in pairs if rest != pair)
        if settings_of(other)[1] == settings:
            raise InputError(f"--optim_args '{pair}' has no effect with --optim {kind}; leave it out")


def _try_compiler(training: Seq2SeqTrainingArguments) -> None:
    if not training.torch_compile:
        return
    import torch

    layer, one = _layer(training)
    backend, mode = str(training.torch_compile_backend), training.torch_compile_mode
    try:
        from accelerate.utils import DynamoBackend

        DynamoBackend(backend.upper())
        torch.compile(layer, backend=backend, mode=mode)(one).sum().backward()
    except Exception as error:
        chosen = f"--torch_compile_backend {backend}" + (f" --torch_compile_mode {mode}" if mode else "")
        raise InputError(f"{chosen} cannot be used here: {sentence(error)}") from error
    finally:
        torch.compiler.reset()


def _try_checkpointing(training: Seq2SeqTrainingArguments) -> None:
    settings = training.activation_checkpointing_kwargs
    if settings is None:
        return
    if not isinstance(settings, Mapping):
        raise InputError(f"--activation_checkpointing_kwargs '{settings}' is not a JSON object")
    from torch.utils.checkpoint import checkpoint

    layer, one = _layer(training)
    try:
        for name in settings.keys() - CHECKPOINTING:
            raise ValueError(f"'{name}' is none of torch's settings")
        checkpoint(layer, one.requires_grad_(), **{"use_reentrant": False, **settings}).sum().backward()
    except Exception as error:
        raise InputError(f"--activation_checkpointing_kwargs '{settings}' cannot be used: {sentence(error)}") from error
