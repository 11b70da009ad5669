"""CLIPScore and RefCLIPScore: their definition on given vectors, and a CLIP of random weights from end to end."""

import json
import math
import random

import madeup
import numpy as np
import pytest
import torch
from tinyclip import tiny_clip
from transformers import AutoProcessor, CLIPModel

import inference
from captioning import InputError
from captioning.model.clip import Clip
from captioning.scores.clipscore import PROMPT, clip_scores, ref_clip_scores
from captioning.scores.metrics import evaluate
from captioning.show.clip_scores import ClipScores

CPU = torch.device("cpu")


def cosine(a, b) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def test_the_scores_are_their_definition():
    rng = np.random.default_rng(0)
    counts = [1, 3, 2, 5]
    captions, images, references = (rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 4, sum(counts)))
    rows, start = [], 0
    for k, count in enumerate(counts):
        fitting = 2.5 * max(cosine(captions[k].tolist(), images[k].tolist()), 0)
        own = references[start : start + count].tolist()
        nearest = max(0.0, *(cosine(captions[k].tolist(), one) for one in own))
        rows.append((fitting, 2 * fitting * nearest / (fitting + nearest) if fitting + nearest else 0.0))
        start += count
    assert clip_scores(captions, images) == pytest.approx([row[0] for row in rows], abs=1e-9)
    assert ref_clip_scores(captions, images, references, counts) == pytest.approx([row[1] for row in rows], abs=1e-9)
    assert 0.0 in clip_scores(captions, images), "one of them points away from its image"


def test_vectors_by_hand():
    one, other, away = [2.0, 0.0], [3.0, 4.0], [-1.0, 0.0]
    assert clip_scores(np.array([one, one, one]), np.array([other, one, away])) == pytest.approx([1.5, 2.5, 0])
    found = ref_clip_scores(np.array([one]), np.array([other]), np.array([away, other]), [2])
    assert found == pytest.approx([2 * 1.5 * 0.6 / 2.1])
    assert ref_clip_scores(np.array([one]), np.array([away]), np.array([away]), [1]) == [0.0]
    assert clip_scores(np.zeros((1, 2)), np.array([one])) == [0.0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip")


def test_vectors_are_those_of_transformers_and_are_kept(folder, tmp_path, monkeypatch):
    split = madeup.split(5)
    texts = ["a dog", "a dog", "a much longer text about a dog that is cut off " * 3, "", "Кот, \ud800 猫"]
    clip = Clip(str(folder), CPU, tmp_path / "cache")
    images = [(split.encoded(row), lambda row=row: split.image(row)) for row in range(5)]
    monkeypatch.setattr("captioning.model.clip.BATCH", 2)
    vectors, of_texts = clip.images(images), clip.texts(texts)
    processor, model = AutoProcessor.from_pretrained(folder, backend="pil"), CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        for row in range(5):
            inputs = processor(images=split.image(row), return_tensors="pt")
            expected = model.get_image_features(**inputs).pooler_output[0]
            assert vectors[row] == pytest.approx(expected.numpy(), abs=1e-5)
        for row, text in enumerate(texts[:4]):
            inputs = processor(text=[text], return_tensors="pt", truncation=True, max_length=40)
            assert of_texts[row] == pytest.approx(model.get_text_features(**inputs).pooler_output[0].numpy(), abs=1e-5)
    # Nothing is computed twice, neither here nor in another process.
    again = Clip(str(folder), CPU, tmp_path / "cache")
    monkeypatch.setattr(CLIPModel, "get_image_features", None)
    monkeypatch.setattr(CLIPModel, "get_text_features", None)
    assert np.array_equal(again.images(images[::-1]), vectors[::-1]) and np.array_equal(
        again.texts(texts[:2]), of_texts[:2]
    )
    with pytest.raises(TypeError):
        again.texts(["something new"])
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert Clip(str(folder), CPU, tmp_path / "cache").known == {}, "what is damaged is computed again"
    assert Clip(str(folder), CPU, tmp_path / "nothing here").texts([]).shape == (0, 8)


def test_another_clip_has_other_vectors(folder, tmp_path):
    clip = Clip(str(folder), CPU, tmp_path)
    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        model.text_projection.weight += 1
    other = tiny_clip(tmp_path / "other")
    model.save_pretrained(other)
    assert Clip(str(other), CPU, tmp_path).file != clip.file


def test_scores_of_a_split_are_those_of_its_vectors(folder, tmp_path):
    split = madeup.split(6)
    references = split.references
    ids = list(references)
    random.Random(0).shuffle(ids)
    said = {i: references[i][1].lower() for i in ids}
    scores = ClipScores(str(folder), CPU, split, tmp_path)
    found = scores(evaluate(said, references), said)
    clip = scores.clip
    for row, image_id in enumerate(split.image_id):
        image = clip.images([(split.encoded(row), lambda row=row: split.image(row))])[0].tolist()
        text, *others = clip.texts([PROMPT + said[image_id], *(PROMPT + r for r in references[image_id])]).tolist()
        fitting = 2.5 * max(0, cosine(text, image))
        nearest = max(cosine(text, other) for other in others)
        assert found.each["clip_score"][row] == pytest.approx(fitting, abs=1e-5)
        harmonic = 2 * fitting * nearest / (fitting + nearest) if fitting else 0
        assert found.each["ref_clip_score"][row] == pytest.approx(harmonic, abs=1e-5)
    assert found.scores["clip_score"] == pytest.approx(np.mean(found.each["clip_score"]))


def test_a_folder_that_is_no_clip_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match="--clip"):
        Clip(str(tmp_path / "none"), CPU, tmp_path)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(InputError, match="is a vit; name a CLIP"):
        Clip(str(tmp_path / "vit"), CPU, tmp_path)


def test_inference_scores_and_compares_with_clip(folder, few, tmp_path, capsys, monkeypatch):
    from captioning.data.folder import load_prepared

    monkeypatch.chdir(tmp_path)
    rows = load_prepared(few)[0]["test"]
    for name, which in (("a", 0), ("b", 1)):
        own = [{"image_id": i, "caption": c[which]} for i, c in zip(rows.image_id, rows.captions, strict=True)]
        (tmp_path / f"{name}.json").write_text(json.dumps(own))
    flags = [f"--data_path={few}", f"--clip={folder}", "--device=cpu"]
    assert inference.main(["--predictions=a.json", *flags]) == 0
    table = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines() if line}
    each = json.loads((tmp_path / "a_scores_per_image.json").read_text())
    assert float(table["clip_score"]) == pytest.approx(np.mean([row["clip_score"] for row in each]), abs=1e-4)
    assert len(list((few / ".clip").iterdir())) == 1
    assert inference.main(["--compare", "a.json", "b.json", *flags]) == 0
    out = capsys.readouterr().out
    assert out.count("ref_clip_score") == 2 and table["clip_score"] in out
    with pytest.raises(SystemExit):
        inference.main(["photo.jpg", f"--clip={folder}"])
    assert "--clip needs --data_path" in capsys.readouterr().err
