"""The layout that the README promises: what lies at the top level, and which module imports which."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

MODULES = {path.stem: path for path in (ROOT / "captioning").glob("*.py") if path.stem != "__init__"}
SCRIPTS = {name: ROOT / f"{name}.py" for name in ("dataloader", "train", "inference")}
# Besides the package itself (InputError) and `files`, which any module may use.
ALLOWED = {
    "batch": set(),
    "cli": set(),
    "coco": {"cli"},
    "download": {"coco", "images"},
    "explain": {"batch", "model"},
    "features": {"batch", "model"},
    "files": set(),
    "html_report": {"metrics", "ptb", "report"},
    "images": set(),
    "metrics": {"ptb"},
    "model": set(),
    "ptb": set(),
    "report": set(),
    "resilience": set(),
    "run_folder": {"html_report", "metrics", "report"},
    "sample": set(),
    "serve": {"cli", "explain", "images", "model", "report"},
    "trainer": {"batch", "cli", "metrics", "model", "resilience"},
}
WITHOUT_TORCH = (
    "cli",
    "coco",
    "download",
    "files",
    "html_report",
    "images",
    "metrics",
    "ptb",
    "report",
    "resilience",
    "sample",
)


def siblings(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "captioning":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("captioning."):
            found.add(node.module.split(".")[1])
    return found - {"InputError"}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_import_only_what_the_layout_allows(name):
    assert siblings(MODULES[name]) - {"files"} <= ALLOWED[name]


@pytest.mark.parametrize("name", sorted(SCRIPTS))
def test_no_script_imports_a_script(name):
    tree = ast.parse(SCRIPTS[name].read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & set(SCRIPTS)


def test_light_modules_do_not_load_torch():
    code = f"import sys; [__import__('captioning.' + name) for name in {WITHOUT_TORCH}]; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


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
        "processed_data",
        "tests",
        "captioning",
        "pyproject.toml",
    }
    assert {name for name in top if not name.startswith(".")} <= agreed
