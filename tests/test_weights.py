"""Every tensor of a folder arrives, or is named: missing, mis-shaped and surplus weights, pickles, feature maps."""

import json
import pickle
import zipfile

import numpy as np
import pytest
import torch
import transformers
from encoders import ENCODERS, PLAIN, SIDE
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model, ViTConfig, ViTForImageClassification, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.model import captioner, generate, grid, parts
from captioning.model.captioner import part_of
from captioning.model.weights import read_pickle


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(["a dog runs on the grass"] * 3, 300)


@pytest.fixture
def gpt2(tmp_path, tokenizer):
    folder = tmp_path / "gpt2"
    config = GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def renamed(folder, change) -> None:
    """Give the weights of a folder other names; None leaves one out."""
    tensors = {change(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_decoder_whose_block_has_other_names_is_refused(gpt2, tokenizer):
    renamed(gpt2, lambda name: name.replace("h.3.", "block.3."))
    with pytest.raises(InputError, match=r"lacks 12 of its weights, such as .*h\.3\..*instead it holds .*block\.3"):
        captioner.build("tiny", str(gpt2), tokenizer)


def test_an_encoder_without_its_last_layer_is_refused(tokenizer, tmp_path):
    ENCODERS["vit"]().save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: None if "layer.1." in name or "layers.1." in name else name)
    with pytest.raises(InputError, match=r"lacks .* of its weights"):
        captioner.build(str(tmp_path), "tiny", tokenizer)


def test_layers_that_the_configuration_does_not_know_are_refused(gpt2, tokenizer):
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(InputError, match=r"holds \d+ weights that its config\.json leaves no place for"):
        captioner.build("tiny", str(gpt2), tokenizer)


def test_weights_of_another_shape_are_named(gpt2, tokenizer):
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps({**config, "n_positions": 77}))
    with pytest.raises(InputError, match=r"wpe\.weight is 1024x16 and 77x16"):
        captioner.build("tiny", str(gpt2), tokenizer)


def test_what_is_known_to_be_absent_may_be(gpt2, tokenizer, tmp_path):
    # GPT-2 as the hub has it: no "transformer." before the names, buffers besides, no cross-attention
    model = GPT2Model(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=len(tokenizer)))
    model.save_pretrained(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    net, new = captioner.assemble("tiny", str(tmp_path / "plain"), tokenizer)
    assert torch.equal(net.decoder.transformer.wte.weight, model.wte.weight)
    assert {part_of(name) for name in new} == {"encoder", "cross_attention"}
    # A classifier's ViT: a head of another task, and no pooler, which captions never reach. So it counts as pretrained.
    ViTForImageClassification(ViTConfig(**PLAIN)).save_pretrained(tmp_path / "classifier")
    encoder, new = captioner.build_encoder(str(tmp_path / "classifier"))
    assert new == {"pooler.dense.weight", "pooler.dense.bias"}
    net, new = captioner.assemble(str(tmp_path / "classifier"), str(gpt2), tokenizer)
    assert {part_of(name) for name in new} == {"cross_attention"}
    assert torch.equal(net.encoder.embeddings.cls_token, encoder.embeddings.cls_token)


def test_a_captioner_that_lacks_its_cross_attention_is_refused(tokenizer, tmp_path):
    net = captioner.build("tiny", "tiny", tokenizer)
    captioner.save(captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny")), tmp_path)
    renamed(tmp_path, lambda name: None if "crossattention" in name else name)
    with pytest.raises(InputError, match=r"--model_path .* lacks .*crossattention"):
        captioner.load(tmp_path)


def pickled(folder, shards: int = 1) -> None:
    """Store the weights as the hub did before safetensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    files = {name: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, name in enumerate(names)}
    for file in set(files.values()):
        torch.save({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("shards", [1, 3])
def test_pickled_weights_are_those_of_safetensors(shards, gpt2, tokenizer, tmp_path, capsys):
    ENCODERS["swin"]().save_pretrained(tmp_path / "swin")
    before = captioner.build(str(tmp_path / "swin"), str(gpt2), tokenizer).state_dict()
    for folder in (tmp_path / "swin", gpt2):
        pickled(folder, shards)
    listed = sorted(path.name for path in gpt2.iterdir())
    after = captioner.build(str(tmp_path / "swin"), str(gpt2), tokenizer).state_dict()
    same = [name for name in before if "crossattention" not in name and "ln_cross_attn" not in name]
    same = [name for name in same if not name.startswith("enc_to_dec_proj")]
    assert len(same) > 50 and all(torch.equal(before[name], after[name]) for name in same)
    assert "read without running any code" in capsys.readouterr().err
    assert sorted(path.name for path in gpt2.iterdir()) == listed, "nothing is written into somebody's folder"


class Expanded:
    """Unpickles to a tensor of 400 GB that stands on one number."""

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (torch.zeros(1).untyped_storage(), 0, (10**11,), (0,), False, {})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"weight": print}, "asks to run code"),
        ({"weight": [1, 2]}, "other things than tensors"),
        ([torch.zeros(3)], "other things than tensors"),
        ({"weight": torch.zeros(1).expand(10**9)}, "larger than what the file holds"),
    ],
    ids=["code", "a list", "no names", "a tensor without its numbers"],
)
def test_a_pickle_of_anything_but_tensors_is_refused(content, reason, gpt2, tokenizer):
    (gpt2 / "model.safetensors").unlink()
    torch.save(content, gpt2 / "pytorch_model.bin")
    with pytest.raises(InputError, match=reason):
        captioner.build("tiny", str(gpt2), tokenizer)


@pytest.mark.parametrize("cut", [0, 10, 1000])
def test_a_damaged_pickle_is_one_sentence(cut, gpt2, tokenizer):
    pickled(gpt2)
    content = (gpt2 / "pytorch_model.bin").read_bytes()
    (gpt2 / "pytorch_model.bin").write_bytes(content[:cut])
    with pytest.raises(InputError, match=r"pytorch_model\.bin"):
        captioner.build("tiny", str(gpt2), tokenizer)


def test_a_pickle_that_unpacks_to_far_more_is_refused(gpt2, tokenizer):
    pickled(gpt2)
    with zipfile.ZipFile(gpt2 / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(InputError, match="unpacks to far more"):
        captioner.build("tiny", str(gpt2), tokenizer)


def test_a_pickle_whose_names_share_one_tensor_by_the_thousand_is_refused(tmp_path):
    """Each name gets memory of its own when the weights are written as safetensors."""
    tensor = torch.zeros(1000, 100)
    torch.save({"wte": tensor, "lm_head": tensor}, tmp_path / "tied.bin")
    assert read_pickle(tmp_path / "tied.bin", "it").keys() == {"wte", "lm_head"}
    torch.save({str(number): tensor for number in range(200)}, tmp_path / "many.bin")
    with pytest.raises(InputError, match=r"the tensors of many\.bin together are far larger than the file; name a"):
        read_pickle(tmp_path / "many.bin", "it")


STAGES = {"hidden_sizes": [8, 8, 16, 24], "depths": [1, 1, 1, 1]}
FEATURE_MAPS = {
    "convnext": lambda: transformers.ConvNextModel(transformers.ConvNextConfig(image_size=64, **STAGES)),
    "resnet": lambda: transformers.ResNetModel(transformers.ResNetConfig(embedding_size=8, **STAGES)),
    "pvt": lambda: transformers.PvtModel(
        transformers.PvtConfig(image_size=64, num_attention_heads=[1, 1, 2, 2], **STAGES)
    ),
    "focalnet": lambda: transformers.FocalNetModel(
        transformers.FocalNetConfig(image_size=64, embed_dim=4, depths=[1, 1, 1, 1])
    ),
    "vitdet": lambda: transformers.VitDetModel(
        transformers.VitDetConfig(
            image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ),
}


@pytest.mark.parametrize("kind", sorted(FEATURE_MAPS))
def test_a_map_of_features_is_flattened_to_patch_states(kind, tokenizer, tmp_path):
    torch.manual_seed(0)
    FEATURE_MAPS[kind]().save_pretrained(tmp_path / "encoder")
    ViTImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "encoder")
    net = captioner.build(str(tmp_path / "encoder"), "tiny", tokenizer).eval()
    processor = parts.load_image_processor(str(tmp_path / "encoder"))
    captioner.save(captioner.Bundle(net, tokenizer, processor), tmp_path / "run")
    loaded = captioner.load(tmp_path / "run")
    x = torch.randn(2, 3, 64, 64)
    plain = type(net.encoder).from_pretrained(tmp_path / "encoder").eval()(pixel_values=x)[0]
    flat = plain.flatten(2).transpose(1, 2) if plain.dim() == 4 else plain
    for model in (net, loaded.model):
        states = model.encoder(pixel_values=x).last_hidden_state
        torch.testing.assert_close(states, flat)
        assert model.encoder.config.hidden_size == states.shape[2]
    assert generate.generate(loaded, x, max_new_tokens=5) == generate.generate(
        captioner.Bundle(net, tokenizer, processor), x, max_new_tokens=5
    )
    loss = net(pixel_values=x, decoder_input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum()
    loss.backward()
    rows, columns = grid.patch_grid(states.shape[1], (64, 64), net.encoder.config)
    assert rows == columns and states.shape[1] - rows * columns in (0, 1)


def test_a_masked_autoencoder_hides_nothing(tokenizer, tmp_path):
    config = transformers.ViTMAEConfig(**PLAIN)
    mae = transformers.ViTMAEForPreTraining(config)
    mae.save_pretrained(tmp_path)
    net = captioner.build(str(tmp_path), "tiny", tokenizer).eval()
    x = torch.randn(1, 3, SIDE, SIDE)
    states = net.encoder(pixel_values=x).last_hidden_state
    assert type(net.encoder) is ViTModel and states.shape[1] == 1 + (SIDE // PLAIN["patch_size"]) ** 2
    torch.testing.assert_close(states, net.encoder(pixel_values=x).last_hidden_state)
    mae.config.mask_ratio = 0.0
    in_order = torch.arange(states.shape[1] - 1)[None].float()
    torch.testing.assert_close(states, mae.vit.eval()(x, noise=in_order).last_hidden_state, atol=1e-5, rtol=1e-4)


def test_a_siglip_2_of_any_shape_is_refused_in_a_sentence(tokenizer, tmp_path):
    config = transformers.Siglip2VisionConfig(
        patch_size=16, num_patches=16, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.Siglip2VisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"SigLIP 2 for images of any shape .*name one for a fixed size"):
        captioner.build(str(tmp_path), "tiny", tokenizer)


def test_settings_of_a_decoder_do_not_change_how_captions_are_generated(gpt2, tokenizer):
    settings = {"do_sample": True, "temperature": 5.0, "repetition_penalty": 3.0, "min_length": 9}
    (gpt2 / "generation_config.json").write_text(json.dumps(settings))
    torch.manual_seed(0)
    net = captioner.build("tiny", str(gpt2), tokenizer).eval()
    bundle = captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny"))
    x = torch.randn(3, 3, 64, 64)
    stock = net.generate(pixel_values=x, num_beams=2, max_new_tokens=8)
    said = [generate.generate(bundle, x, num_beams=2, max_new_tokens=8) for _ in range(2)]
    assert said[0] == said[1] == generate.decode(tokenizer, stock)


def test_an_image_processor_for_another_image_size_is_refused_by_both_scripts(tokenizer, tmp_path):
    ENCODERS["vit"]().save_pretrained(tmp_path)
    ViTImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(tmp_path)
    processor = parts.load_image_processor(tmp_path)
    message = rf"for 224x224 pixels, which its model does not take \(its config\.json says {SIDE}\)"
    with pytest.raises(InputError, match=message):
        captioner.check_parts(str(tmp_path), "tiny", processor)
    net = captioner.build(str(tmp_path), "tiny", tokenizer)
    with pytest.raises(InputError, match=message):
        captioner.refuse_misfit(net.encoder, processor, "--encoder 'it'")


def test_models_that_cannot_be_used_are_refused_before_data_are_prepared(gpt2, tmp_path):
    tiny = parts.load_image_processor("tiny")
    transformers.OPTConfig(hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path / "opt")
    with pytest.raises(InputError, match="is a opt; name a model of the GPT-2 family"):
        captioner.check_parts("tiny", str(tmp_path / "opt"), tiny)
    with pytest.raises(InputError, match="is a gpt2, not a vision encoder"):
        captioner.check_parts(str(gpt2), "tiny", tiny)
    captioner.check_parts("tiny", str(gpt2), tiny)


def test_dinov3_s_image_processor_needs_no_torchvision(tmp_path):
    published = {
        "image_processor_type": "DINOv3ViTImageProcessorFast",
        "crop_size": None,
        "do_resize": True,
        "resample": 2,
        "size": {"height": 32, "width": 32},
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    processor = parts.load_image_processor(tmp_path)
    picture = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    ours = torch.from_numpy(processor(picture, return_tensors="np").pixel_values)
    # What its own class does: rescale, resize with antialiasing, normalise
    pixels = torch.from_numpy(np.asarray(picture)).permute(2, 0, 1)[None] / 255
    resized = torch.nn.functional.interpolate(pixels, (32, 32), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(published[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    torch.testing.assert_close(ours, (resized - mean) / std, atol=1 / 255 / 0.22, rtol=0)
