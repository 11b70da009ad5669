"""The documents name only flags, files, pictures and links that exist; the README is short; the recipes are scripts."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, script

README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "captioning/DESIGN.md",
    ".github/CONTRIBUTING.md",
    "tests/benchmarks/RESULTS.md",
    "tests/benchmarks/SCORES.md",
]
RECIPES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests/benchmarks/recipes").glob("*.sh"))
SHARED = "tests/benchmarks/recipes/prepare.bash"  # what the recipes share
OF_OTHERS = {"--multi_gpu", "--num_processes", "--cpu", "--use_fsdp", "--use_deepspeed"}  # accelerate
OF_OTHERS |= {"--nnodes", "--node_rank", "--nproc_per_node", "--master_addr", "--master_port"}  # torchrun
OF_OTHERS |= {"--num_gpus"}  # deepspeed
OF_OTHERS |= {"--check", "--ignore-scripts"}  # ruff, npm
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Every flag of the scripts, as their help lists them, and of the benchmarks."""
    helps = [script("dataloader.py", "--help"), script("train.py", "--help_all"), script("inference.py", "--help")]
    benchmarks = [*(ROOT / "tests/benchmarks").glob("*.py"), ROOT / "tests/load.py"]
    helps += [script(path.relative_to(ROOT), "--help") for path in benchmarks]
    assert [done.stderr for done in helps if done.returncode] == []
    return set().union(*(FLAG.findall(done.stdout) for done in helps))


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, SHARED])
def test_every_flag_exists(page, known):
    text = (ROOT / page).read_text()
    named = set(FLAG.findall(text))
    assert named <= known | OF_OTHERS, named - known - OF_OTHERS


def test_the_flags_that_matter_are_named(known):
    assert len(set(FLAG.findall(README)) & known) >= 16
    everywhere = set().union(*(FLAG.findall((ROOT / page).read_text()) for page in PAGES))
    assert len(everywhere & known) > 40


@pytest.mark.parametrize("page", PAGES)
def test_every_file_it_names_exists(page):
    text = (ROOT / page).read_text()
    named = set(re.findall(r"`((?:captioning|tests|\.ci|\.github)/[\w/.-]+\.\w+)`", text))
    named |= {f"tests/benchmarks/{name}" for name in re.findall(r"`(recipes/[\w.]+)`", text)}
    named |= {f"captioning/{name}" for name in re.findall(r"`((?:data|model|scores|training|show)/\w+\.py)`", text)}
    for path in named:
        assert (ROOT / path).exists(), path


def anchor(heading: str) -> str:
    """The address of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if target.startswith("https://"):
            continue
        path, _, heading = target.partition("#")
        file = ((ROOT / page).parent / path) if path else ROOT / page
        assert file.resolve().is_relative_to(ROOT) and file.is_file(), target
        if heading:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert heading in [anchor(text) for text in headings], target


def test_every_picture_is_small_and_is_shown_somewhere():
    shown = set()
    for page in PAGES:
        for target in re.findall(r"!\[[^\]]+\]\((.+?)\)", (ROOT / page).read_text()):
            path = ((ROOT / page).parent / target).resolve()
            assert 0 < path.stat().st_size < 300_000, path
            shown.add(path)
    assert len(shown) >= 3
    assert shown == set((ROOT / ".github/images").resolve().iterdir())


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_has_the_cells_of_its_head(page):
    cells = 0
    for line in (ROOT / page).read_text().splitlines():
        if not line.lstrip().startswith("|"):
            cells = 0
            continue
        here = len(re.sub(r"`[^`]*`", "", line).strip().strip("|").split("|"))
        cells = cells or here
        assert here == cells, line


def test_the_table_of_files_lists_every_module():
    contributing = (ROOT / ".github/CONTRIBUTING.md").read_text()
    for module in (ROOT / "captioning").rglob("*.py"):
        name = module.relative_to(ROOT).as_posix()
        assert module.stem == "__init__" or f"`{name}`" in contributing, name


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("captioning/data/images.py", "open_image"),  # where a JPEG is opened
        ("captioning/data/folder.py", "encode_captions"),  # where labels are made
        ("captioning/training/loss.py", "caption_loss"),  # where the loss is
        ("captioning/training/batches.py", "augmented"),  # what --augment does
        ("captioning/scores/metrics.py", "coco_scores"),  # where to add a score
    ],
)
def test_what_a_newcomer_looks_for_is_where_the_page_says(file, name):
    (row,) = [
        line for line in (ROOT / ".github/CONTRIBUTING.md").read_text().splitlines() if f"`{file}` | `{name}`" in line
    ]
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), row


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_a_script_that_says_what_it_does(recipe):
    text = (ROOT / recipe).read_text()
    assert subprocess.run(["bash", "-n", ROOT / recipe]).returncode == 0
    lines = text.splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines
    comment = "\n".join(lines[1 : lines.index("set -euo pipefail")])
    for word in ("Takes ", "Ends with ", "Usage: "):
        assert f"# {word}" in comment
    assert Path(recipe).name in (ROOT / "tests/benchmarks/RESULTS.md").read_text()
    assert (ROOT / recipe).stat().st_mode & 0o111


def test_ci_runs_the_commands_that_the_readme_gives():
    ci = (ROOT / ".ci" / "run").read_text()
    function = ci[ci.index("command_after()") : ci.index("environment=")]
    split = ci[ci.index("line=") :].replace("eval ", "echo ")
    script = f"{function}\nenvironment=/fresh\n{split}".replace("ruff", ": ruff").replace("mypy", ": mypy")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines() == [
        "python3 -m venv /fresh && . /fresh/bin/activate && pip install -r requirements.txt -r tests/requirements.txt",
        "python -m pytest -n 2",
    ]


def test_the_first_command_is_the_demo():
    first = README[README.index("```") :]
    before = README[: README.index("```")].rstrip()
    assert before.endswith("<!-- command: demo -->")
    assert "dataloader.py --sample" in first.splitlines()[1]


def test_the_readme_is_short():
    assert len(README.split()) <= 2_000


@pytest.mark.parametrize("page", [*PAGES, *RECIPES, SHARED])
def test_nothing_is_left_to_fill_in(page):
    text = (ROOT / page).read_text()
    assert "@@" not in text and "TODO" not in text
