"""Several captioners as one: each step by hand, the search against a plain one, and what does not go together."""

import shutil

import numpy as np
import pytest
import torch
from conftest import caller, run
from PIL import Image
from toy import toy_tokenizer
from transformers import ViTConfig, ViTModel, set_seed
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.model import beam_search, captioner, ensemble, explain, generate, parts


def small_captioner(folder, seed, side=64, width=None):
    """A captioner with random weights; with `width` its encoder is a ViT that wide, for images of `side` pixels."""
    set_seed(seed)
    tokenizer, encoder = toy_tokenizer(), "tiny"
    if width is not None:
        encoder = folder / f"encoder-{seed}"
        config = ViTConfig(
            hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=side,
            patch_size=16,
        )  # fmt: skip
        ViTModel(config).save_pretrained(encoder)
        ViTImageProcessorPil(size={"height": side, "width": side}).save_pretrained(encoder)
    model = captioner.build(str(encoder), "tiny", tokenizer)
    for parameter in model.decoder.parameters():
        parameter.data *= 3  # or all would be as likely
    model.generation_config.max_new_tokens = 8
    return captioner.Bundle(model.eval(), tokenizer, parts.load_image_processor(encoder))


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """Three captioners; the encoder of the second is wider than its decoder and sees smaller images."""
    folder = tmp_path_factory.mktemp("members")
    return [small_captioner(folder, 0), small_captioner(folder, 1, 48, 96), small_captioner(folder, 2)]


@pytest.fixture(scope="module")
def images():
    base = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30)
    return [Image.merge("RGB", (base, base.rotate(90 * k), base)) for k in range(3)]


def by_hand(members, images, tokens):
    """The logarithm of the mean of the members' probabilities of what follows each of the tokens, without any cache."""
    logs = []
    for member in members:
        pixels = member.batch([member.pixels(image) for image in images])
        with torch.no_grad():
            logits = member.model(pixel_values=pixels, decoder_input_ids=tokens, use_cache=False).logits
        logs.append(logits.log_softmax(-1))
    return torch.stack(logs).exp().mean(0).log()


def test_each_step_has_the_mean_of_the_probabilities(members, images):
    bundle = ensemble.join(members, ["a", "b", "c"])
    tokens = torch.tensor([[0, 5, 9, 30]] * 3)
    with torch.no_grad():
        pixels = bundle.batch([bundle.pixels(image) for image in images])
        states = bundle.model.encoder(pixel_values=pixels)
        found = bundle.model(states, tokens).logits
    torch.testing.assert_close(found, by_hand(members, images, tokens), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(3, 4))


@pytest.mark.parametrize("beams", [1, 3])
def test_the_search_is_that_of_transformers_with_these_probabilities(members, images, beams):
    bundle = ensemble.join(members[:2], ["a", "b"])
    config = bundle.model.generation_config
    settings = beam_search.Decoding(0, config.eos_token_id, config.pad_token_id, beams, 8)
    rows = torch.zeros(3, 0, dtype=torch.long)

    def step(newest, came_from):
        nonlocal rows
        rows = rows if came_from is None else rows[torch.from_numpy(came_from)]
        rows = torch.cat([rows, torch.from_numpy(newest)], 1)
        seen = [image for image in images for _ in range(len(rows) // 3)]
        return by_hand(members[:2], seen, rows)[:, -1].numpy()

    expected = beam_search.search(step, 3, settings)
    with torch.no_grad():
        states = bundle.model.encoder(bundle.batch([bundle.pixels(image) for image in images])).last_hidden_state
        found = generate.generate_tokens(bundle.model, states, num_beams=beams)
    width = max(found.shape[1], expected.shape[1])
    padded = [np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=0) for ids in (found.numpy(), expected)]
    assert np.array_equal(*padded)


def test_a_captioner_with_itself_is_that_captioner(members, images):
    alone = members[1]
    twice = ensemble.join([alone, alone], ["a", "a"])
    assert len(twice.model.encoder.encoders) == 1, "equal encoders run once"
    plain = explain.best_captions(alone, alone.batch([alone.pixels(image) for image in images]), 2)
    found = explain.best_captions(twice, twice.batch([twice.pixels(image) for image in images]), 2)
    for ours, theirs in zip(found, plain, strict=True):
        assert [one.tokens for one in ours] == [one.tokens for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-4)


def test_what_writes_other_tokens_is_refused(members):
    other = captioner.Bundle(members[0].model, parts.train_tokenizer(["red dogs"] * 3, 300), members[0].image_processor)
    with pytest.raises(InputError, match="--ensemble 'b' has another tokenizer than 'a'; name runs"):
        ensemble.join([members[0], other], ["a", "b"])


# ---- inference.py


@pytest.fixture(scope="module")
def second(trained, tmp_path_factory):
    """The trained captioner with other weights in its decoder."""
    folder = tmp_path_factory.mktemp("second") / "run"
    shutil.copytree(trained, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    bundle = captioner.load(folder)
    set_seed(1)
    with torch.no_grad():
        for parameter in bundle.model.decoder.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    captioner.save(bundle, folder)
    return folder


def test_captions_and_scores_of_several_runs(trained, second, few, images, tmp_path, capsys):
    images[0].save(tmp_path / "a.png")
    call = caller(trained, capsys)
    bundle = ensemble.join([captioner.load(trained), captioner.load(second)], ["a", "b"])
    pixels = bundle.batch([bundle.pixels(images[0])])
    code, out, _ = call("--image_path", tmp_path / "a.png", "--ensemble", second)
    assert code == 0 and out.strip() == generate.generate(bundle, pixels)[0]
    code, out, _ = call("--image_path", tmp_path / "a.png", "--ensemble", trained)
    assert (code, out) == (0, call("--image_path", tmp_path / "a.png")[1]), "with itself: as without"
    code, out, _ = call("--image_path", tmp_path / "a.png", "--ensemble", second, "--max_words", 3, "--json")
    assert code == 0 and len(out.split('"caption": "')[1].split('"')[0].split()) <= 3
    code, out, _ = call(f"--data_path={few}", "--ensemble", second, "--output", tmp_path / "said.json")
    assert code == 0 and "cider_d" in out
    assert '"ensemble": [' in (tmp_path / "said_results.json").read_text()


def test_captions_of_one_run_are_not_continued_by_several(trained, second, images, tmp_path, monkeypatch, capsys):
    images[0].save(tmp_path / "a.png")
    words = [f"--model_path={trained}", "--image_path", tmp_path / "a.png", f"--output={tmp_path / 'c.jsonl'}"]
    assert run("inference", words, monkeypatch) == 0
    assert run("inference", [*words, "--ensemble", second], monkeypatch) == 2
    assert "ensemble" in capsys.readouterr().err
