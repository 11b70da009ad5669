"""Token probabilities, the best captions, and where the model looked: against the stock model, for every encoder."""

import math

import numpy as np
import pytest
import torch
from encoders import ENCODERS, SIDE
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import ViTConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.data import images
from captioning.model import captioner, explain, generate, grid, parts
from captioning.model.caption import words_of

TEXTS = ["a dog runs on the grass", "two cats, a dog and a \N{DOG FACE}!", "don't stop"]


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(TEXTS * 3, 300)


def make_bundle(tokenizer, encoder="tiny", decoder="tiny"):
    torch.manual_seed(0)
    net = captioner.build(encoder, decoder, tokenizer).eval()
    net.generation_config.update(max_new_tokens=12, min_new_tokens=4)
    # Nor shall they write captions that cannot be seen.
    blank = [token for token in range(len(tokenizer)) if not generate.decode(tokenizer, [[token]])[0].isprintable()]
    blank += [token for token in range(len(tokenizer)) if not generate.decode(tokenizer, [[token]])[0]]
    net.generation_config.suppress_tokens = [token for token in blank if token != tokenizer.eos_token_id]
    with torch.no_grad():  # random weights attend evenly: make them prefer something
        for name, parameter in net.named_parameters():
            if "crossattention" in name or "lm_head" in name or "wte" in name:
                parameter.mul_(6)
    processor = parts.load_image_processor(encoder)
    return captioner.Bundle(net, tokenizer, processor)


@pytest.fixture(scope="module")
def bundle(tokenizer):
    return make_bundle(tokenizer)


def picture(width=90, height=60):
    base = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 30)
    return Image.merge("RGB", (base, base.rotate(90).resize(base.size), base.transpose(0)))


def pixel_values(bundle, *pictures):
    pixels = parts.Pixels(bundle.image_processor)
    return pixels.normalise(torch.from_numpy(np.stack([pixels(one) for one in pictures])))


# ---- the best captions


def test_the_first_caption_is_the_one_that_is_generated(bundle):
    values = pixel_values(bundle, picture(), picture(60, 90).rotate(90))
    found = explain.best_captions(bundle, values)
    assert [[caption.text for caption in captions] for captions in found] == [
        [text] for text in generate.generate(bundle, values)
    ]


def test_scores_are_those_of_beam_search(bundle):
    values = pixel_values(bundle, picture(), picture().rotate(180))
    stock = bundle.model.generate(
        pixel_values=values, num_beams=5, num_return_sequences=5, return_dict_in_generate=True, output_scores=True
    )
    found = explain.best_captions(bundle, values, 5)
    texts = generate.decode(bundle.tokenizer, stock.sequences)
    for image, captions in enumerate(found):
        expected: dict[str, float] = {}
        for text, score in zip(texts[5 * image : 5 * image + 5], stock.sequences_scores[5 * image :], strict=False):
            expected.setdefault(text, float(score))
        assert {caption.text: caption.score for caption in captions} == pytest.approx(expected, abs=1e-4)
        assert captions == sorted(captions, key=lambda caption: -caption.score)


def test_scores_do_not_depend_on_how_many_captions_are_scored_together(bundle, monkeypatch):
    values = pixel_values(bundle, picture(), picture().rotate(180), picture().rotate(90))
    whole = explain.best_captions(bundle, values, 3)
    monkeypatch.setattr(explain, "SCORED_TOGETHER", 4)  # ends in the middle of an image's captions
    parts = explain.best_captions(bundle, values, 3)
    for one, other in zip(whole, parts, strict=True):
        assert [caption.text for caption in one] == [caption.text for caption in other]
        assert [caption.score for caption in one] == pytest.approx([caption.score for caption in other], abs=1e-5)


def test_log_probabilities_are_the_models_own(bundle):
    values = pixel_values(bundle, picture())
    caption = explain.best_captions(bundle, values)[0][0]
    tokens = [bundle.model.generation_config.decoder_start_token_id]
    for token, value in zip(caption.tokens, caption.log_probabilities, strict=True):
        with torch.no_grad():
            logits = bundle.model(pixel_values=values, decoder_input_ids=torch.tensor([tokens])).logits
        assert value == pytest.approx(float(logits[0, -1].log_softmax(-1)[token]), abs=1e-4)
        tokens.append(token)
    assert caption.score == pytest.approx(sum(caption.log_probabilities) / len(caption.tokens))
    assert caption.tokens.count(bundle.tokenizer.eos_token_id) <= 1


def test_captions_that_read_the_same_count_once(bundle):
    captions = explain.best_captions(bundle, pixel_values(bundle, picture()), 20)[0]
    texts = [caption.text for caption in captions]
    assert 1 < len(texts) == len(set(texts)) <= 20


# ---- attention


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_every_kind_of_encoder_is_explained(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    ENCODERS[kind]().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(tmp_path)
    bundle = make_bundle(tokenizer, str(tmp_path))
    explanation = explain.explain(bundle, picture(), alternatives=2)
    assert explanation.caption.text == generate.generate(bundle, pixel_values(bundle, picture()))[0]
    assert " ".join(word.text for word in explanation.words) == explanation.caption.text
    assert explanation.alternatives[0] is explanation.caption
    assert explanation.words
    for word in explanation.words:
        assert word.attention.shape == (4, 4)
        assert word.attention.min() >= 0 and 0 < word.attention.sum() <= 1 + 1e-5
        assert 0 < word.probability <= 1
    if kind == "swin":  # no class token: all of it goes to places
        assert all(word.attention.sum() == pytest.approx(1, abs=1e-5) for word in explanation.words)


@pytest.mark.parametrize("layers", [None, [0], [-1], [0, 1]])
def test_attention_is_what_the_model_computes_while_it_generates(bundle, layers):
    values = pixel_values(bundle, picture())
    decoder = bundle.model.decoder
    usual = decoder.config._attn_implementation
    decoder.set_attn_implementation("eager")
    stock = bundle.model.generate(
        pixel_values=values, num_beams=1, max_new_tokens=8, output_attentions=True, return_dict_in_generate=True
    )
    decoder.set_attn_implementation(usual)
    # For each token, for each layer: (1, heads, 1, encoder tokens)
    chosen = range(len(stock.cross_attentions[0])) if layers is None else layers
    expected = np.stack(
        [
            np.mean([step[layer][0, :, -1].mean(0).numpy() for layer in chosen], axis=0)
            for step in stock.cross_attentions
        ]
    )
    with torch.inference_mode():
        states = bundle.model.encoder(pixel_values=values).last_hidden_state
        ours = explain.cross_attention(bundle, states, stock.sequences[0, 1:].tolist(), layers)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-5)
    assert decoder.config._attn_implementation == usual != "eager"


def test_a_layer_that_is_not_there_is_named(bundle):
    with pytest.raises(InputError, match="no layer 7; its 2 layers are 0 to 1"):
        explain.explain(bundle, picture(), layers=[7])


def test_it_finds_the_patch_that_the_model_needs(tokenizer):
    """A decoder whose keys single out one encoder token: the map must peak at its row and column."""
    bundle = make_bundle(tokenizer)
    encoder = bundle.model.encoder
    row, column = 2, 6

    def one_patch(**_):
        states = torch.zeros(1, 1 + 64, 128)
        states[0, 1 + 8 * row + column] = 1
        return BaseModelOutput(states)

    with torch.no_grad():
        for name, parameter in bundle.model.decoder.named_parameters():
            if "crossattention" in name:
                parameter.zero_()
            if "crossattention.q_attn.bias" in name:
                parameter.fill_(1)
            if "crossattention.c_attn.weight" in name:
                parameter[:, :128] = 0.1  # the keys
    bundle.model.encoder.forward = lambda pixel_values, **kwargs: one_patch()
    assert bundle.model.encoder is encoder
    for word in explain.explain(bundle, picture()).words:
        assert np.unravel_index(word.attention.argmax(), word.attention.shape) == (row, column)
        assert word.attention[row, column] > 0.9


@pytest.mark.parametrize(
    ("tokens", "size", "config", "wanted"),
    [
        (197, (224, 224), {"patch_size": 16}, (14, 14)),  # ViT, BEiT
        (198, (224, 224), {"patch_size": 16}, (14, 14)),  # DeiT
        (257, (224, 224), {"patch_size": 14}, (16, 16)),  # DINOv2
        (261, (224, 224), {"patch_size": 14}, (16, 16)),  # with registers
        (50, (224, 224), {"patch_size": 32}, (7, 7)),  # CLIP
        (49, (224, 224), {"patch_size": 4}, (7, 7)),  # Swin
        (144, (384, 384), {"patch_size": 4}, (12, 12)),  # Swin at 384
        (196, (224, 224), {"patch_size": [16, 16]}, (14, 14)),
        (1 + 8 * 12, (128, 192), {"patch_size": 16}, (8, 12)),
        (50, (224, 224), {}, (7, 7)),
        (49, (224, 224), {}, (7, 7)),
    ],
)
def test_patch_grids(tokens, size, config, wanted):
    settings = ViTConfig()
    del settings.patch_size
    vars(settings).update(config)
    assert grid.patch_grid(tokens, size, settings) == wanted


def test_tokens_that_are_no_grid_are_refused():
    with pytest.raises(InputError, match="the 60 tokens of a vit encoder are no grid"):
        grid.patch_grid(60, (48, 48), ViTConfig(patch_size=8))


# ---- what the model sees


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (97, 97), (640, 150)])
@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 64, "width": 64}),
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        CLIPImageProcessorPil(size={"shortest_edge": 80}, crop_size={"height": 64, "width": 64}),  # DINOv2
        CLIPImageProcessorPil(size={"height": 80, "width": 80}, crop_size={"height": 64, "width": 64}),  # DeiT
    ],
    ids=["squashed", "middle square", "crop", "squashed and cropped"],
)
def test_the_region_is_what_the_image_processor_leaves(processor, size):
    # A smooth picture, so that the two ways of resizing agree to a grey level or two.
    image = Image.merge("RGB", [Image.linear_gradient("L").rotate(turn).resize(size) for turn in (0, 90, 0)])
    left, top, right, bottom = explain.seen_region(processor, *size)
    box = (left * size[0], top * size[1], right * size[0], bottom * size[1])
    ours = np.asarray(image.resize((64, 64), Image.Resampling.BICUBIC, box=box), dtype=float)
    theirs = parts.Pixels(processor)(image).transpose(1, 2, 0).astype(float)
    assert np.abs(ours - theirs).mean() < 2.5


# ---- words


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 299), max_size=20))
def test_words_read_as_the_caption_and_no_token_is_in_two(tokens):
    tokenizer = _tokenizer()
    words = words_of(reader(tokenizer), tokens)
    assert " ".join(text for text, _ in words) == generate.decode(tokenizer, [tokens])[0]
    used = [position for _, positions in words for position in positions]
    assert used == sorted(set(used)) and set(used) <= set(range(len(tokens)))
    assert all(positions for _, positions in words)


def reader(tokenizer):
    return captioner.Bundle(None, tokenizer, None)


def _tokenizer(made=[]):  # noqa: B006 (a cache: hypothesis and fixtures of other scopes do not go together)
    if not made:
        made.append(parts.train_tokenizer(TEXTS * 3, 300))
    return made[0]


def test_words_not_pieces(tokenizer):
    text = "a zebra \N{DOG FACE}\N{DOG FACE} don't 日本 run, ok ."
    tokens = [*tokenizer(text).input_ids, tokenizer.eos_token_id]
    words = words_of(reader(tokenizer), tokens)
    assert [word for word, _ in words] == text.split()
    pieces = {word: generate.decode(tokenizer, [[tokens[i] for i in positions]])[0] for word, positions in words}
    assert pieces["zebra"] == "zebra" and len(words[1][1]) > 1
    assert pieces["don't"] == "don't"  # punctuation inside a word belongs to it
    assert pieces["run,"] == "run"  # and at its end it does not
    assert pieces["."] == "."
    assert len(tokens) - 1 not in {i for _, positions in words for i in positions}  # the end token
    assert words_of(reader(tokenizer), []) == [] == words_of(reader(tokenizer), [tokenizer.eos_token_id])


def test_a_words_probability_is_the_product_of_its_tokens(bundle):
    explanation = explain.explain(bundle, picture())
    words = words_of(bundle, explanation.caption.tokens)
    for word, (text, positions) in zip(explanation.words, words, strict=True):
        expected = math.prod(math.exp(explanation.caption.log_probabilities[i]) for i in positions)
        assert word.text == text and word.probability == pytest.approx(expected)


def test_a_real_encoder_is_explained(shared, tokenizer):
    bundle = make_bundle(tokenizer, str(shared / "weights" / "dinov2-small"))
    photo = sorted((shared / "coco2014" / "val2014").glob("*.jpg"))[0]
    explanation = explain.explain(bundle, images.open_image(photo))
    assert {word.attention.shape for word in explanation.words} == {(16, 16)}
    assert explanation.region[0] > 0  # the image processor crops


def test_the_grid_of_a_preset_that_has_no_patch_size(tokenizer):
    encoder = captioner.build("mit", "tiny", tokenizer).encoder
    tokens = encoder(torch.zeros(1, 3, 60, 60)).last_hidden_state.shape[1]
    assert grid.patch_grid(tokens, (60, 60), encoder.config) == (6, 6)
