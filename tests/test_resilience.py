"""What a training lives through: kills, stops, full disks, too little memory, a loss of nan, processes that go."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, contents, script
from datasets import load_from_disk
from forked import FORKS, Training, several
from safetensors import SafetensorError
from safetensors.torch import load_file
from toy import Rows, make_trainer, toy_tokenizer

import train
from captioning import InputError
from captioning.files import lock
from captioning.training import resilience
from captioning.training.resumable import flags_for


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


UPDATES = 9  # of three epochs
KILLS = 10


def arguments(data, folder, *more):
    return [
        f"--data_path={data}",
        f"--output_dir={folder}",
        "--epochs=3",
        "--per_device_train_batch_size=8",
        "--generation_max_length=8",
        "--save_total_limit=10",
        "--logging_steps=1",
        "--use_cpu",
        "--bf16=False",
        "--dataloader_num_workers=1",
        *more,
    ]


def finished(arguments: list, log: Path) -> None:
    run = Training(arguments, log)
    assert run.wait() == 0, run.said()


@pytest.fixture(scope="module")
def undisturbed(few, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    finished(arguments(few, folder / "run"), folder / "log")
    return folder / "run"


def assert_as_undisturbed(folder: Path, undisturbed: Path) -> None:
    """The same weights to the last bit, the same scores and the same captions."""
    for name in ("model.safetensors", f"checkpoint-{UPDATES}/model.safetensors", "predictions_test.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes(), name
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (folder, undisturbed))
    for key in ("step", "checkpoint", "validation", "test"):
        assert ours[key] == theirs[key]
    assert not [path for path in folder.rglob("*") if path.name == ".lock" or path.name.startswith(".part")]
    assert resilience.newest_checkpoint(folder).name == f"checkpoint-{UPDATES}"


def whole_steps(folder: Path) -> list[int]:
    return sorted(int(p.name[11:]) for p in folder.glob("checkpoint-*") if resilience.damage(p) is None)


# ---- what a process of train.py can be made to do to itself


def killed_at(file: str, step: int):
    """Die in the middle of writing a file of the checkpoint of a step."""
    from transformers import TrainerState

    from captioning.training.trainer import CaptionTrainer

    def half(write, path_of):
        def written(self_or_content, *rest, **named):
            result = write(self_or_content, *rest, **named)
            path = Path(path_of(self_or_content, *rest))
            if path.name == file and path.parent.name == f"checkpoint-{step}":
                with path.open("r+b") as content:
                    content.truncate(path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return written

    CaptionTrainer._save = half(CaptionTrainer._save, lambda trainer, folder, *rest: Path(folder, "model.safetensors"))
    torch.save = half(torch.save, lambda content, path, *rest: path)
    TrainerState.save_to_json = half(TrainerState.save_to_json, lambda state, path: path)


def signalled(where: str, step: int, *numbers: int):
    """Send itself signals while it is in a method of the trainer, after so many updates."""
    from captioning.training.trainer import CaptionTrainer

    method = getattr(CaptionTrainer, where)
    left = list(numbers)

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == step and self.is_in_train:
            while left:
                os.kill(os.getpid(), left.pop(0))
        return method(self, *args, **kwargs)

    setattr(CaptionTrainer, where, interrupted)


def no_room(size: int, step: int | None):
    """Files can grow to so many bytes, from the checkpoint of a step on; None: from the end of training on."""
    from captioning.model import captioner
    from captioning.training.trainer import CaptionTrainer

    def limited(write, *args, **kwargs):
        if step is None or args[0].state.global_step == step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        return write(*args, **kwargs)

    if step is None:
        captioner.save = functools.partial(limited, captioner.save)
    else:
        CaptionTrainer._save_checkpoint = functools.partialmethod(
            lambda self, write, *args: limited(write, self, *args), CaptionTrainer._save_checkpoint
        )


# ---- kills


def test_a_run_killed_while_it_writes_checkpoints_ends_as_an_undisturbed_one(few, undisturbed, tmp_path):
    folder = tmp_path / "run"
    resume = "--resume_from_checkpoint=auto"
    left = {0: [], 1: [3], 2: [3, 6]}
    moments = [("model.safetensors", 3), ("optimizer.pt", 6), ("trainer_state.json", 9)]
    for number, (file, step) in enumerate(moments):
        run = Training(
            arguments(few, folder, *[resume] * (number > 0)), tmp_path / "log", functools.partial(killed_at, file, step)
        )
        assert run.wait() == -signal.SIGKILL, run.said()
        assert (folder / f"checkpoint-{step}" / "model.safetensors").exists()
        assert whole_steps(folder) == left[number], "half-written ones are recognised"
    run = Training(arguments(few, folder, f"--resume_from_checkpoint={folder / 'checkpoint-6'}"), tmp_path / "log")
    assert run.wait() == 0, run.said()
    assert f"going on from {folder / 'checkpoint-6'}" in run.said()
    assert_as_undisturbed(folder, undisturbed)


def slow_disk():
    """So that many a random moment is one in which a checkpoint is being written."""
    write = torch.save

    def slowly(*args, **kwargs):
        write(*args, **kwargs)
        time.sleep(0.1)

    torch.save = slowly


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(few, tmp_path):
    often = ["--save_strategy=steps", "--save_steps=1", "--eval_strategy=no", "--load_best_model_at_end=False"]
    often += ["--epochs=20", "--save_total_limit=2"]
    undisturbed, folder = tmp_path / "undisturbed", tmp_path / "run"
    finished(arguments(few, undisturbed, *often), tmp_path / "log")
    chance = random.Random(0)
    kills = halves = 0
    while kills < KILLS:
        begun = Training(arguments(few, folder, *often, "--resume_from_checkpoint=auto"), tmp_path / "log", slow_disk)
        begun.until(lambda run=begun: "padding: " in run.said())
        begun.process.join(chance.uniform(0, 3))
        assert begun.process.is_alive(), "it came to its end before it was killed often enough"
        begun.kill()
        kills += 1
        halves += len(list(folder.glob("checkpoint-*"))) > len(whole_steps(folder))
    reached = max(whole_steps(folder))
    finished(arguments(few, folder, *often, "--resume_from_checkpoint=auto"), tmp_path / "log")
    for name in ("model.safetensors", "predictions_test.json"):
        assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    print(f"{kills} kills survived, {halves} of them within a checkpoint; the last one after update {reached}")


# ---- stops


def test_a_run_stopped_by_signals_ends_as_an_undisturbed_one(few, undisturbed, tmp_path):
    folder = tmp_path / "run"
    stops = [
        # where, after how many updates, signals, the whole checkpoints then
        ("training_step", 1, [signal.SIGINT], [2]),
        ("training_step", 4, [signal.SIGINT, signal.SIGINT], [2, 3]),  # twice: at once, without a checkpoint
        ("prediction_step", 6, [signal.SIGTERM], [2, 3, 6]),  # the evaluation is left to the next run
        ("prediction_step", 6, [signal.SIGINT], [2, 3, 6]),  # ... which is stopped in it, too
        ("training_step", 8, [signal.SIGINT], [2, 3, 6, 9]),  # the last update, before the last evaluation
    ]
    for number, (where, step, signals, left) in enumerate(stops):
        resume = ["--resume_from_checkpoint=auto"] * (number > 0)
        before = functools.partial(signalled, where, step, *signals)
        run = Training(arguments(few, folder, *resume), tmp_path / "log", before)
        assert run.wait() == 130, run.said()
        assert whole_steps(folder) == left
        last = run.said().rstrip().splitlines()[-1]
        assert last == f"stopped; go on from checkpoint-{left[-1]} with --resume_from_checkpoint auto"
        assert "Traceback" not in run.said() and "stopping, with a checkpoint" in run.said()
    finished(arguments(few, folder, "--resume_from_checkpoint=auto"), tmp_path / "log")
    assert_as_undisturbed(folder, undisturbed)
    states = [json.loads((p / "checkpoint-9" / "trainer_state.json").read_text()) for p in (undisturbed, folder)]
    assert states[0]["best_metric"] == pytest.approx(states[1]["best_metric"], nan_ok=True) or states[1]["epoch"] == 3


def group_signalled(number: int):
    """As a terminal does on Ctrl-C, or a launcher: the signal goes to the data workers too."""
    from captioning.training.trainer import CaptionTrainer

    os.setpgrp()  # not to reach the tests themselves
    method = CaptionTrainer.training_step
    left = [number]

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 1 and left:
            os.killpg(0, left.pop())
            time.sleep(0.2)  # a worker that it reached would be gone by now
        return method(self, *args, **kwargs)

    CaptionTrainer.training_step = interrupted


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_leaves_the_data_workers_to_finish_the_update(few, tmp_path, number):
    more = ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=4"]
    before = functools.partial(group_signalled, number)
    run = Training(arguments(few, tmp_path / "run", *more), tmp_path / "log", before)
    assert run.wait() == 130, run.said()
    assert whole_steps(tmp_path / "run") == [2] and "Traceback" not in run.said()


# ---- full disks


def test_a_full_disk_is_named_and_costs_nothing_that_was_written(few, undisturbed, tmp_path):
    folder = tmp_path / "run"
    weights = (undisturbed / "model.safetensors").stat().st_size
    moments = [
        # bytes that still fit, before which checkpoint (None: the model at the end), the whole checkpoints then
        (weights // 2, 3, [], "start again"),
        (weights + 100_000, 6, [3], "go on from checkpoint-3 with --resume_from_checkpoint auto"),
        (weights // 2, None, [3, 6, 9], "go on from checkpoint-9 with --resume_from_checkpoint auto"),
        (100_000, None, [3, 6, 9], "go on from checkpoint-9 with --resume_from_checkpoint auto"),
    ]
    for size, step, left, remedy in moments:
        before = functools.partial(no_room, size, step)
        run = Training(arguments(few, folder, "--resume_from_checkpoint=auto"), tmp_path / "log", before)
        assert run.wait() == 2, run.said()
        last = run.said().rstrip().splitlines()[-1]
        assert last.startswith(f"train.py: error: '{folder}' could not be written (") and last.endswith(remedy), last
        assert "Traceback" not in run.said()
        assert whole_steps(folder) == left
        assert len(list(folder.glob("checkpoint-*"))) == len(left), "what was half written is gone"
        assert not (folder / "model.safetensors").exists()
    finished(arguments(few, folder, "--resume_from_checkpoint=auto"), tmp_path / "log")
    assert_as_undisturbed(folder, undisturbed)


# ---- checkpoints


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("trainer_state.json", "it has no whole trainer_state.json"),
        ("model.safetensors", "its model"),
        ("optimizer.pt", "its optimizer"),
        ("scheduler.pt", "its scheduler"),
        ("rng_state.pth", "its rng_state"),
    ],
)
def test_a_checkpoint_with_a_file_missing_or_cut_short_is_not_whole(undisturbed, tmp_path, file, said):
    checkpoint = shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    assert resilience.damage(checkpoint) is None
    size = (checkpoint / file).stat().st_size
    for left in (size - 2, size // 2, 0):  # the state's last byte is the end of its line
        os.truncate(checkpoint / file, left)
        assert resilience.damage(checkpoint).startswith(said)
    (checkpoint / file).unlink()
    assert resilience.damage(checkpoint).startswith(said)


def test_a_checkpoint_that_fails_takes_no_earlier_one_with_it(undisturbed, tmp_path):
    """Written again from an earlier one, with other settings: half old and half new must not pass for whole."""
    checkpoint = shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    with resilience.whole_checkpoint(checkpoint):
        assert resilience.damage(checkpoint)
        shutil.copy(undisturbed / "checkpoint-3" / resilience.STATE, checkpoint)
    assert resilience.damage(checkpoint) is None
    with pytest.raises(OSError), resilience.whole_checkpoint(checkpoint):
        raise OSError
    assert not checkpoint.exists()


def test_a_checkpoint_that_says_less_is_continued_with_flags_that_it_does_not_know(few, undisturbed, tmp_path):
    """One of an earlier version, with --patience and --eval_on_start added: the end is that of an undisturbed run."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint-9")
    file = folder / "checkpoint-6" / resilience.STATE
    state = json.loads(file.read_text())
    assert state["stateful_callbacks"].pop("Resumed")
    file.write_text(json.dumps(state))
    more = ["--resume_from_checkpoint=auto", "--patience=2", "--eval_on_start"]
    finished(arguments(few, folder, *more), tmp_path / "log")
    assert_as_undisturbed(folder, undisturbed)
    state = json.loads((folder / "checkpoint-9" / resilience.STATE).read_text())
    evaluated = [entry["step"] for entry in state["log_history"] if "eval_loss" in entry]
    assert evaluated == [3, 6, 9], "it is not at its start, and patience counts no evaluation twice"
    kept = {name: state["stateful_callbacks"][name]["attributes"] for name in ("Patience", "Resumed")}
    assert kept["Patience"]["early_stopping_patience_counter"] <= 1
    assert kept["Resumed"]["images_per_update"] == 8 and kept["Resumed"]["--decoder_lr"] == "0.001"


def test_a_stop_in_the_evaluation_before_the_first_update_is_a_stop(few, tmp_path):
    before = functools.partial(signalled, "prediction_step", 0, signal.SIGTERM)
    run = Training(arguments(few, tmp_path / "run", "--eval_on_start"), tmp_path / "log", before)
    assert run.wait() == 130, run.said()
    assert run.said().endswith("\nstopped\n") and "Traceback" not in run.said()


def test_patience_and_the_end_are_where_the_checkpoint_left_them(few, tmp_path):
    folder, log, resume = tmp_path / "run", tmp_path / "log", "--resume_from_checkpoint=auto"
    common = ["--epochs=5", "--metric_for_best_model=loss", "--greater_is_better=True", "--patience=2"]
    finished(arguments(few, folder, *common), log)
    steps = whole_steps(folder)
    before = (folder / "model.safetensors").read_bytes()
    assert steps == [3, 6, 9], "the highest loss is the first; two more should have ended it"
    shutil.rmtree(folder / "checkpoint-9")
    finished(arguments(few, folder, *common, resume), log)
    assert whole_steps(folder) == steps, "no update more or less than without the interruption"
    finished(arguments(few, folder, *common, resume), log)
    assert whole_steps(folder) == steps, "nor after its end"
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_run_of_half_an_epoch_is_not_trained_further_when_resumed(few, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    command = [word for word in arguments(few, folder, "--max_steps=4") if not word.startswith("--epochs")]
    finished(command, log)
    before = (folder / "model.safetensors").read_bytes()
    finished([*command, "--resume_from_checkpoint=auto"], log)
    assert max(whole_steps(folder)) == 4
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changed", "reason"),
    [(["--freeze_encoder"], "other parts being trained"), (["--data_path"], "with other data")],
    ids=["frozen encoder", "other data"],
)
def test_a_run_goes_on_as_it_began_or_not_at_all(changed, reason, undisturbed, few, prepared, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed, folder)
    more = [f"--data_path={prepared}"] if changed == ["--data_path"] else changed
    before = contents(folder)
    with pytest.raises(InputError, match=rf"{reason}.*; start a new one from it with --model_path '.*checkpoint-9'"):
        train.main([*arguments(few, folder, "--epochs=5", "--resume_from_checkpoint=auto"), *more])
    assert contents(folder) == before


ALL = "--cross_attention_lr {0} --decoder_lr {0} --encoder_lr {0}"


@pytest.mark.parametrize(
    ("changed", "before", "now", "keep"),
    [
        ("--decoder_lr=5e-5", "--decoder_lr 0.001", "--decoder_lr 5e-05", None),
        ("--learning_rate=5e-4", ALL.format("0.001"), ALL.format("0.0005"), None),
        ("--weight_decay=0", "--weight_decay 0.01", "--weight_decay 0.0", None),
        ("--optim=sgd", "--optim adamw_torch_fused", "--optim sgd", None),
        ("--adam_beta2=0.9", "--adam_beta2 0.98", "--adam_beta2 0.9", None),
        ("--per_device_train_batch_size=4", "8 images per update", "4", "--gradient_accumulation_steps 2"),
        ("--per_device_train_batch_size=16", "8 images per update", "16", "--per_device_train_batch_size 8"),
    ],
)
def test_a_run_goes_on_with_its_rates_and_its_updates(changed, before, now, keep, undisturbed, few, tmp_path):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    with pytest.raises(InputError) as refused:
        train.main(arguments(few, folder, "--epochs=5", "--resume_from_checkpoint=auto", changed))
    checkpoint = folder / "checkpoint-9"
    assert str(refused.value) == (
        f"'{checkpoint}' is of a run with {before}, not {now}, and a run goes on as it began; give {keep or before}, "
        f"or start a new one from it with --model_path '{checkpoint}' and another --output_dir"
    )


@pytest.mark.parametrize(
    ("size", "accumulation", "processes", "remedy"),
    [
        (4, 1, 1, "give --gradient_accumulation_steps 6"),  # one of two machines died
        (12, 3, 1, "give --gradient_accumulation_steps 2"),
        (5, 4, 3, "give --per_device_train_batch_size 2"),
        (5, 5, 2, "give --per_device_train_batch_size 12 --gradient_accumulation_steps 1"),
        (4, 1, 5, "start another number of processes than 5, which cannot share them evenly"),
    ],
)
def test_what_keeps_the_images_of_an_update(size, accumulation, processes, remedy):
    now = SimpleNamespace(train_batch_size=size, gradient_accumulation_steps=accumulation, world_size=processes)
    assert flags_for(24, now) == remedy


# ---- one run for one folder


def hold(path, held):
    with lock(path, wait=False) as alone:
        assert alone
        held.set()
        time.sleep(60)


def test_a_second_training_into_the_same_folder_is_refused(few, tmp_path):
    held = FORKS.Event()
    folder = tmp_path / "run"
    first = FORKS.Process(target=hold, args=(folder / ".lock", held))
    first.start()
    assert held.wait(60)
    with pytest.raises(InputError, match=r"--output_dir '.*run' belongs to a training that is running; name another"):
        train.main(arguments(few, folder))
    first.kill()  # the hold goes with it
    first.join()
    with train.only_run_in(folder, SimpleNamespace(process_index=0)):
        assert folder.exists()
    assert not folder.exists(), "nothing else was in it"


# ---- losses that are not finite


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_of_nan_names_the_step_and_its_images(tokenizer, tmp_path, accumulation, monkeypatch):
    rows = Rows(tokenizer, 16)
    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=1,
        logging_steps=100,
    )
    seen = []
    compute = trainer.compute_loss

    def spoilt(model, inputs, **kwargs):
        seen.append(inputs["image_id"].tolist())
        return compute(model, inputs, **kwargs) * (float("nan") if len(seen) == 5 else 1.0)

    monkeypatch.setattr(trainer, "compute_loss", spoilt)
    step = -(-5 // accumulation)
    with pytest.raises(InputError) as stopped:
        trainer.train()
    assert f"the loss became nan at step {step}, with {', '.join(f'image {i}' for i in seen[4])};" in str(stopped.value)
    assert len(seen) == 5 and max(whole_steps(tmp_path)) == step - 1


class OnDevice:
    """A loss as on an accelerator: known to the host when the device has come to it, and not earlier."""

    def __init__(self, value):
        self.value = torch.tensor(value)
        self.device = torch.device("cuda")

    def detach(self):
        return self

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        return self.value


def test_an_accelerator_is_never_waited_for_at_the_step_that_it_computes(monkeypatch):
    waits = []

    class Event:
        def __init__(self, device):
            self.number = len(events)
            events.append(self)

        def record(self):
            pass

        def synchronize(self):
            waits.append((self.number, len(events)))

    events: list = []
    monkeypatch.setattr(torch, "Event", Event)
    watch = resilience.LossWatch()
    ids = [torch.arange(10 * n, 10 * n + 20) for n in range(4)]
    for number in range(3):
        watch(OnDevice(float("inf") if number == 2 else 1.0), number + 1, ids[number])
    assert waits == [(0, 1), (1, 2)], "each loss is looked at when the next one comes"
    with pytest.raises(InputError, match=r"inf at step 3, with image 20, image 21, .*, image 35 and 4 more; lower"):
        watch(OnDevice(1.0), 4, ids[3])
    watch(OnDevice(float("nan")), 5, ids[3])
    with pytest.raises(InputError, match="became nan at step 5"):
        watch.check()
    watch.check()


# ---- memory


@pytest.mark.parametrize(
    ("error", "where", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            "compute_loss",
            "in training; lower --per_device_train_batch_size (now 4) and raise --gradient_accumulation_steps (now 1)",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: "),
            "compute_loss",
            "in training; lower --per_device_train_batch_size (now 4)",
        ),
        (MemoryError(), "compute_loss", "in training; lower --per_device_train_batch_size (now 4)"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
            "prediction_step",
            "in evaluation; lower --per_device_eval_batch_size (now 8)",
        ),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
            "compute_loss",
            "no memory for the data workers: lower --dataloader_num_workers (now 0)",
        ),
    ],
)
def test_out_of_memory_says_what_to_change(tokenizer, tmp_path, monkeypatch, error, where, said):
    rows = Rows(tokenizer, 8)
    trainer = make_trainer(
        tokenizer, rows, tmp_path, max_steps=2, per_device_train_batch_size=4, eval_strategy="steps", eval_steps=1
    )

    def fails(*args, **kwargs):
        raise error

    monkeypatch.setattr(trainer, where, fails)
    with pytest.raises(InputError) as stopped, resilience.explained(trainer.args):
        trainer.train()
    assert said in str(stopped.value) and "\n" not in str(stopped.value)


def little_memory(attribute: str):
    """The process gets 200 MB more than it has by then."""
    from captioning.training.trainer import CaptionTrainer

    method = getattr(CaptionTrainer, attribute)

    def limited(self, *args, **kwargs):
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20, resource.RLIM_INFINITY))
        return method(self, *args, **kwargs)

    setattr(CaptionTrainer, attribute, limited)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="only Linux counts and limits a process's memory so")
def test_a_real_lack_of_memory_is_explained(tmp_path):
    data = tmp_path / "data"
    made = script(
        "dataloader.py", "--sample", "--limit_data=40", "--encoder=small", "--decoder=tiny", f"--save_path={data}"
    )
    assert made.returncode == 0, made.stderr
    more = ["--per_device_train_batch_size=24", "--dataloader_num_workers=0"]
    before = functools.partial(little_memory, "training_step")
    run = Training(arguments(data, tmp_path / "run", *more), tmp_path / "log", before)
    assert run.wait() == 2, run.said()
    assert run.said().rstrip().splitlines()[-1].startswith("train.py: error: out of memory in training; lower")
    assert "Traceback" not in run.said()


def test_a_full_disk_is_known_by_each_librarys_words_for_it(tokenizer, tmp_path):
    training = make_trainer(tokenizer, Rows(tokenizer, 2), tmp_path).args
    for error in (
        OSError(28, "No space left on device"),
        Exception("No space left on device (os error 28)"),  # tokenizers
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/0"),
    ):
        with pytest.raises(InputError, match=r"could not be written \(.*\); make room"), resilience.explained(training):
            raise error


def test_errors_of_another_kind_pass(tokenizer, tmp_path):
    training = make_trainer(tokenizer, Rows(tokenizer, 2), tmp_path).args
    for error in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), PermissionError(13, "no"), ValueError()):
        with pytest.raises(type(error)), resilience.explained(training):
            raise error


# ---- several processes


def without_dropout():
    """Each process draws its own dropout, which would hide whether all else is the same."""
    from captioning.model import captioner

    assemble = captioner.assemble

    def assembled(*args):
        net, new = assemble(*args)
        for module in net.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return net, new

    captioner.assemble = assembled


def test_one_two_and_three_processes_train_to_the_same_weights_and_scores(few, tmp_path):
    """23 images: no number of processes above one can share them evenly."""
    splits = load_from_disk(str(few))
    data = tmp_path / "data"
    shutil.copytree(few, data)
    shutil.rmtree(data / "train")
    splits["train"].select(range(23)).save_to_disk(str(data / "train"))
    found = {}
    for count in (1, 2, 3):
        folder = tmp_path / str(count)
        more = [f"--per_device_train_batch_size={12 // count}", "--epochs=2", "--dataloader_num_workers=0"]
        more += ["--per_device_eval_batch_size=3", "--max_grad_norm=0"]
        runs = several(count, arguments(data, folder, *more), tmp_path / f"logs{count}", without_dropout)
        assert [run.wait() for run in runs] == [0] * count, "\n".join(run.said() for run in runs)
        assert f"{count} process(es)" in runs[0].said() and "12 images per update" in runs[0].said()
        assert all("cider_d" not in run.said() for run in runs[1:]), "one process speaks for all"
        results = json.loads((folder / "results.json").read_text())
        predictions = json.loads((folder / "predictions_test.json").read_text())
        state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
        found[count] = (state["global_step"], predictions, results, load_file(folder / "model.safetensors"))
    steps, predictions, results, weights = found[1]
    assert steps == 4
    for count in (2, 3):
        assert found[count][0] == steps and found[count][1] == predictions
        for split in ("validation", "test"):
            ours, theirs = dict(found[count][2][split]), dict(results[split])
            assert ours.pop("signature") == theirs.pop("signature")
            intervals, expected = ours.pop("intervals"), theirs.pop("intervals")
            assert ours == pytest.approx(theirs, rel=1e-4)
            assert all(intervals[name] == pytest.approx(expected[name], rel=1e-4) for name in expected)
        for name, weight in weights.items():
            # Adam turns a rounding of a gradient near zero into a part of a step, which is 1e-3.
            difference = (found[count][3][name] - weight).abs()
            assert difference.mean() < 5e-5 and difference.max() < 5e-4, name


def last_one(ends: str):
    if os.environ["RANK"] != "2":
        return
    if ends == "killed":
        signalled("training_step", 1, signal.SIGKILL)
        return
    from captioning.training import batches

    def decode(*args):
        raise InputError("image 7 of the prepared data cannot be read")

    batches.CaptionDataset.image = decode


@pytest.mark.parametrize(("ends", "code"), [("killed", -signal.SIGKILL), ("with an error", 2)])
def test_processes_stop_when_one_ends(few, tmp_path, ends, code):
    more = ["--per_device_train_batch_size=4", "--epochs=1", "--dataloader_num_workers=0"]
    before = functools.partial(last_one, ends)
    runs = several(3, arguments(few, tmp_path / "run", *more), tmp_path / "logs", before)
    assert runs[2].wait() == code
    for rank in (0, 1):
        assert runs[rank].wait(30) == 2, runs[rank].said()
        last = runs[rank].said().rstrip().splitlines()[-1]
        assert f"process {rank} lost another process of this run, which ended" in last, runs[rank].said()
    if code == 2:
        assert runs[2].said().endswith("train.py: error: image 7 of the prepared data cannot be read\n")


def sees_no_checkpoint():
    if os.environ["RANK"] == "1":
        from captioning.training.arguments import Arguments

        Arguments.checkpoint = lambda self: None


def test_processes_that_begin_with_other_checkpoints_are_refused(undisturbed, few, tmp_path):
    """As two machines do whose --output_dir is a folder of their own."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    step = max(whole_steps(folder))
    words = arguments(few, folder, "--resume_from_checkpoint=auto")
    runs = several(2, words, tmp_path / "logs", sees_no_checkpoint)
    assert [run.wait() for run in runs] == [2, 2], runs[0].said()
    for run in runs:
        assert f"process 1 begins with another update than process 0 (0, not {step}); --output_dir has" in run.said()


def multiplies_in_bfloat16_or_not():
    from captioning.model import fast

    fast.multiplies_in_bfloat16 = lambda: os.environ["RANK"] == "1"


def test_machines_of_two_precisions_are_refused(few, tmp_path):
    words = [word for word in arguments(few, tmp_path / "run") if word != "--bf16=False"]
    runs = several(2, words, tmp_path / "logs", multiplies_in_bfloat16_or_not)
    assert [run.wait() for run in runs] == [2, 2], runs[0].said()
    for run in runs:
        assert "process 1 would train in bfloat16 and process 0 in float32, as their machines compute; " in run.said()
        assert run.said().endswith("give --bf16 or --bf16 False to all of them\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_under_a_launcher_a_death_ends_all_and_ctrl_c_leaves_a_checkpoint(few, tmp_path):
    folder = tmp_path / "run"
    more = ["--per_device_train_batch_size=4", "--epochs=40", "--save_total_limit=2", "--generation_num_beams=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]

    def started(*resume):
        command = map(str, [*launch, *arguments(few, folder, *more, *resume)])
        return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)

    def come_to(step):
        deadline = time.monotonic() + 240
        while max(whole_steps(folder), default=0) < step:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)

    run = started()
    come_to(3)
    workers = [child for child in psutil.Process(run.pid).children() if "train.py" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    killed = time.monotonic()
    _, said = run.communicate(timeout=120)
    print(f"all ended {time.monotonic() - killed:.1f} s after one was killed")
    assert run.returncode != 0 and "process 0 lost another process of this run" in said, said
    assert not any(worker.is_running() for worker in workers)

    run = started("--resume_from_checkpoint=auto")
    come_to(max(whole_steps(folder)) + 3)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=120)
    assert run.returncode != 0
    newest = resilience.newest_checkpoint(folder).name
    assert f"stopped; go on from {newest} with --resume_from_checkpoint auto" in said
    assert (folder / newest / "rng_state_1.pth").exists()
