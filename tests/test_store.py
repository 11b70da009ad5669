"""A store of captions: each step beside a plain computation, and `--store` as a user gives it."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import caller, run
from PIL import Image
from toy import WORDS, toy_tokenizer
from transformers import set_seed
from transformers.modeling_outputs import BaseModelOutput

from captioning.data import folder as folders
from captioning.model import captioner, explain, neighbours, parts
from captioning.scores import metrics, ngrams
from captioning.scores.cider import InverseDocumentFrequencies, cider_d, document_frequencies
from captioning.scores.consensus import Agreement
from captioning.show.store import Store

RNG = np.random.default_rng(0)
SAID = [[" ".join(RNG.choice(WORDS, RNG.integers(2, 9))) for _ in range(RNG.integers(1, 5))] for _ in range(40)]


# ---- neighbours


@pytest.mark.parametrize("count", [1, 5, 39, 60])
def test_neighbours_are_those_of_a_search_through_all(count):
    stored, asked = RNG.normal(size=(40, 8)).astype(np.float32), RNG.normal(size=(7, 8)).astype(np.float32)
    centre = stored.mean(0)

    def cosine(one, other):
        one, other = one - centre, other - centre
        return float(one @ other / math.sqrt(one @ one) / math.sqrt(other @ other))

    expected = [sorted(range(40), key=lambda row: -cosine(one, stored[row]))[:count] for one in asked]
    assert neighbours.Gallery(stored).nearest(asked, count) == expected


def test_an_image_is_never_its_own_neighbour():
    stored = RNG.normal(size=(40, 8)).astype(np.float32)
    near = neighbours.Gallery(stored).nearest(stored + 1e-3 * RNG.normal(size=stored.shape).astype(np.float32), 5)
    assert all(row not in rows and len(rows) == 5 for row, rows in enumerate(near))
    alone = neighbours.Gallery(stored).nearest(stored[:1], 100)
    assert len(alone[0]) == 39


def test_images_are_compared_by_the_class_token_or_by_all():
    states = torch.randn(3, 5, 8)
    encoder = torch.nn.Module()
    encoder.weight = torch.nn.Parameter(torch.zeros(1))
    assert np.allclose(neighbours.vectors_of(states, encoder), states.mean(1))
    encoder.cls_token = torch.nn.Parameter(torch.zeros(1))
    for given in (states, states.numpy()):
        found = neighbours.vectors_of(given, torch.nn.Sequential(encoder))
        assert found.dtype == np.float32 and np.array_equal(found, states[:, 0])
    pair = torch.nn.Module()  # the tokens of two encoders are as those of the first
    pair.first, pair.second = torch.nn.Linear(1, 1), encoder
    assert np.allclose(neighbours.vectors_of(states, pair), states.mean(1))


# ---- agreement


def test_agreement_is_the_cider_d_of_the_scores():
    agreement = Agreement(SAID)
    counted = [[ngrams.count(text) for text in own] for own in SAID]
    idf = InverseDocumentFrequencies(*document_frequencies(counted))
    captions = ["the red dog runs", "a cat", "under the the tree"]
    for images in ([0], [3, 1, 39], list(range(40))):
        others = [caption for image in images for caption in counted[image]]
        assert agreement(captions, images) == cider_d([ngrams.count(c) for c in captions], [others] * 3, idf)
    assert agreement(captions, []) == [0, 0, 0]
    # A store of the references themselves gives what the scores say.
    scored = metrics.evaluate({i: own[0] for i, own in enumerate(SAID)}, dict(enumerate(SAID))).each["cider_d"]
    assert [agreement([own[0]], [i])[0] for i, own in enumerate(SAID)] == pytest.approx(scored)


# ---- captions


@pytest.fixture(scope="module")
def bundle():
    set_seed(0)
    tokenizer = toy_tokenizer()
    model = captioner.build("tiny", "tiny", tokenizer)
    for parameter in model.decoder.parameters():
        parameter.data *= 3  # or all would be as likely
    model.generation_config.max_new_tokens = 8
    return captioner.Bundle(model.eval(), tokenizer, parts.load_image_processor("tiny"))


@pytest.fixture(scope="module")
def pixels(bundle):
    base = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30)
    images = [Image.merge("RGB", (base, base.rotate(90 * k), base)) for k in range(3)]
    return bundle.batch([bundle.pixels(image) for image in images])


def stored(bundle, said=SAID, **weights):
    size = bundle.model.encoder.config.hidden_size
    return Store(said, np.random.default_rng(1).normal(size=(len(said), size)).astype(np.float32), **weights)


@pytest.mark.parametrize("count", [1, 4])
def test_without_weight_captions_are_those_without_a_store(bundle, pixels, count):
    store = stored(bundle, weight=0)
    assert store.best_captions(bundle, pixels, count) == explain.best_captions(bundle, pixels, count)


def test_another_store_gives_other_captions(bundle, pixels):
    dogs = [["the red dog runs"], ["a small dog on the car"], ["the dog runs under a tree"], ["a blue dog"]] * 6
    cats = [[text.replace("dog", "cat") for text in own] for own in dogs]
    said = [stored(bundle, store, weight=100).generate(bundle, pixels) for store in (dogs, cats, dogs)]
    assert said[0] == said[2] and all(one != other for one, other in zip(said[0], said[1], strict=True))
    assert all("dog" in text for text in said[0]) and all("cat" in text for text in said[1])


def test_a_store_of_nothing_but_the_image_itself_changes_nothing(bundle, pixels):
    vectors = bundle.model.encoder(pixel_values=pixels).last_hidden_state[:, 0].detach().numpy()
    assert Store([["a dog"]], vectors[:1]).generate(bundle, pixels[:1])
    other = vectors[:1] + np.array([[1.0], [-1.0]], np.float32)
    best = Store([["a dog"], ["a cat"], ["the tree"]], np.concatenate([vectors[:1], other])).best_captions
    assert "a dog" not in [caption.text for caption in best(bundle, pixels[:1], 20)[0]]


def test_the_best_caption_has_the_highest_sum_of_both(bundle, pixels):
    store = stored(bundle, weight=2.0)
    states = bundle.model.encoder(pixel_values=pixels).last_hidden_state.detach()
    for image, rows in enumerate(store.gallery.nearest(states[:, 0].numpy(), 10)):
        captions = [caption for row in rows for caption in SAID[row]]
        found = explain.search(bundle, states[image : image + 1], 10)[0]
        means = {caption.text: caption.mean for caption in found}
        agreeing = sorted(dict.fromkeys(captions), key=lambda text: -store.agreement([text], rows)[0])[:10]
        for text in agreeing:
            ids, _ = folders.encode_captions(bundle.tokenizer, [text], 100)
            states_of = BaseModelOutput(states[image : image + 1])
            with torch.no_grad():
                logits = bundle.model(encoder_outputs=states_of, labels=torch.tensor(ids)).logits
            chosen = logits.log_softmax(-1)[0].gather(1, torch.tensor(ids[0])[:, None])
            means.setdefault(text, float(chosen.mean()))
        values = {text: mean + 2 * store.agreement([text], rows)[0] for text, mean in means.items()}
        got = store.best_captions(bundle, pixels, 3)[image]
        assert [c.text for c in got] == sorted(values, key=lambda text: -values[text])[:3]
        assert [c.mean for c in got] == pytest.approx([means[c.text] for c in got], abs=1e-4)


# ---- inference.py


def test_captions_and_scores_with_a_store(trained, few, prepared, tmp_path, capsys):
    Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30).convert("RGB").save(tmp_path / "a.png")
    store = tmp_path / "store"
    shutil.copytree(few, store)
    call = caller(trained, capsys)
    code, out, err = call("--image_path", tmp_path / "a.png", "--store", store)
    assert code == 0 and out.strip() and "store: 24 images with" in err
    assert any((store / ".features").glob("train-*.npy"))
    again = call("--image_path", tmp_path / "a.png", "--store", store)
    assert again[:2] == (0, out) and "features: train from" in again[2]
    code, line, _ = call("--image_path", tmp_path / "a.png", "--store", store, "--json", "--alternatives", 2)
    assert code == 0 and json.loads(line)["caption"] == out.strip()
    code, out, _ = call("--image_path", tmp_path / "a.png", "--store", store, "--store_weight", 0)
    assert (code, out) == (0, call("--image_path", tmp_path / "a.png")[1]), "without weight: as without a store"
    code, out, _ = call(f"--data_path={few}", "--store", store, "--output", tmp_path / "said.json")
    assert code == 0 and "cider_d" in out
    settings = json.loads((tmp_path / "said_results.json").read_text())["decoding"]
    assert settings["store"][0].startswith("store ") and settings["store_weight"] == 0.5
    other = tmp_path / "other"
    shutil.copytree(few, other)
    code, _, err = call("--image_path", tmp_path / "a.png", "--store", store, other)
    assert code == 0 and "store: 48 images with" in err


def test_captions_without_a_store_are_not_continued_with_one(trained, few, tmp_path, monkeypatch, capsys):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    words = [f"--model_path={trained}", "--image_path", tmp_path / "a.png", f"--output={tmp_path / 'c.jsonl'}"]
    assert run("inference", words, monkeypatch) == 0
    assert run("inference", [*words, "--store", few], monkeypatch) == 2
    assert "store" in capsys.readouterr().err


def test_a_store_without_training_images_is_refused(trained, few, tmp_path, monkeypatch, capsys):
    from datasets import load_from_disk

    splits = load_from_disk(str(few))
    splits["train"] = splits["train"].select([])
    splits.save_to_disk(str(tmp_path / "empty"))
    for file in few.iterdir():
        if file.is_file() and not (tmp_path / "empty" / file.name).exists():
            shutil.copy(file, tmp_path / "empty")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    words = [f"--model_path={trained}", "--image_path", tmp_path / "a.png", "--store", tmp_path / "empty"]
    assert run("inference", words, monkeypatch) == 2
    assert "empty" in capsys.readouterr().err
