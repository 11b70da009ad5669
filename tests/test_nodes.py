"""Two machines train as one does; one that dies is told, and the other goes on alone. Each is a launcher here."""

import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
import nodes


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), nodes.CACHED])
def test_two_machines_train_as_one_does(more, few, tmp_path):
    found = nodes.compare(few, tmp_path, nodes.HERE, *more)
    # Adam turns a rounding of a gradient near zero into a part of a step, which is 1e-3.
    assert found["updates"] == 6 and found["mean"] < 5e-5 and found["largest"] < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_machine_that_dies_is_told_within_seconds_and_the_other_one_goes_on(victim, few, tmp_path):
    lost = nodes.lose_one(few, tmp_path / "run", nodes.HERE, victim)
    print(lost)
    assert lost["told"] < 30 and lost["code"] != 0
    assert f"process {1 - victim} lost another process of this run, which ended" in lost["sentence"]
    assert lost["updates"] >= 6


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "name"), [("--use_fsdp", "FSDP")])
def test_a_launcher_that_asks_for_one_model_on_several_processes_is_refused(flag, name, few, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", flag, "--num_processes=2", ROOT / "train.py"]
    words = [*launch, f"--data_path={few}", f"--output_dir={tmp_path / 'run'}"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240)
    print(done.stderr)
    assert (
        done.returncode != 0 and f"accelerate was asked for {name}: train.py does not spread one model" in done.stderr
    )
