"""Every flag of Seq2SeqTrainingArguments works, or one sentence refuses it; the log says what is computed in."""

import json
import os

import pytest
import torch
from toy import Rows, make_trainer, toy_tokenizer
from transformers import Seq2SeqTrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

import train
from captioning import InputError
from captioning.training import arguments, flags, precision


def words(few, folder, *more) -> list[str]:
    return [f"--data_path={few}", f"--output_dir={folder / 'run'}", "--use_cpu", "--dataloader_num_workers=0", *more]


@pytest.fixture
def parsed(few, tmp_path):
    return lambda *more: arguments.training_arguments(*arguments.read(words(few, tmp_path, *more)))


def test_every_flag_of_the_library_is_known():
    """A new version brings new flags: look at each, then put it into one of the groups."""
    groups = [flags.WORKS, flags.HARMLESS.keys(), flags.FIXED.keys(), flags.REFUSED.keys(), flags.OURS]
    assert sorted(name for group in groups for name in group) == sorted(arguments.training_argument_types())
    assert set(flags.OBJECTS) <= flags.REFUSED.keys()


OBJECTS = dict.fromkeys(flags.OBJECTS, "nonsense")
USES = OBJECTS | {
    "include_for_metrics": "loss",
    "include_num_input_tokens_seen": "yes",
    "label_names": "labels",
    "length_column_name": "long",
    "skip_memory_metrics": "False",
}


@pytest.mark.parametrize("name", flags.REFUSED)
def test_flags_without_a_use_are_refused(name, parsed):
    with pytest.raises(InputError, match=f"--{name} has no use here: ") as refused:
        parsed(f"--{name}={USES.get(name, 'True')}")
    assert flags.REFUSED[name] in str(refused.value)


@pytest.mark.parametrize("name", flags.FIXED)
def test_flags_of_one_value_are_refused_with_the_other(name, parsed):
    must = flags.FIXED[name][0]
    parsed(f"--{name}={must}")
    with pytest.raises(InputError, match=f"--{name} {not must} cannot work here"):
        parsed(f"--{name}={not must}")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--eval_accumulation_steps 0", "--eval_accumulation_steps 0 is below 1"),
        ("--eval_delay -1", "--eval_delay -1.0 is below 0"),
        ("--neftune_noise_alpha nan", "--neftune_noise_alpha nan is not between"),
        ("--neftune_noise_alpha 0", "adds no noise"),
        ("--max_grad_norm nan", "--max_grad_norm nan is not between"),
        ("--save_total_limit -1", "--save_total_limit -1 is below 1"),
        ("--warmup_steps nan", "Got warmup_steps|--warmup_steps nan is not between"),
        ("--warmup_steps 1.5", "neither below 1 nor a whole number"),
        ("--logging_steps nan", "--logging_steps nan is not above 0"),
        ("--data_seed -1", "--data_seed -1 is below 0"),
        ("--ddp_timeout 0", "--ddp_timeout 0 is below 1"),
        ("--ddp_backend gloo", "--ddp_backend has no effect with one process"),
        ("--train_sampling_strategy batch_rebalance", "batch_rebalance is none of group_by_length"),
        ("--lr_scheduler_kwargs {bad", "--lr_scheduler_kwargs '{bad' is not a JSON object"),
        ("--lr_scheduler_kwargs nonsense", "is not a JSON object"),
        ('--lr_scheduler_kwargs {"nonsense":1}', "unexpected keyword argument 'nonsense'"),
        (
            "--warmup_steps 5 --lr_scheduler_type constant",
            "--warmup_steps has no effect with --lr_sch",
        ),
        ("--optim sgd --adam_beta1 0.8", "--adam_beta1 has no effect with --optim sgd"),
        ("--optim sgd --optim_args momentum=0.9,momentu=1", "--optim_args 'momentu=1' has no effect with --optim sgd"),
        ("--optim sgd --optim_args nonsense", "--optim sgd cannot be used with --optim_args 'nonsense'"),
        ("--optim_args a=1", "--optim_args 'a=1' has no effect"),
        ("--optim_target_modules all-linear", "--optim_target_modules has no effect with --optim adamw_torch_fused"),
        ("--torch_compile_backend nonsense", "--torch_compile_backend nonsense cannot be used here"),
        ("--torch_compile_mode nonsense", "--torch_compile_mode nonsense cannot be used here: Unrecognized mode"),
        ("--activation_checkpointing --activation_checkpointing_kwargs nonsense", "is not a JSON object"),
        ('--activation_checkpointing --activation_checkpointing_kwargs {"nonsense":1}', "'nonsense' is none of torch"),
        ('--activation_checkpointing_kwargs {"use_reentrant":true}', "no effect with --activation_checkpointing False"),
        ("--report_to nonsense", "--report_to 'nonsense' is unknown; choose from"),
        ("--report_to neptune", "--report_to neptune needs that package"),
        ("--report_to kubeflow", "inside a Kubeflow TrainJob"),
        ("--run_name x", "--run_name has no effect with --report_to none"),
        ("--trackio_space_id a/b", "--trackio_space_id has no effect with"),
        ("--hub_model_id a/b", "--hub_model_id has no effect with --push_to_hub False"),
        ("--dataloader_persistent_workers True", "has no effect with --dataloader_num_workers 0"),
        ("--dataloader_num_workers 1 --dataloader_prefetch_factor 0", "--dataloader_prefetch_factor 0 is below 1"),
        ("--eval_delay 1 --eval_strategy no", "--eval_delay has no effect with --eval_strategy no"),
        ("--tf32 True", "--tf32 requires"),
        ("--fp16", "--fp16 needs a GPU; on a CPU choose --bf16"),
        ("--fp16 --bf16", "fp16"),
    ],
)
def test_flags_without_effect_and_values_that_cannot_be_are_refused(more, message, parsed):
    with pytest.raises(InputError, match=message):
        parsed(*more.split())


@pytest.mark.parametrize("kind", [kind.value for kind in OptimizerNames])
def test_every_optimiser_trains_or_is_one_sentence(kind, parsed):
    try:
        training = parsed(f"--optim={kind}")
    except InputError as error:
        assert f"--optim {kind} " in str(error) and "\n" not in str(error)
        assert not kind.startswith("adamw_torch") or kind.endswith(("xla", "npu_fused", "bit"))
    else:
        assert training.optim == kind


@pytest.mark.parametrize("kind", [kind.value for kind in SchedulerType])
def test_every_schedule_works_or_says_what_it_needs(kind, parsed):
    needed = {"warmup_stable_decay": {"num_decay_steps": 3}}.get(kind, {"min_lr_rate": 0.1} if "min_lr" in kind else {})
    if needed:
        with pytest.raises(InputError, match=f"--lr_scheduler_type {kind} cannot be used.*such as --lr_scheduler_kwa"):
            parsed(f"--lr_scheduler_type={kind}")
    training = parsed(f"--lr_scheduler_type={kind}", f"--lr_scheduler_kwargs={json.dumps(needed)}")
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    get_scheduler(kind, optimiser, 1, 10, training.lr_scheduler_kwargs)


MANY = """
--optim adafactor --lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":2} --max_grad_norm 0.5
--neftune_noise_alpha 2 --activation_checkpointing --activation_checkpointing_kwargs {"use_reentrant":true}
--eval_strategy steps --eval_steps 1 --eval_delay 1 --eval_on_start --eval_accumulation_steps 1 --save_strategy best
--logging_first_step --logging_steps 1 --save_total_limit 1 --full_determinism --data_seed 3
--torch_empty_cache_steps 1 --local_rank 0 --ddp_timeout 60 --log_on_each_node False
--do_train --do_eval --do_predict --max_steps 2 --per_device_train_batch_size 12
"""


def test_many_flags_at_once_do_what_they_say(few, tmp_path, capsys):
    """The working flags that no other test uses, in one training."""
    more = MANY.split()
    try:
        assert train.main(words(few, tmp_path, *more)) == 0
    finally:
        torch.use_deterministic_algorithms(False)
        for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
            os.environ.pop(name, None)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    said = capsys.readouterr().err
    assert results["step"] in (0, 1, 2) and said.count("validation loss") == 3
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1


def test_saving_the_best_alone_evaluates_each_epoch(parsed):
    training = parsed("--save_strategy=best")
    assert (training.eval_strategy, training.save_strategy) == ("epoch", "best")


def test_noise_on_the_embeddings_changes_the_update(tmp_path):
    tokenizer = toy_tokenizer()
    rows = Rows(tokenizer, 4)
    losses = []
    for settings in ({}, {"neftune_noise_alpha": 20.0}):
        trainer = make_trainer(tokenizer, rows, tmp_path, max_steps=1, logging_steps=1, **settings)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert losses[0] != losses[1]


# ---- sharding


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_accelerate_s_sharding_is_refused_at_the_start(name, few, tmp_path, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=r"accelerate was asked for .*: train\.py does not spread one model"):
        train.main(words(few, tmp_path))
    assert not (tmp_path / "run").exists()


# ---- precision


@pytest.mark.parametrize(
    ("given", "launcher", "expected"),
    [
        ({}, None, None),
        ({"--bf16": ""}, None, ("bf16", "--bf16")),
        ({"--bf16": "False"}, None, ("no", "--bf16 False")),
        ({"--fp16": "True"}, "no", ("fp16", "--fp16")),
        ({"--fp16": "False"}, None, None),
        ({}, "no", ("no", "accelerate's --mixed_precision no")),
        ({}, "bf16", ("bf16", "accelerate's --mixed_precision bf16")),
        ({"--fp16": "False"}, "bf16", ("bf16", "accelerate's --mixed_precision bf16")),
        ({"--bf16": "True"}, "bf16", ("bf16", "--bf16")),
    ],
)
def test_the_precision_is_the_one_that_was_asked_for(given, launcher, expected):
    assert precision.asked(given, {} if launcher is None else {precision.LAUNCHER: launcher}) == expected


@pytest.mark.parametrize(
    ("given", "launcher"), [({"--bf16": "False"}, "bf16"), ({"--bf16": "True"}, "fp16"), ({"--fp16": "False"}, "fp16")]
)
def test_two_precisions_are_refused(given, launcher):
    with pytest.raises(InputError, match=f"--mixed_precision {launcher} and --.* say two things"):
        precision.asked(given, {precision.LAUNCHER: launcher})


def test_a_precision_of_accelerate_that_we_lack_is_refused():
    with pytest.raises(InputError, match="fp8 is none of bf16, fp16, no"):
        precision.asked({}, {precision.LAUNCHER: "fp8"})


@pytest.mark.parametrize("launcher", ["no", "bf16", "fp16"])
def test_the_launcher_s_precision_runs_or_is_refused(launcher, parsed, monkeypatch):
    monkeypatch.setenv(precision.LAUNCHER, launcher)
    if launcher == "fp16":
        with pytest.raises(InputError, match="--mixed_precision fp16 needs a GPU"):
            parsed()
        return
    training = parsed()
    assert (training.bf16, training.mixed_precision) == (launcher == "bf16", launcher)


@pytest.mark.parametrize("capable", [True, False])
def test_use_cpu_changes_nothing_where_there_is_no_gpu(capable, few, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    own = [f"--data_path={few}", f"--output_dir={tmp_path / 'run'}"]
    for more in ([], ["--use_cpu"]):
        assert arguments.training_arguments(*arguments.read([*own, *more])).bf16 == capable


def test_a_run_goes_on_in_the_precision_that_it_began_with(tmp_path):
    training = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to="none")
    state = {"stateful_callbacks": {"Resumed": {"attributes": {"precision": "float32"}}}}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert precision.settle(training, precision.Wish("bf16", "--bf16"), tmp_path) == "bfloat16 (--bf16)"
    assert precision.settle(training, None, tmp_path) == "float32 (as the run began)"
    assert (training.bf16, training.mixed_precision, precision.of(training)) == (False, "no", torch.float32)


@pytest.mark.parametrize("kept", [[], None, {"Resumed": []}, {"Resumed": {"attributes": 3}}])
def test_a_strange_checkpoint_tells_no_precision(kept, tmp_path):
    training = Seq2SeqTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True, report_to="none")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"stateful_callbacks": kept}))
    assert precision.settle(training, None, tmp_path).startswith("bfloat16 (this processor")


def test_a_checkpoint_keeps_the_precision_and_the_log_tells_it(few, tmp_path, capsys):
    more = ["--max_steps=1", "--per_device_train_batch_size=24", "--bf16=True"]
    train.main(words(few, tmp_path, *more))
    assert "precision: bfloat16 (--bf16); final scores in float32" in capsys.readouterr().err
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["Resumed"]["attributes"]["precision"] == "bfloat16"
