"""A data set that several machines prepared, each a part of it: read together, it is the whole."""

import json
import shutil

import own
import pytest
import torch
from conftest import contents
from datasets import load_from_disk
from safetensors.torch import load_file

import dataloader
import inference
import train
from captioning import InputError
from captioning.data.folder import load_prepared
from captioning.training.arguments import read

TINY = ["--encoder=tiny", "--decoder=tiny", "--num_proc=1", "--limit_data=0"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Two parts of a data set, and the whole of it."""
    folder = tmp_path_factory.mktemp("parts")
    data = own.FORMS["karpathy"](folder / "data", own.draw())
    for name, more in (("part-1", ["--shard=1/2"]), ("part-2", ["--shard=2/2"]), ("whole", [])):
        dataloader.main([f"--data={data}", *TINY, *more, f"--save_path={folder / name}"])
    dataloader.main([f"--data={data}", *TINY, "--shard=1/3", f"--save_path={folder / 'third'}"])
    dataloader.main([f"--data={data}", *TINY, "--shard=2/2", "--max_length=9", f"--save_path={folder / 'short'}"])
    return folder


def test_parts_together_are_the_whole(parts):
    splits, description = load_prepared([parts / "part-2", parts / "part-1"])
    whole, expected = load_prepared(parts / "whole")
    assert description == {**expected, "parts": 2}
    for name, split in splits.items():
        rows = {i: (split.file_name[n], split.captions[n], split.encoded(n)) for n, i in enumerate(split.image_id)}
        assert rows == {
            i: (whole[name].file_name[n], whole[name].captions[n], whole[name].encoded(n))
            for n, i in enumerate(whole[name].image_id)
        }
    assert (parts / "part-1" / "tokenizer.json").read_bytes() == (parts / "part-2" / "tokenizer.json").read_bytes()


def renumbered(folder, other):
    """A copy of a part whose images have the numbers of another's."""
    copy = folder.with_name("renumbered")
    splits, theirs = load_from_disk(str(folder)), load_from_disk(str(other))
    for split in splits:
        numbers = theirs[split]["image_id"][: len(splits[split])]
        rows = splits[split].select(range(len(numbers))).remove_columns("image_id")
        splits[split] = rows.add_column("image_id", numbers)
    splits.save_to_disk(str(copy))
    for file in folder.glob("*.json"):
        if not (copy / file.name).exists():
            shutil.copy(file, copy)
    return copy


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["part-1", "whole"], "whole' is not a part of a data set"),
        (["part-1", "part-1"], "names part 1 of 2 twice, '.*part-1' and '.*part-1'; give each part once"),
        (["part-1", "third"], "third' is one of 3 parts, and '.*part-1' one of 2"),
        (["part-1", "short"], "has max_length 9, and .* 64; prepare all parts with the same arguments"),
        (
            ["part-1", "renumbered"],
            "image [0-9]+ lies in '.*part-1' and in '.*renumbered'; prepare all parts from the same",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(names, message, parts):
    if "renumbered" in names:
        renumbered(parts / "part-2", parts / "part-1")
    with pytest.raises(InputError, match=message):
        load_prepared([parts / name for name in names])


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (3, "part 3 of 3 is missing from --data_path; prepare with --shard 3/3, and name every part"),
        (4, "2 of 4 parts are missing from --data_path; prepare with --shard 3/4, --shard 4/4, and name every part"),
    ],
)
def test_parts_that_are_missing_are_named(count, message, parts, tmp_path):
    for number in (1, 2):
        shutil.copytree(parts / f"part-{number}", tmp_path / str(number))
        file = tmp_path / str(number) / "dataset.json"
        file.write_text(file.read_text().replace(f'"{number}/2"', f'"{number}/{count}"'))
    with pytest.raises(InputError, match=message):
        load_prepared([tmp_path / "1", tmp_path / "2"])


@pytest.mark.parametrize("value", ["0/2", "3/2", "2", "a/b", "-1/2"])
def test_a_part_that_cannot_be_is_refused(value, capsys):
    with pytest.raises(SystemExit):
        dataloader.main([f"--shard={value}", "--sample"])
    assert f"--shard {value} is not a part such as 1/4" in capsys.readouterr().err


def test_the_data_path_takes_folders_and_patterns(parts, tmp_path, capsys):
    output = f"--output_dir={tmp_path / 'run'}"
    both = [parts / "part-1", parts / "part-2"]
    assert read(["--data_path", str(both[0]), str(both[1]), output])[0].folders() == both
    assert read([f"--data_path={parts / 'part-*'}", output])[0].folders() == both
    assert read([f"--data_path={parts / 'whole'}", output])[0].folders() == [parts / "whole"]
    for words, message in (
        ([parts / "share-*"], f"--data_path '{parts}/share-*' matches nothing; check the pattern"),
        ([parts / "part-1", parts], f"--data_path '{parts}' is not a folder of dataloader.py"),
    ):
        for script, more in ((read, [output]), (inference.main, [f"--model_path={tmp_path}"])):
            with pytest.raises(SystemExit):
                script(["--data_path", *map(str, words), *more])
            assert message in capsys.readouterr().err


# ---- training


COMMON = [
    "--epochs=1",
    "--freeze_encoder",
    "--cache_features",
    "--augment",
    "--per_device_train_batch_size=16",
    "--generation_max_length=8",
    "--use_cpu",
    "--bf16=False",
    "--dataloader_num_workers=0",
]


@pytest.fixture(scope="module")
def runs(parts, tmp_path_factory):
    """A training on the two parts, and one on a single folder with the same rows in the same order."""
    folder = tmp_path_factory.mktemp("runs")
    whole = load_from_disk(str(parts / "whole"))
    splits, _ = load_prepared([parts / "part-1", parts / "part-2"])
    for name, split in splits.items():
        at = {image_id: row for row, image_id in enumerate(whole[name]["image_id"])}
        whole[name] = whole[name].select([at[image_id] for image_id in split.image_id])
    whole.save_to_disk(str(folder / "reordered"))
    for file in (parts / "whole").iterdir():
        if file.is_file() and not (folder / "reordered" / file.name).exists():
            shutil.copy(file, folder / "reordered")
    train.main(["--data_path", str(parts / "part-2"), str(parts / "part-1"), f"--output_dir={folder / 'of'}", *COMMON])
    train.main([f"--data_path={folder / 'reordered'}", f"--output_dir={folder / 'whole'}", *COMMON])
    return folder


def test_training_on_parts_gives_the_weights_of_the_whole(runs):
    of_parts, whole = (load_file(runs / name / "model.safetensors") for name in ("of", "whole"))
    assert all(torch.equal(of_parts[name], whole[name]) for name in whole)
    ours, theirs = (json.loads((runs / name / "results.json").read_text()) for name in ("of", "whole"))
    assert ours["test"] == theirs["test"] and ours["validation"] == theirs["validation"]
    assert ours["data"] == {**theirs["data"], "parts": 2}
    for file in ("predictions_test.json", "gallery.png"):
        assert (runs / "of" / file).read_bytes() == (runs / "whole" / file).read_bytes()
    assert ", 2 parts)" in (runs / "of" / "README.md").read_text()
    assert '<th scope="row">parts</th>' in (runs / "of" / "report.html").read_text()


def test_each_part_keeps_its_own_features(parts, runs, tmp_path, capsys):
    before = {name: contents(parts / name / ".features") for name in ("part-1", "part-2")}
    assert [len(files) for files in before.values()] == [4, 4], "two of train, one of validation, one of test"
    train.main([f"--data_path={parts / 'part-2'}", f"--output_dir={tmp_path / 'run'}", *COMMON])
    said = capsys.readouterr().err
    assert said.count("features: train from ") == 2, "those of the part alone are the same"
    assert "images; a Karpathy file, dataset.json" in said and ", part 2 of 2 alone\n" in said
    assert contents(parts / "part-2" / ".features") == before["part-2"]
    assert ", part 2 of 2 alone)" in (tmp_path / "run" / "README.md").read_text()


def test_a_run_on_parts_goes_on_whatever_their_order(parts, runs, tmp_path, capsys):
    shutil.copytree(runs / "of", tmp_path / "run")
    again = [f"--output_dir={tmp_path / 'run'}", *COMMON, "--resume_from_checkpoint=auto"]
    train.main(["--data_path", str(parts / "part-1"), str(parts / "part-2"), *again])
    assert "going on from" in capsys.readouterr().err
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (runs / "of" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="with other data"):
        train.main([f"--data_path={parts / 'part-1'}", *again])


def test_captions_are_scored_over_all_parts(parts, runs, tmp_path, capsys):
    shutil.copy(runs / "of" / "predictions_test.json", tmp_path)
    words = [f"--predictions={tmp_path / 'predictions_test.json'}", f"--data_path={parts / 'part-*'}"]
    assert inference.main(words) == 0
    told = capsys.readouterr()
    assert "2 parts" in told.err
    scores = {line.split()[0]: line.split()[1] for line in told.out.splitlines() if len(line.split()) > 1}
    expected = json.loads((runs / "of" / "results.json").read_text())["test"]
    assert all(scores[name] == f"{expected[name]:.4f}" for name in ("bleu_4", "cider_d"))
    assert inference.main([f"--model_path={runs / 'of'}", *words[1:], "--device=cpu"]) == 0
    assert ", 2 parts" in capsys.readouterr().err
