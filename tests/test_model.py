"""Encoders and decoders of every supported kind, built, trained a step, saved, loaded, and refused."""

import json

import pytest
import torch
from encoders import ENCODERS, SIDE
from PIL import Image
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    VisionEncoderDecoderModel,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.data import folder
from captioning.model import captioner, generate, packing, parts
from captioning.model.captioner import PARTS, part_of
from captioning.training import batches
from captioning.training.loss import caption_loss


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(["a dog runs on the grass"] * 3, 300)


@pytest.mark.parametrize("kind", sorted(ENCODERS))
def test_every_kind_of_encoder_trains_saves_and_loads(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    encoder = tmp_path / "encoder"
    ENCODERS[kind]().save_pretrained(encoder)
    ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(encoder)
    net = captioner.build(str(encoder), "tiny", tokenizer)
    bundle = captioner.Bundle(net, tokenizer, parts.load_image_processor(encoder))

    labels, _ = folder.encode_captions(tokenizer, ["a dog runs", "the grass"], 20)
    pixels = torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8).numpy()
    collated = batches.Collator(tokenizer.bos_token_id, 0)([{"image_id": 1, "pixels": pixels, "labels": labels}])
    logits = net(
        pixel_values=parts.Pixels(bundle.image_processor).normalise(collated["pixel_values"]),
        decoder_input_ids=collated["decoder_input_ids"],
        decoder_attention_mask=packing.packed_attention_mask(collated["segment_ids"]),
        decoder_position_ids=collated["decoder_position_ids"],
    ).logits
    caption_loss(logits, collated["labels"], None).backward()
    # What is left to train is exactly what the loss reaches: distributed training waits for nothing.
    assert all(p.requires_grad == (p.grad is not None) for p in net.parameters())
    assert {part_of(name) for name, p in net.named_parameters() if p.requires_grad} == set(PARTS)

    captioner.save(bundle, tmp_path / "run")
    loaded = captioner.load(tmp_path / "run")
    stock = VisionEncoderDecoderModel.from_pretrained(tmp_path / "run")
    x = torch.randn(2, 3, SIDE, SIDE)
    net.eval()
    for other in (loaded.model, stock):
        torch.testing.assert_close(
            other.eval()(x, decoder_input_ids=torch.zeros(2, 3, dtype=torch.long)).logits,
            net(x, decoder_input_ids=torch.zeros(2, 3, dtype=torch.long)).logits,
        )
    captions = generate.generate(loaded, x, max_new_tokens=5)
    assert len(captions) == 2


def test_clip_is_read_before_its_last_layer(tmp_path):
    """Which is trained for the class token alone: its patches would mislead."""
    torch.manual_seed(0)
    clip = ENCODERS["clip vision"]().eval()
    clip.save_pretrained(tmp_path)
    x = torch.randn(2, 3, SIDE, SIDE)
    states = captioner.build_encoder(str(tmp_path))[0].eval()(x).last_hidden_state
    torch.testing.assert_close(states, clip(x, output_hidden_states=True).hidden_states[-2])


def test_the_whole_picture_reaches_an_encoder_that_would_crop_it(tmp_path):
    CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
        tmp_path
    )
    white = Image.new("RGB", (4 * SIDE, SIDE), "white")
    white.paste("black", (0, 0, SIDE // 2, SIDE))  # an eighth, on the left
    seen = {}
    for whole in (False, True):
        processor = parts.load_image_processor(tmp_path, whole=whole)
        processor.save_pretrained(tmp_path / str(whole))
        processor = parts.load_image_processor(tmp_path / str(whole))  # as train.py and inference.py read it
        seen[whole] = processor(white, do_normalize=False, return_tensors="np").pixel_values[0]
        assert seen[whole].shape == (3, SIDE, SIDE)
        assert parts.resized_side(processor) == parts.input_side(processor) == SIDE
    assert seen[False].min() == 1, "the crop leaves the black part out"
    assert (seen[True] < 0.5).mean() == pytest.approx(1 / 8, abs=0.02)


def test_loss_of_the_stock_model_equals_ours(tokenizer):
    """transformers 4.50 shifted the labels of VisionEncoderDecoderModel twice; this would notice."""
    torch.manual_seed(0)
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    labels, _ = folder.encode_captions(tokenizer, ["a dog runs on the grass", "the dog"], 20)
    width = max(map(len, labels))
    padded = torch.tensor([ids + [-100] * (width - len(ids)) for ids in labels])
    pixels = torch.randn(2, 3, 64, 64)
    stock = net(pixel_values=pixels, labels=padded)
    assert torch.allclose(stock.loss, caption_loss(stock.logits, padded, None), atol=1e-6)


def gpt2_folder(folder, tokenizer, cross_attention=False):
    config = GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=len(tokenizer),
        add_cross_attention=cross_attention,
        is_decoder=True,
    )
    GPT2LMHeadModel(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_float16_folder_is_trained_in_float32(tokenizer, tmp_path):
    net = captioner.build("tiny", gpt2_folder(tmp_path, tokenizer), tokenizer)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


def test_which_parameters_are_new(tokenizer, tmp_path):
    plain = gpt2_folder(tmp_path / "plain", tokenizer)
    with_cross = gpt2_folder(tmp_path / "cross", tokenizer, cross_attention=True)

    def parts(encoder, decoder):
        _, names = captioner.assemble(encoder, decoder, tokenizer)
        return {part_of(name) for name in names}, any("crossattention" in name for name in names)

    assert parts("tiny", "tiny") == (set(PARTS), True)
    assert parts("tiny", plain) == ({"encoder", "cross_attention"}, True)
    assert parts("tiny", with_cross) == ({"encoder", "cross_attention"}, False)  # the projection alone


def test_preset_tokenizer_reads_and_writes_captions(tokenizer):
    ids = tokenizer("A DOG runs, on the grass!").input_ids
    assert tokenizer.decode(ids).strip() == "a dog runs, on the grass!"
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id
    emoji = "a dog \N{DOG FACE} \N{SNOWMAN}"
    assert generate.decode(tokenizer, [tokenizer(emoji).input_ids]) == [emoji]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t, p: captioner.load(p / "nowhere"), "--model_path '.*nowhere' does not exist"),
        (lambda t, p: captioner.load(p), "has no config.json"),
        (
            lambda t, p: captioner.build("no such/encoder name", "tiny", t),
            "--encoder 'no such/encoder name' is not a folder",
        ),
        (lambda t, p: captioner.build("tiny", "some/decoder", t), "--decoder 'some/decoder' is not here"),
    ],
)
def test_missing_models_are_named(call, message, tokenizer, tmp_path):
    with pytest.raises(InputError, match=message):
        call(tokenizer, tmp_path)


def test_foreign_code_is_refused(tokenizer, tmp_path):
    folder = tmp_path / "encoder"
    ENCODERS["vit"]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Evil"}}))
    with pytest.raises(InputError, match="code of its own"):
        captioner.build(str(folder), "tiny", tokenizer)


def test_a_decoder_of_another_family_or_vocabulary_is_refused(tokenizer, tmp_path):
    ENCODERS["vit"]().save_pretrained(tmp_path / "vit")
    with pytest.raises(InputError, match="is a vit; name a model of the GPT-2 family"):
        captioner.build("tiny", str(tmp_path / "vit"), tokenizer)
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=100)).save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match="only 100"):
        captioner.build("tiny", str(tmp_path / "small"), tokenizer)


def test_an_encoder_that_does_not_see_is_refused(tokenizer, tmp_path):
    gpt2_folder(tmp_path, tokenizer)
    with pytest.raises(InputError, match="not a vision encoder"):
        captioner.build(str(tmp_path), "tiny", tokenizer)


def test_real_weights_load(shared, tokenizer):
    net = captioner.build(str(shared / "weights" / "dinov2-small"), "tiny", tokenizer)
    frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.embeddings.mask_token"}
    assert next(net.encoder.parameters()).dtype == torch.float32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("hidden", [128, 96], ids=["as wide as the decoder", "narrower"])
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 4, "length_penalty": 0.5},
        {"num_beams": 2, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"do_sample": True, "top_k": 0, "num_return_sequences": 3},
    ],
    ids=lambda settings: "+".join(settings),
)
def test_keys_and_values_once_per_image_give_the_same_tokens(tokenizer, settings, hidden, attention, monkeypatch):
    monkeypatch.setitem(parts.ENCODER_PRESETS, "tiny", {**parts.ENCODER_PRESETS["tiny"], "hidden_size": hidden})
    torch.manual_seed(1)
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    net.set_attn_implementation(attention)
    with torch.no_grad():
        for name, parameter in net.decoder.named_parameters():  # so that images differ and beams change places
            parameter.mul_(20 if "crossattention" in name else 3)
    pixels = torch.randn(5, 3, 64, 64)
    states = net.encoder(pixels).last_hidden_state
    torch.manual_seed(7)
    plain = net.generate(pixel_values=pixels, max_new_tokens=12, **settings)
    torch.manual_seed(7)
    ours = generate.generate_tokens(net, states, max_new_tokens=12, **settings)
    assert torch.equal(ours, plain)
    assert len({tuple(row) for row in ours.tolist()}) > 1


def test_a_pretrained_decoder_gets_the_faster_form_of_the_same_function(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = GPT2Config(**sizes, vocab_size=len(tokenizer))
    assert config.activation_function == "gelu_new"
    plain = GPT2LMHeadModel(config).eval()
    plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = captioner.build_decoder(str(tmp_path), tokenizer)[0].eval()
    assert ours.config.activation_function == "gelu_pytorch_tanh" and ours.config.attn_pdrop == 0
    assert ours.config.resid_pdrop == config.resid_pdrop
    ids = torch.randint(0, len(tokenizer), (2, 9))
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)
