"""What several test files share: the scripts as a user runs them, and one small prepared data set."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A test must never depend on a hub, nor wait for one.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is remembered of folders goes with the tests; matplotlib's list of fonts, which takes seconds to make, does not.
CACHE = tempfile.TemporaryDirectory(prefix="captioning-tests-")
os.environ["MPLCONFIGDIR"] = str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "matplotlib").expanduser())
os.environ["XDG_CACHE_HOME"] = CACHE.name


def script(name: str, *arguments, timeout: float = 900) -> subprocess.CompletedProcess:
    """Run a script of the top level as a user does, in a process of its own."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def run(name: str, arguments: list, monkeypatch) -> int:
    """Run a script in this process, as its last line does; returns the exit code."""
    from captioning import cli

    main = importlib.import_module(name).main
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(lambda: main(list(map(str, arguments))))
    return stopped.value.code or 0


def hears_ctrl_c() -> None:
    """A `preexec_fn`: as from a terminal, even where the tests run in the background, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def caller(model, capsys):
    """A function that calls inference.py in this process; it returns (exit code, stdout, stderr)."""

    def call(*arguments):
        import inference

        code = inference.main([f"--model_path={model}", "--device=cpu", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shared_folder() -> Path | None:
    """Real images and weights, where there are some: $CAPTIONING_SHARED, by default ../shared."""
    folder = Path(os.environ.get("CAPTIONING_SHARED", ROOT.parent / "shared"))
    return folder if folder.is_dir() else None


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = shared_folder()
    if folder is None:
        pytest.skip("needs real images and weights: set CAPTIONING_SHARED to the folder that holds coco2014/")
    return folder


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """The drawn sample data set, prepared for the tiny presets by `dataloader.py` as a user would run it."""
    folder = tmp_path_factory.mktemp("prepared") / "processed_data"
    done = script("dataloader.py", "--sample", "--encoder=tiny", "--decoder=tiny", f"--save_path={folder}")
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def few(prepared, tmp_path_factory) -> Path:
    """24 training images, 4 for validation and 4 for the test of `prepared`: a training of seconds."""
    return first_images(prepared, tmp_path_factory.mktemp("few") / "processed_data", train=24, validation=4, test=4)


def first_images(prepared: Path, folder: Path, **counts: int) -> Path:
    """A copy of a prepared folder with only so many images of some splits."""
    from datasets import load_from_disk

    splits = load_from_disk(str(prepared))
    for split, count in counts.items():
        splits[split] = splits[split].select(range(count))
    splits.save_to_disk(str(folder))
    for file in prepared.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory) -> Path:
    """A run folder of a tiny model with random weights, where it does not matter what the captions say: seconds."""
    from toy import toy_tokenizer
    from transformers import set_seed

    from captioning.model import captioner, parts

    folder = tmp_path_factory.mktemp("untrained") / "run"
    folder.mkdir()
    set_seed(0)
    tokenizer = toy_tokenizer()
    model = captioner.build("tiny", "tiny", tokenizer)
    model.generation_config.max_new_tokens = 8
    # Random weights would write half letters and control characters too.
    words = [
        not text.strip().isalpha() for text in tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    ]
    model.generation_config.suppress_tokens = [token for token, odd in enumerate(words) if odd and token]
    captioner.save(captioner.Bundle(model, tokenizer, parts.load_image_processor("tiny")), folder)
    return folder


@pytest.fixture(scope="session")
def trained(prepared, tmp_path_factory) -> Path:
    """A run folder after two epochs, made by `train.py` as a user would run it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = script(
        "train.py",
        f"--data_path={prepared}",
        f"--output_dir={folder}",
        "--epochs=2",
        "--learning_rate=1e-3",
        "--per_device_train_batch_size=64",
        "--bf16=False",  # what inference.py computes in
    )
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout.txt").write_text(done.stdout)
    (folder.parent / "stderr.txt").write_text(done.stderr)
    return folder
