"""What trackers get at the end of a run. Weights & Biases and MLflow are played by objects that note their calls."""

import sys
from types import SimpleNamespace

import madeup
import pytest

from captioning.show import run_folder, trackers


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder, split = tmp_path_factory.mktemp("run"), madeup.split(4)
    return folder, run_folder.write(folder, madeup.run(split), split)


class WandbCallback:
    """As transformers names it."""


class MLflowCallback:
    """As transformers names it."""


def expected(results):
    scores = trackers.scores_of(results)
    assert scores["test/cider_d"] == results["test"]["cider_d"]
    assert [scores["test/bleu_4_low"], scores["test/bleu_4_high"]] == results["test"]["intervals"]["bleu_4"]
    return scores


def test_wandb_gets_scores_pictures_and_the_report(made, monkeypatch):
    folder, results = made
    logged, finished = [], []
    played = SimpleNamespace(
        run=object(),
        Image=lambda path: ("image", path),
        Html=lambda text, inject: ("html", text, inject),
        log=logged.append,
        finish=lambda: finished.append(True),
    )
    monkeypatch.setitem(sys.modules, "wandb", played)
    trackers.log_run([object(), WandbCallback()], folder, results, 20)
    (content,) = logged
    assert finished == [True] and expected(results).items() <= content.items() and content["train/global_step"] == 20
    assert content["gallery"] == ("image", str(folder / "gallery.png"))
    assert content["report"] == ("html", (folder / "report.html").read_text(), False)
    played.run = None  # it was switched off
    trackers.log_run([WandbCallback()], folder, results, 20)
    assert len(logged) == 1


@pytest.mark.parametrize("active", [False, True])
def test_mlflow_gets_them_too(active, made, monkeypatch):
    folder, results = made
    calls = []
    run = SimpleNamespace(info=SimpleNamespace(run_id="r1"))
    played = SimpleNamespace(
        active_run=lambda: run if active else None,
        last_active_run=lambda: run,
        start_run=lambda run_id: calls.append(run_id),
        log_metrics=lambda scores, step: calls.append((scores, step)),
        log_artifact=lambda path: calls.append(path.rsplit("/", 1)[1]),
        end_run=lambda: calls.append("end"),
    )
    monkeypatch.setitem(sys.modules, "mlflow", played)
    trackers.log_run([MLflowCallback()], folder, results, 20)
    files = ["training_curves.png", "gallery.png", "report.html", "results.json"]
    middle = [(expected(results), 20), *files]
    assert calls == (middle if active else ["r1", *middle, "end"])  # a run that the user began is the user's to end


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_the_packages_have_what_is_called(package):
    module = pytest.importorskip(package)
    for name in {
        "wandb": ("run", "Image", "Html", "log", "finish"),
        "mlflow": ("active_run", "last_active_run", "start_run", "log_metrics", "log_artifact", "end_run"),
    }[package]:
        assert hasattr(module, name)
