"""Flags: a dataclass of them, dashes and underscores, hints for what people type, and one sentence for an error."""

import gc
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, script

import dataloader
import inference
import train
from captioning import InputError, cli
from captioning.cli import flag
from captioning.training import arguments


@dataclass(frozen=True)
class Arguments:
    limit_data: int = flag(2000, "which", "images in all; 0: every image, 100 % of them", metavar="N")
    words: list[str] | None = flag(None, "which", "several")
    share: float = flag(0.0, "which", "or all", nargs="?", const=1.0)
    folder: Path = flag(Path("here"), "where", "a folder")
    packing: bool = flag(True, "how", "pack")
    quick: bool = flag(False, "how", "quickly")

    def __post_init__(self):
        if self.limit_data < 0:
            raise InputError(f"--limit_data {self.limit_data} is negative")


def parsed(*words, **options) -> Arguments:
    return cli.parse(Arguments, list(words), "A test.", **options)


def test_a_field_is_a_flag_of_its_kind():
    assert parsed() == Arguments()
    given = parsed("--limit_data=3", "--words", "a", "b", "--share", "--folder", "there", "--no-packing", "--quick")
    assert given == Arguments(3, ["a", "b"], 1.0, Path("there"), False, True)


def test_dashes_and_underscores_are_the_same():
    assert parsed("--limit-data", "3", "--no_packing") == parsed("--limit_data", "3", "--no-packing")
    assert parsed("--words=a-b_c").words == ["a-b_c"], "values are left as they are"


def test_help_says_each_default_once():
    text = " ".join(cli.build_parser(Arguments, "A test.").format_help().split())
    assert "100 % of them (default: 2000)" in text and "(default: here)" in text and "(default: on)" in text
    assert text.count("(default") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--limit_data=-1"], "--limit_data -1 is negative"),
        (["--limit_dat=1"], "unknown flag --limit_dat; did you mean --limit_data?"),
        (["--unheard_of"], "unknown flag --unheard_of; --help lists every flag"),
        (["--limit_data=few"], "invalid int value: 'few'"),
        (["stray"], "'stray' belongs to no flag"),
        (["--\x1b[31m"], r"unknown flag --\x1b[31m"),
    ],
)
def test_an_error_is_one_sentence_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words)
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in said and said.count("\n") == 1 and "usage" not in said


def test_words_without_a_flag_may_have_a_field():
    assert parsed("a", "b", "--quick", positional="words").words == ["a", "b"]
    assert parsed("--quick", "a", positional="words").words == ["a"]


@pytest.mark.parametrize(
    ("script", "words", "leads_to"),
    [
        (train, "--lr 1e-3", "--learning_rate"),
        (train, "--batch_size 4", "--per_device_train_batch_size"),
        (train, "--resume", "--resume_from_checkpoint"),
        (train, "--device cpu", "--use_cpu"),
        (train, "--epoch 3", "--epochs"),
        (train, "--warmup_ratio 0.1", "--warmup_steps"),
        (train, "--warmup-ratio 0.1", "--warmup_steps"),
        (train, "--evaluation_strategy no", "--eval_strategy"),
        (train, "--no_cuda", "--use_cpu"),
        (train, "--logging_dir x", "TENSORBOARD_LOGGING_DIR"),
        (train, "--group_by_length", "--train_sampling_strategy group_by_length"),
        (train, "--limit_data 5", "dataloader.py"),
        (dataloader, "--epochs 3", "train.py"),
        (dataloader, "--limit 3", "--limit_data"),
        (dataloader, "--output_dir x", "--save_path"),
        (inference, "--image x.jpg", "--image_path"),
        (inference, "--lr 3", "train.py"),
        (inference, "--beam-size 3", "--num_beams"),
    ],
)
def test_usual_names_lead_to_the_right_flag_in_one_line(script, words, leads_to, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(words.split())
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert leads_to in said and said.count("\n") == 1, said


def test_every_suggested_flag_exists():
    known = {f"--{name}" for name in arguments.training_argument_types()}
    for kind in (dataloader.Arguments, inference.Arguments, arguments.Arguments):
        known |= {f"--{name}" for name in kind.__dataclass_fields__}
    words = {word.strip(",") for ways in cli.USUAL_NAMES.values() for way in ways for word in way.split()}
    suggested = {word for word in words if word.startswith("--")}
    assert suggested <= known, suggested - known
    elsewhere = {flag for flags in cli.ELSEWHERE.values() for flag in flags} - {"--lr", "--image"}
    assert elsewhere <= known, elsewhere - known


def test_help_all_lists_each_flag_once_with_its_default():
    done = script("train.py", "--help-all")
    flags = [line.split()[0].rstrip(",") for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(flags) == len(set(flags)) > 100
    text = " ".join(done.stdout[done.stdout.index("flags of transformers") :].split())
    for name, default in (("learning_rate", "0.001"), ("label_smoothing_factor", "0.1"), ("eval_strategy", "epoch")):
        assert f"(default: {default})" in text[text.index(f"--{name} ") :][:900], name


def test_an_old_python_gets_one_sentence():
    code = "import sys; sys.version_info = (3, 10, 4); import captioning"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr == "Python 3.10 is too old; make the environment with 3.11 or newer\n"


def test_a_bar_in_a_file_is_a_few_whole_lines(monkeypatch, capfd):
    with cli.bar(total=1000, unit="image", desc="captions") as bar:
        for _ in range(1000):
            bar.update()
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line]
    assert len(lines) <= 2 and "\r" not in said
    assert lines[-1].startswith("captions: 100%") and "1000/1000" in lines[-1] and "image/s" in lines[-1]
    monkeypatch.setattr(cli, "LINES_EVERY", 0.0)
    with cli.bar(total=3, unit="image", desc="captions") as bar:
        for _ in range(3):
            bar.update()
    assert capfd.readouterr().err.count("captions:") >= 3


def test_imports_are_not_searched_for_cycles_and_what_comes_after_them_is():
    """Also where an import ends in a refusal."""
    with cli.importing():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(InputError), cli.importing():
        raise InputError("no model")
    assert gc.isenabled()
