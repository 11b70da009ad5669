"""A run can be repeated: config.yaml, `--config`, and what results.json tells of the run."""

import json
import math
import os
import subprocess

import pytest
import torch
import yaml
from conftest import ROOT, free_port
from safetensors.torch import load_file

import train
from captioning import InputError
from captioning.files import plain
from captioning.training import arguments, config, record


@pytest.fixture
def data(tmp_path):
    """Just enough of a prepared folder for the flags to be read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    return tmp_path / "data"


def both(words):
    args, rest = arguments.read(words)
    return args, arguments.training_arguments(args, rest)


FLAGS = {
    "defaults": [],
    "frozen": ["--epochs=3", "--freeze_encoder", "--cache_features", "--seed=4", "--encoder=a b"],
    "by updates": ["--max_steps=20", "--no-packing", "--eval_strategy=no", "--save_strategy=no"],
    "evaluations by steps": ["--eval_steps=5", "--freeze_encoder=2", "--augment=3", "--no-mirror", "--bf16=False"],
    "a schedule with settings": ["--lr_scheduler_type=cosine_with_min_lr", '--lr_scheduler_kwargs={"min_lr": 1e-06}'],
    "a schedule that follows scores": ["--lr_scheduler_type=reduce_lr_on_plateau", "--patience=2"],
    "self-critical": ["--self_critical_epochs=1.5", "--self_critical_lr=3e-4", "--dropout=0"],
    "trackers and workers": ["--report_to=tensorboard", "--use_cpu", "--dataloader_num_workers=0", "--fp16=False"],
    "adafactor": ["--optim=adafactor", "--weight_decay=0.1", "--activation_checkpointing=True", "--seed=3"],
    "to the hub": ["--push_to_hub", "--hub_model_id=a/b", "--save_total_limit=5", "--eval_steps=7", "--save_steps=14"],
}


@pytest.mark.parametrize("words", FLAGS.values(), ids=list(FLAGS))
def test_every_flag_comes_back_out_of_its_file(words, data, tmp_path):
    args, training = both([f"--data_path={data}", f"--output_dir={tmp_path / 'run'}", *words])
    file = tmp_path / "config.yaml"
    file.write_text(config.dump(args, training, arguments.trainer_defaults(), file))
    again, same = both(["--config", str(file)])
    assert same.to_dict() == training.to_dict()
    left_out = {"config", "epochs"}
    told = {name: value for name, value in vars(args).items() if name not in left_out}
    assert {name: value for name, value in vars(again).items() if name not in left_out} == told
    assert {"learning_rate", "seed", "freeze_encoder"} <= set(yaml.safe_load(file.read_text()))


def test_the_command_line_comes_before_the_file(data, tmp_path):
    file = tmp_path / "flags.yaml"
    file.write_text(f"data_path: {data}\nseed: 3\nepochs: 7\n--packing: false\neval-strategy: no\nsave_strategy: no\n")
    args, training = both([f"--config={file}", f"--output_dir={tmp_path}", "--seed=5", "--max_steps=9", "--packing"])
    assert (training.seed, training.max_steps, args.packing, args.epochs) == (5, 9, True, None)
    assert training.eval_strategy.value == "no" and args.data_path == [data]
    args, training = both(["--config", str(file), "--output_dir", str(tmp_path)])
    assert (training.seed, training.num_train_epochs, args.packing) == (3, 7, False)


def test_what_follows_from_a_flag_follows_from_another_value_of_it_too(data, tmp_path):
    """A file of a run by CIDEr-D says nothing that would make the highest loss the best."""
    file = tmp_path / "config.yaml"

    def again(before, *now):
        args, training = both([f"--data_path={data}", f"--output_dir={tmp_path / 'run'}", *before])
        file.write_text(config.dump(args, training, arguments.trainer_defaults(), file))
        return both([f"--config={file}", *now])[1]

    by_loss = again([], "--metric_for_best_model=loss")
    assert by_loss.greater_is_better is False and by_loss.load_best_model_at_end
    assert again(["--metric_for_best_model=loss"], "--metric_for_best_model=cider_d").greater_is_better is True
    assert again(["--eval_strategy=no"], "--eval_strategy=epoch").load_best_model_at_end
    assert not again([], "--save_strategy=no").load_best_model_at_end
    assert not again(["--dataloader_num_workers=1"], "--dataloader_num_workers=0").dataloader_persistent_workers
    plateau = ["--lr_scheduler_type=reduce_lr_on_plateau"]
    assert again(plateau, "--metric_for_best_model=loss").lr_scheduler_kwargs == {"mode": "min"}


def test_a_run_that_goes_on_otherwise_says_so(data, tmp_path):
    texts = []
    for words in (["--epochs=20", "--dropout=0.2"], ["--seed=3", "--use_cpu"]):
        args, training = both([f"--data_path={data}", f"--output_dir={tmp_path / 'run'}", *words])
        texts.append(config.dump(args, training, arguments.trainer_defaults(), tmp_path / "run" / "config.yaml"))
    assert config.differences(*texts) == ["epochs 10.0 (was 20.0)", "dropout None (was 0.2)", "seed 3 (was 0)"]
    assert config.differences(texts[0], texts[0]) == config.differences("a person's: file", texts[0]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        ("- a\n- b\n", "holds no mapping of flags to values"),
        ("a: [", "is not YAML"),
        ("learning_rat: 3\n", "unknown flag 'learning_rat'; did you mean --learning_rate?"),
        ("seed: many\n", "--seed takes an integer, not 'many'"),
        ("dropout: 2\n", "--dropout 2 is not between 0 and 1"),
        ("epochs: 3\nseed: 1\nepochs: 5\n", "has 'epochs' twice; keep one of them"),
        ("learning-rate: 3\nlearning_rate: 4\n", "has 'learning_rate' twice"),
        ("epochs: [1, 2]\n", "'epochs' takes one value, not the list [1, 2]"),
        ("seed: [1, 2]\n", "'seed' takes one value"),
        ("resume_from_checkpoint: auto\n", "'resume_from_checkpoint' belongs on the command line"),
        ("hub_token: hf_secret\n", "'hub_token' belongs on the command line"),
    ],
)
def test_files_that_are_no_flags(content, message, data, tmp_path, capsys):
    file = tmp_path / "flags.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        train.main([f"--config={file}", f"--data_path={data}", f"--output_dir={tmp_path / 'run'}"])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(few, tmp_path_factory):
    """A run folder of a few seconds."""
    folder = tmp_path_factory.mktemp("record") / "run"
    flags = [
        "--epochs=2",
        "--per_device_train_batch_size=8",
        "--use_cpu",
        "--dataloader_num_workers=0",
        "--dropout=0.2",
    ]
    flags += ["--generation_num_beams=1", "--generation_max_length=12"]
    train.main([f"--data_path={few}", f"--output_dir={folder}", *flags])
    return folder


def test_a_run_is_repeated_to_the_bit(run, tmp_path):
    train.main([f"--config={run / 'config.yaml'}", f"--output_dir={tmp_path / 'again'}"])
    first, second = (load_file(folder / "model.safetensors") for folder in (run, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    told, again = (json.loads((folder / "results.json").read_text()) for folder in (run, tmp_path / "again"))
    assert told["run"]["fingerprints"] == again["run"]["fingerprints"]
    assert told["test"] == again["test"] and told["evaluations"] == again["evaluations"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("README.md", "mine"), ("config.yaml", "mine: 1"), ("model.safetensors", ""), ("results.json", "{}")],
)
def test_files_of_another_run_or_of_a_person_are_not_replaced(name, content, run, data, tmp_path, capsys):
    """Neither by a new run, nor by one that goes on from a checkpoint elsewhere."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).write_text(content)
    checkpoint = next(run.glob("checkpoint-*"))
    for words in ([], ["--resume_from_checkpoint=auto"], ["--resume_from_checkpoint", str(checkpoint)]):
        with pytest.raises(SystemExit):
            train.main([f"--data_path={data}", f"--output_dir={folder}", *words])
        assert f"holds a {name}, which this run would replace; name another folder" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_text() == content
    (folder / name).unlink()
    (folder / "checkpoint-3").mkdir()
    for words in (["--resume_from_checkpoint=false"], ["--resume_from_checkpoint", str(checkpoint)]):
        with pytest.raises(SystemExit):
            train.main([f"--data_path={data}", f"--output_dir={folder}", *words])
        assert "holds checkpoints of an earlier run" in capsys.readouterr().err


def test_everybody_may_read_the_weights_who_may_read_the_rest(run):
    modes = {path.name: path.stat().st_mode for path in [*run.glob("*"), *run.glob("checkpoint-*/*")] if path.is_file()}
    assert modes["model.safetensors"] == modes["config.json"] == modes["results.json"]


def test_no_network_is_one_sentence(monkeypatch):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    sentence = r"there can be no repository \(.*[Cc]onnection.*\); look at the network"
    with pytest.raises(InputError, match=sentence), train.hub_explained("there can be no repository"):
        HfApi(endpoint=f"http://127.0.0.1:{free_port()}").create_repo("a/b", token="hf_none")
    with pytest.raises(KeyError), train.hub_explained("x"):
        raise KeyError


def test_results_are_strict_json_and_tell_what_the_run_was(run, few):
    def refuse(constant):
        raise AssertionError(constant)

    text = (run / "results.json").read_text()
    results = json.loads(text, parse_constant=refuse)
    assert '"None"' not in text
    told = results["run"]
    assert told["command"].startswith(f"train.py --data_path={few} ")
    assert told["date"].endswith("+00:00") and told["peak_memory_gb"] > 0.1
    assert {"training", "evaluations", "scoring", "all"} <= set(told["seconds"])
    assert told["seconds"]["all"] >= max(told["seconds"].values()) > 0
    assert told["images_per_second"] > 0 and told["captions_per_second"] > told["images_per_second"]
    assert told["machine"]["processor"] and told["machine"]["threads"] >= 1 and told["machine"]["gpus"] == []
    prints = told["fingerprints"]
    assert set(prints["data"]) == {"train", "validation", "test"} and len(set(prints["data"].values())) == 3
    assert len(prints["weights_before"]) == 16 and prints["weights_before"] != prints["weights_after"]
    rows = results["evaluations"]
    assert [row["epoch"] for row in rows] == [1, 2] and all(
        {"loss", "cider_d", "train_loss"} <= set(row) for row in rows
    )
    assert results["recipe"].keys().isdisjoint({"mirror", "self_critical_lr"})  # they had no effect
    # The report shows them.
    report = (run / "report.html").read_text()
    for word in ("This run", told["date"], told["machine"]["processor"], prints["weights_after"], "images_per_second"):
        assert word in report
    assert "max_steps" not in report and "num_train_epochs" in report


def test_plain_values():
    odd = {1: math.inf, "a": [math.nan, 2.5, None, True], "b": {"c": ROOT}, "d": (1, "x")}
    assert plain(odd) == {"1": None, "a": [None, 2.5, None, True], "b": {"c": str(ROOT)}, "d": [1, "x"]}


def test_the_commit_of_the_code_is_told_where_there_is_one(tmp_path):
    assert record.revision(tmp_path) is None

    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True)

    (tmp_path / "code.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    clean = record.revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "code.py").write_text("a = 2\n")
    assert record.revision(tmp_path) == f"{clean}-dirty"
    (tmp_path / "below").mkdir()
    assert record.revision(tmp_path / "below") is None  # a copy of the code in somebody else's checkout


def test_a_token_is_no_part_of_the_command_nor_of_the_flags(data, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of the shell")
    words = [f"--data_path={data}", "--push_to_hub", "--hub_model_id=a/b", "--hub_token=hf_secret"]
    args, training = both(words)
    assert training.hub_token is None and os.environ["HF_TOKEN"] == "hf_secret"  # training_args.bin is uploaded
    assert "hf_secret" not in config.dump(args, training, arguments.trainer_defaults(), tmp_path / "config.yaml")
    words = ["--hub_token", "a", "--seed", "1", "--hub-token=b", "--hub_model_id=c"]
    assert record.without_secrets(words) == ["--hub_token", "...", "--seed", "1", "--hub_token=...", "--hub_model_id=c"]


def test_a_flag_file_is_found_before_anything_heavy():
    with pytest.raises(InputError, match="cannot be read"):
        config.with_config(["--config", "/no/such/file.yaml"], {}, {})
    assert config.with_config(["--seed=1"], {}, {}) == ["--seed=1"]
