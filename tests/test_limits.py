"""Model folders from strangers: absurd sizes, other kinds, settings that ask for code or packages, files of no kind."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from damage import NASTY
from encoders import ENCODERS
from PIL import Image
from transformers import GenerationConfig

from captioning import InputError
from captioning.model import captioner, limits, parts
from captioning.model.generate import generate


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory) -> Path:
    """A whole captioner of tiny presets with random weights."""
    folder = tmp_path_factory.mktemp("strangers") / "captioner"
    parts.quiet_transformers()
    tokenizer = parts.train_tokenizer(["a dog runs", "a cat sleeps"] * 3, 300)
    torch.manual_seed(0)
    net = captioner.build("tiny", "tiny", tokenizer)
    captioner.save(captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny")), folder)
    return folder


@pytest.fixture
def copy(bundle_folder, tmp_path):
    """A copy that can be changed."""
    return Path(shutil.copytree(bundle_folder, tmp_path / "copy"))


def change(file: Path, *keys, **values) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    place = content
    for key in keys:
        place = place[key]
    place.update(values)
    file.write_text(json.dumps(content))


def caption(bundle) -> list[str]:
    pixels = torch.from_numpy(bundle.pixels(Image.new("RGB", (80, 60), "red")))[None]
    return generate(bundle, bundle.pixels.normalise(pixels))


def refused(folder: Path) -> str:
    began = time.process_time()
    with pytest.raises(InputError) as error:
        captioner.load(folder)
    assert time.process_time() - began < 5
    sentence = str(error.value)
    assert "\n" not in sentence and len(sentence) < 1000
    return sentence


ABSURD = [
    (("encoder",), {"num_hidden_layers": 1_000_000}, "says num_hidden_layers 1000000, and a number from 0 to 1,000"),
    (("encoder",), {"num_hidden_layers": 999}, "says num_hidden_layers 999, and its weights hold 116 tensors"),
    (("encoder",), {"hidden_size": 1_000_000, "num_attention_heads": 8}, "asks for .* numbers, and its weights hold"),
    (("encoder",), {"intermediate_size": 900_000}, "asks for .* numbers, and its weights hold"),
    (("encoder",), {"image_size": 100_000}, "says image_size 100000, and a number from 1 to 4,096"),
    (("encoder",), {"image_size": 4096}, "in 262,144 patches, and 16,384 are the most"),
    (("encoder",), {"patch_size": 0}, "says patch_size 0, and a number from 1"),
    (("encoder",), {"num_attention_heads": 0}, "says num_attention_heads 0, and a number from 1"),
    (("encoder",), {"num_attention_heads": 7}, "config.json"),
    (("encoder",), {"num_labels": 10**9}, "says num_labels 1000000000"),
    (("encoder",), {"id2label": {str(n): "x" for n in range(60_000)}}, "says id2label an object with 60,000 members"),
    (("encoder",), {"layer_norm_eps": -1.0}, "says layer_norm_eps -1.0, and a number from 0 to 1"),
    (("encoder",), {"hidden_act": "none"}, "no model can be built of: 'none'"),
    (("decoder",), {"vocab_size": "many"}, "config.json that transformers cannot use"),
    (("decoder",), {"vocab_size": 3_000_000}, "asks for .* numbers, and its weights hold"),
    (("decoder",), {"n_positions": 10**9}, "says n_positions 1000000000"),
    (("decoder",), {"n_layer": 10**6}, "says n_layer 1000000"),
    (("decoder",), {"resid_pdrop": 2.0}, "says resid_pdrop 2.0, and a number from 0 to 1"),
    ((), {"auto_map": {"AutoModel": "code.Model"}}, "asks to run code of its own"),
    (("encoder",), {"auto_map": {"AutoModel": "code.Model"}}, "asks to run code of its own"),
    ((), {"encoder": None}, "config.json"),
    ((), {"model_type": ["vit"]}, "config.json"),
    ((), {"model_type": "bert"}, "is a bert, not an image captioner"),
]
PACKAGES = [
    *({"quantization_config": {"quant_method": kind}} for kind in ("bitsandbytes", "gptq", "hqq", "torchao", "awq")),
    {"quantization_config": "text"},
    *({"_attn_implementation": kind} for kind in ("flash_attention_2", "flash_attention_3", "flex_attention")),
    {"attn_implementation": "kernels-community/flash-attn"},
    {"use_kernels": True},
]
ABSURD += [((), package, "needs another package|kernels from elsewhere") for package in PACKAGES]


@pytest.mark.parametrize(("keys", "values", "message"), ABSURD, ids=lambda value: str(value)[:40])
def test_a_config_that_asks_for_too_much_is_refused_at_once(keys, values, message, copy):
    change(copy / "config.json", *keys, **values)
    assert re.search(message, refused(copy))


@pytest.mark.parametrize("kind", ENCODERS)
def test_encoders_of_every_kind_are_within_the_limits(kind, tmp_path):
    ENCODERS[kind]().save_pretrained(tmp_path)
    assert captioner.build_encoder(str(tmp_path))[0].config.hidden_size


@pytest.mark.parametrize(
    "values", [{"return_dict": False}, {"output_attentions": True}, {"torchscript": True}], ids=str
)
def test_what_changes_what_a_model_returns_is_left_out(values, copy, bundle_folder):
    for keys in ((), ("encoder",), ("decoder",)):
        change(copy / "config.json", *keys, **values)
    assert caption(captioner.load(copy)) == caption(captioner.load(bundle_folder))


GENERATION = [
    *({"num_beams": value} for value in (0, -1, 2.5, "many", 10**6, True)),
    *({"max_new_tokens": value} for value in (0, -1, 10**9, "long", 1.5)),
    *({"max_length": value} for value in (0, 10**9, "long")),
    *({"min_length": value} for value in (-1, 10**9, "long")),
    *({"repetition_penalty": value} for value in (0, -1, 1e308, "high")),
    *({"length_penalty": value} for value in (1e308, "high", [1])),
    *({"no_repeat_ngram_size": value} for value in (-1, 10**9, "x")),
    *({"temperature": value} for value in (0, -1, "hot")),
    *({"top_p": value} for value in (2, -1, "x")),
    *({"decoder_start_token_id": value} for value in (-1, 10**6, "x", [1])),
    *({"eos_token_id": value} for value in ([10**6], "x", [])),
    *({"bad_words_ids": value} for value in ([], [[]], [[10**6]], "x", [1])),
    *({"suppress_tokens": value} for value in ([-1], [10**6], "x")),
    {"early_stopping": "sometimes"},
    {"do_sample": "yes"},
]
CODE = [
    {"num_beam_groups": 3, "diversity_penalty": 0.5},
    {"penalty_alpha": 0.6, "top_k": 4},
    {"dola_layers": "low"},
    {"constraints": ["x"]},
    {"force_words_ids": [[1]]},
    {"custom_generate": "someone/something"},
    {"trust_remote_code": True},
]


@pytest.mark.parametrize("values", GENERATION, ids=lambda value: str(value)[:40])
def test_generation_settings_out_of_range_are_refused(values, copy):
    change(copy / "generation_config.json", **values)
    sentence = refused(copy)
    assert "the generation_config.json of --model_path" in sentence and str(next(iter(values))) in sentence
    # Folders of old have the same in their config.json.
    (copy / "generation_config.json").unlink()
    change(copy / "config.json", **values)
    refused(copy)


@pytest.mark.parametrize("values", CODE, ids=lambda value: str(value)[:40])
def test_ways_to_search_that_are_code_from_elsewhere_are_refused(values, copy):
    change(copy / "generation_config.json", **values)
    assert "code from elsewhere, which is never run" in refused(copy)


DROPPED = [
    *({name: True} for name in ("return_dict_in_generate", "output_scores", "output_attentions", "output_logits")),
    *({"cache_implementation": value} for value in ("static", "offloaded", "quantized", "x")),
    {"num_return_sequences": 3},
    {"cache_config": {"backend": "hqq"}},
    {"prompt_lookup_num_tokens": 3},
    {"stop_strings": ["a"]},
    {"max_time": 1e-9},
    {"guidance_scale": 7.5},
    {"watermarking_config": {"bias": 2.5}},
    {"compile_config": {"mode": "x"}},
    {"bos_token_id": -1, "pad_token_id": 10**6},
    {"whatever": [1]},
]


@pytest.mark.parametrize("values", DROPPED, ids=lambda value: str(value)[:40])
def test_settings_that_change_what_generate_returns_are_left_out_and_named(values, copy, bundle_folder, capsys):
    change(copy / "generation_config.json", **values)
    bundle = captioner.load(copy)
    error = capsys.readouterr().err
    assert "generation_config.json says" in error and "left out" in error and all(name in error for name in values)
    assert caption(bundle) == caption(captioner.load(bundle_folder))


@pytest.mark.parametrize(
    "values",
    [
        {"num_beams": 5, "length_penalty": 0.0, "early_stopping": True, "no_repeat_ngram_size": 3},
        {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "num_beams": 1},
        {"repetition_penalty": 1.3, "min_new_tokens": 2, "suppress_tokens": [3], "bad_words_ids": [[4, 5]]},
        {"max_length": 16, "max_new_tokens": None, "eos_token_id": [0, 1]},
    ],
    ids=str,
)
def test_usual_settings_are_kept(values, copy, capsys):
    change(copy / "generation_config.json", **values)
    bundle = captioner.load(copy)
    assert capsys.readouterr().err == ""
    for name, value in values.items():
        assert getattr(bundle.model.generation_config, name) == value
    assert len(caption(bundle)) == 1


def test_what_transformers_writes_is_read_in_silence(copy, capsys):
    full = GenerationConfig(num_beams=3, max_new_tokens=40, decoder_start_token_id=0, eos_token_id=0, pad_token_id=0)
    (copy / "generation_config.json").write_text(full.to_json_string(use_diff=False))
    captioner.load(copy)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_mean": [0.5] * 4}, "preprocessor_config.json"),
        ({"image_mean": ["a"]}, "says image_mean"),
        ({"image_mean": None}, "preprocessor_config.json"),
        ({"image_std": [0, 0, 0]}, "says image_std"),
        ({"resample": 99}, "says resample 99, which is not a whole number from 0 to 5"),
        ({"size": None}, "preprocessor_config.json"),
        ({"size": {}}, "says size"),
        ({"size": 10**9}, "says size 1000000000, which is not a side from 1 to 4,096"),
        ({"size": {"height": 10**5, "width": 10**5}}, "says size"),
        ({"size": {"height": 224, "width": 224}}, "for 224x224 pixels, which its model does not take"),
        ({"do_center_crop": True, "crop_size": 10**9}, "says crop_size"),
        ({"do_resize": False}, "pictures of several sizes"),
        ({"rescale_factor": "x"}, "says rescale_factor"),
        ({"do_normalize": "yes"}, "says do_normalize"),
        ({"image_processor_type": "WhisperFeatureExtractor"}, "preprocessor_config.json"),
        ({"image_processor_type": ["ViT"]}, "says image_processor_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_image_processor_that_cannot_be_is_refused(values, message, copy):
    change(copy / "preprocessor_config.json", **values)
    assert re.search(message, refused(copy))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "dangling", "deep", "long"])
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "preprocessor_config.json", "tokenizer.json"]
)
def test_files_that_are_none_are_refused(kind, name, copy):
    path = copy / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "deep":
        path.write_text('{"a":' * 100_000)
    elif kind == "long":
        with path.open("wb") as file:
            file.truncate(10**12)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else copy / "nowhere")
    assert name.split(".")[0].split("_")[0] in refused(copy)


def test_other_files_that_would_hang_are_refused_or_not_opened(copy):
    os.mkfifo(copy / "notes.json")
    os.mkfifo(copy / "training_args")
    assert captioner.load(copy)
    os.mkfifo(copy / "model-2.safetensors")
    assert "not a regular file" in refused(copy)


def test_a_folder_of_links_is_read(copy, tmp_path):
    """As the hub's cache holds them."""
    (tmp_path / "blobs").mkdir()
    for path in list(copy.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(tmp_path / "blobs" / path.name)
    assert caption(captioner.load(copy))


def test_weights_that_are_not_numbers_are_refused(copy):
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert "holds a number that is not finite, in " in refused(copy)


def test_an_adapter_is_named_as_one(copy):
    (copy / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/something"}')
    assert "is an adapter, which needs another package (peft)" in refused(copy)


def test_a_tokenizer_for_another_model_is_refused(copy):
    parts.train_tokenizer([f"word{number}" for number in range(3000)] * 2, 2000).save_pretrained(copy)
    file = copy / "tokenizer_config.json"
    change(file, eos_token="word1500", pad_token="word1500")
    captioner_or_sentence(copy)


def captioner_or_sentence(folder: Path) -> None:
    try:
        caption(captioner.load(folder))
    except InputError as error:
        assert "\n" not in str(error)


def test_free_memory_bounds_a_model(copy, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1_000_000}))
    assert re.search(r"needs \d\.\d GB of memory, and 0\.0 GB are free", refused(copy))


@pytest.mark.parametrize("value", range(len(NASTY)))
def test_every_setting_of_decoding_takes_no_nasty_value(value):
    schema = limits.decoding_schema(300, 64)
    for name in schema:
        try:
            settings, _ = limits.decoding_settings({name: NASTY[value]}, 300, 64, "it")
        except InputError as error:
            assert str(error).startswith("the generation_config.json of it says ")
        else:
            GenerationConfig(**settings).validate()
