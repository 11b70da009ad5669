"""The README names only flags, files and commands that exist."""

import re
import subprocess

from conftest import ROOT

from captioning.training.arguments import training_argument_types

README = (ROOT / "README.md").read_text()
OTHERS = {
    "--multi_gpu",
    "--num_processes",
    "--cpu",
}  # accelerate launch


def options(script: str) -> set[str]:
    text = (ROOT / script).read_text()
    return set(re.findall(r'"(--\w+)"', text))


def test_every_flag_exists():
    known = options("dataloader.py") | options("inference.py") | options("train.py") | OTHERS
    known |= set.union(*(options(path.relative_to(ROOT)) for path in (ROOT / "tests" / "benchmarks").glob("*.py")))
    known |= {f"--{part}_lr" for part in ("encoder", "decoder", "cross_attention")} | {"--no-packing"}
    known |= {f"--{name}" for name in training_argument_types()}
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README))
    assert len(named) > 25
    assert named <= known, named - known


def test_every_file_it_names_exists():
    for path in re.findall(r"`((?:captioning|tests)/[\w/]+\.py)`", README):
        assert (ROOT / path).is_file(), path


def test_every_picture_is_there_and_small():
    pictures = re.findall(r"!\[[^\]]+\]\((.+?)\)", README)
    assert len(pictures) >= 3
    for path in pictures:
        assert 0 < (ROOT / path).stat().st_size < 300_000, path


def test_the_layout_table_lists_every_module():
    for module in (ROOT / "captioning").glob("*.py"):
        assert module.stem == "__init__" or f"{module.stem}.py" in README, module.name


def test_ci_runs_the_commands_that_the_readme_gives():
    script = (ROOT / ".ci" / "run").read_text()
    function = script[script.index("command_after()") : script.index("environment=")]
    for marker, start in (("install", "python -m pip install -r"), ("tests", "python -m pytest")):
        done = subprocess.run(
            ["bash", "-c", f"{function}\ncommand_after 'command: {marker}'"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.stdout.startswith(start) and done.stdout.strip() in README


def test_nothing_is_left_to_fill_in():
    assert "@@" not in README and "TODO" not in README
