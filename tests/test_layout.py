"""The layout that captioning/DESIGN.md promises: what lies at the top level, and which room imports which."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "captioning"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
SCRIPTS = {name: ROOT / f"{name}.py" for name in ("dataloader", "train", "inference")}
# What a room may import besides itself; `cli`, `files` and `foreign` belong to all.
ROOMS = {
    "data": set(),
    "model": set(),
    "scores": set(),
    "training": {"model", "scores"},
    "show": {"data", "model", "scores"},
}
EVERYWHERE = {"cli", "files", "foreign"}


def imported(path: Path) -> set[str]:
    """What of the package a file imports: `room/module`, or the module of the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "captioning":
            parts = node.module.split(".")[1:]
            if parts and parts[0] in ROOMS and len(parts) == 1:
                found |= {f"{parts[0]}/{alias.name}" for alias in node.names}
            elif parts:
                found.add("/".join(parts))
            else:
                found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("captioning") for alias in node.names), "name what is imported"
    return found - {"InputError"}


@pytest.mark.parametrize("module", MODULES)
def test_a_room_imports_only_what_the_layout_allows(module):
    rooms = {name.split("/")[0] for name in imported(PACKAGE / module)} - EVERYWHERE
    room = module.split("/")[0].removesuffix(".py")
    assert rooms <= ({room} | ROOMS[room] if room in ROOMS else set())


def test_no_circle():
    graph = {module.removesuffix(".py"): imported(PACKAGE / module) for module in MODULES}
    done: set[str] = set()
    while len(done) < len(graph):
        ready = {module for module, needs in graph.items() if needs & set(graph) <= done} - done
        assert ready, f"these import each other: {sorted(set(graph) - done)}"
        done |= ready


def test_there_are_no_other_rooms():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert folders == set(ROOMS)


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_script_imports_a_script(name):
    tree = ast.parse(SCRIPTS[name].read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not names & set(SCRIPTS)


# Modules besides the rooms of data and scores that a script may need before it needs torch, which takes seconds.
LIGHT = {
    "cli.py",
    "files.py",
    "foreign.py",
    "show/curves.py",
    "show/pages.py",
    "show/html_report.py",
    "training/resilience.py",
} | {f"model/{name}.py" for name in ("beam_search", "caption", "onnx_captioner")}


def test_what_is_light_does_not_load_torch():
    light = [m for m in MODULES if m.split("/")[0] in ("data", "scores") or m in LIGHT]
    light = [m.removesuffix(".py").replace("/", ".") for m in light]
    assert len(light) > 5 + len(LIGHT)
    code = f"import sys; [__import__('captioning.' + name) for name in {light}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


# What else these must not load.
HEAVY = {
    "data.images": {"requests", "numpy", "torch", "urllib3"},
    "scores.metrics": {"torch", "evaluate", "datasets", "numpy", "rouge_score"},
    "show.curves": {"matplotlib", "torch", "numpy"},
    "show.pages": {"matplotlib", "torch", "numpy"},
}


@pytest.mark.parametrize("module", HEAVY)
def test_importing_is_light(module):
    code = f"import sys, captioning.{module}; print({HEAVY[module]} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


def test_top_level_holds_only_what_was_agreed():
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout: nothing tells tracked files from others")
    top = {name.split("/")[0] for name in listed.stdout.split()}
    agreed = {
        "dataloader.py",
        "train.py",
        "inference.py",
        "requirements.txt",
        "README.md",
        "LICENSE",
        "processed_data",
        "tests",
        "captioning",
        "pyproject.toml",
    }
    assert {name for name in top if not name.startswith(".")} <= agreed
