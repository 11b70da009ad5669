"""Two encoders side by side are the two run by hand, also after saving, in a cache, and as a graph."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, caller, run, script
from encoders import ENCODERS, PLAIN, SIDE
from PIL import Image
from transformers import (
    AutoModel,
    ConvNextConfig,
    ConvNextModel,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    VisionEncoderDecoderModel,
    ViTConfig,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.data.folder import load_prepared
from captioning.model import captioner, explain, generate, grid, parts, two_encoders
from captioning.training import batches, features

KINDS = ENCODERS | {
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**PLAIN, num_register_tokens=4)),
    "convnext": lambda: ConvNextModel(
        ConvNextConfig(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], patch_size=2, image_size=SIDE)
    ),
}
# Of each kind: pixels a side, mean and deviation of its image processor.
LARGER = {"dinov2": 48, "registers": 24}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """An encoder of each kind with random weights, and an image processor of its own."""
    parts.quiet_transformers()
    root = tmp_path_factory.mktemp("encoders")
    for number, (kind, make) in enumerate(KINDS.items()):
        torch.manual_seed(number)
        make().save_pretrained(root / kind)
        side = LARGER.get(kind, SIDE)
        own = {"image_mean": [0.4, 0.5, 0.1 * number], "image_std": [0.2 + 0.01 * number, 0.3, 0.4]}
        processor = ViTImageProcessorPil(size={"height": side, "width": side}, **own)
        if kind == "clip":
            size = {"height": side, "width": side}
            processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=size, **own)
        processor.save_pretrained(root / kind)
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(["a dog runs on the grass", "two cats and a dog"] * 3, 300)


def bundle_of(names, tokenizer):
    torch.manual_seed(0)
    net = captioner.build(names, "tiny", tokenizer).eval()
    with torch.no_grad():  # random weights attend evenly: make them prefer something
        for name, parameter in net.named_parameters():
            if "crossattention" in name or "wte" in name:
                parameter.mul_(6)
    net.generation_config.update(max_new_tokens=8)
    return captioner.Bundle(net, tokenizer, parts.load_image_processor(names[0], whole=True))


def pictures(count=3):
    noise = np.random.default_rng(0)
    made = [noise.integers(0, 256, (5, 4, 3), np.uint8) for _ in range(count)]
    return [Image.fromarray(one).resize((90, 70), Image.Resampling.BICUBIC) for one in made]


def pixels_of(bundle, images=None):
    return bundle.batch([bundle.pixels(image) for image in images or pictures()])


def by_hand(first, second, sizes):
    """Tokens (batch, tokens, channels) of both, each a class token or none, and its grid -> those of the pair."""

    def parted(states, places):
        states = (states - states.mean(-1, keepdim=True)) / (states.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        patches = states[:, -places[0] * places[1] :]
        return (states[:, 0] if states.shape[1] > patches.shape[1] else None), patches.unflatten(1, places)

    (own, ours), (their_own, theirs) = map(parted, (first, second), sizes)
    if sizes[0] != sizes[1]:
        # A triangle over the sides, as wide as one place of the coarser grid on each side of its middle.
        for axis, (wanted, there) in enumerate(zip(*sizes, strict=True), start=1):
            scale = there / wanted
            middles = (torch.arange(wanted) + 0.5) * scale
            distance = (torch.arange(there)[None] + 0.5 - middles[:, None]).abs() / max(scale, 1)
            weights = (1 - distance).clamp(min=0)
            weights = weights / weights.sum(1, keepdim=True)
            theirs = torch.tensordot(theirs, weights, dims=([axis], [1])).movedim(-1, axis)
    joined = torch.cat([ours, theirs], -1).flatten(1, 2)
    if own is None:
        return joined
    their_own = parted(second, sizes[1])[1].flatten(1, 2).mean(1) if their_own is None else their_own
    return torch.cat([torch.cat([own, their_own], -1)[:, None], joined], 1)


PAIRS = {
    ("clip", "dinov2"): ((4, 4), (6, 6)),  # as CLIP ViT-B/16 and DINOv2: another grid, another size
    ("vit", "registers"): ((4, 4), (3, 3)),
    ("registers", "segformer"): ((3, 3), (4, 4)),  # one without a class token
    ("swin", "vit"): ((4, 4), (4, 4)),  # the first without one
    ("deit", "convnext"): ((4, 4), (2, 2)),  # a map of features
    ("segformer", "clip vision"): ((4, 4), (4, 4)),
}


@pytest.mark.parametrize("kinds", PAIRS, ids="+".join)
def test_the_pair_is_both_encoders_by_hand(kinds, folders, tokenizer, tmp_path):
    names = [folders[kind] for kind in kinds]
    captioner.check_parts(names, "tiny", parts.load_image_processor(names[0], whole=True))
    bundle = bundle_of(names, tokenizer)
    captioner.refuse_misfit(bundle.model.encoder, bundle.image_processor, "it")
    pixels = pixels_of(bundle)
    # Each alone, on the pixels that its own image processor makes of what the first one's left of the images.
    seen = [Image.fromarray(bundle.pixels(image).transpose(1, 2, 0)) for image in pictures()]
    states, differ = [], []
    for name in names:
        alone, _ = captioner.build_encoder(name)
        own = parts.Pixels(parts.load_image_processor(name, whole=True))
        values = own.normalise(torch.from_numpy(np.stack([own(image) for image in seen])))
        states.append(alone.eval()(pixel_values=values)[0].detach())
        differ.append(own.size != bundle.pixels.size)
    with torch.inference_mode():
        found = bundle.model.encoder(pixel_values=pixels).last_hidden_state
    expected = by_hand(*states, PAIRS[kinds])
    assert found.shape == expected.shape and found.shape[2] == bundle.model.encoder.config.hidden_size
    if any(differ):  # Pillow rounds what it resizes to 8 bits
        width = states[0].shape[2]
        torch.testing.assert_close(found[..., :width], expected[..., :width], atol=2e-4, rtol=1e-4)
        assert (found - expected).abs().mean() < 0.02
    else:
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert grid.patch_grid(found.shape[1], pixels.shape[2:], bundle.model.encoder.config) == PAIRS[kinds][0]

    # Saved and loaded it is the same to the bit, and cached features are found again.
    captioner.save(bundle, tmp_path)
    loaded = captioner.load(tmp_path)
    with torch.inference_mode():
        assert torch.equal(loaded.model.encoder(pixel_values=pixels).last_hidden_state, found)
    assert loaded.model.encoder.config.to_json_string() == bundle.model.encoder.config.to_json_string()
    assert str(Path(names[0]).parent) not in (tmp_path / "config.json").read_text(), "a path of this machine"
    for part, name in zip(("first", "second"), names, strict=True):
        alone = captioner.build_encoder(name)[0].state_dict()
        ours = getattr(bundle.model.encoder, part).state_dict()
        assert all(torch.equal(alone[key], ours[key]) for key in alone if not parts_unread(key))


def parts_unread(parameter: str) -> bool:
    """Whether a parameter may be missing from a sound file, and random then."""
    return "pooler" in parameter or "mask_token" in parameter


def test_the_second_one_sees_what_its_own_image_processor_makes(folders, tokenizer):
    names = [folders["vit"], folders["deit"]]
    encoder = captioner.build_encoder(names)[0]
    ours, theirs = (parts.Pixels(parts.load_image_processor(name)) for name in names)
    values = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, SIDE, SIDE), np.uint8))
    torch.testing.assert_close(encoder.for_second(ours.normalise(values)), theirs.normalise(values))
    alike = captioner.build_encoder(["tiny", "mit"])[0].config
    assert (list(alike.second_scale), list(alike.second_shift)) == ([1, 1, 1], [0, 0, 0]), "exactly"


def test_cached_features_are_the_live_ones(trained_pair, tmp_path):
    bundle = captioner.load(trained_pair / "run")
    rows = load_prepared(trained_pair / "data")[0]["validation"]
    dataset = batches.CaptionDataset(rows, bundle.pixels)
    cache = features.FeatureCache(bundle, tmp_path, 4, print)
    kept = cache.features(dataset, "validation")
    live = bundle.model.encoder.eval()(pixel_values=pixels_of(bundle, [rows.image(row) for row in range(len(rows))]))
    np.testing.assert_allclose(kept[0].astype(np.float32), live[0][0].detach().numpy(), atol=4e-3)
    before = cache.fingerprint(dataset)
    bundle.model.encoder.config.second_shift = [0.1, 0.0, 0.0]
    assert cache.fingerprint(dataset) != before


def test_gradients_reach_both_with_less_memory_too(tokenizer):
    bundle = bundle_of(["tiny", "mit"], tokenizer)
    net, pixels = bundle.model.train(), pixels_of(bundle)
    labels = torch.randint(1, 200, (3, 6), generator=torch.Generator().manual_seed(0))
    found = []
    for less_memory in (False, True):
        if less_memory:
            net.activation_checkpointing_enable()
        net.zero_grad()
        net(pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
        found.append({name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None})
    assert {".".join(name.split(".")[:2]) for name in found[0]} >= {"encoder.first", "encoder.second"}
    assert {captioner.part_of(name) for name in found[0]} == set(captioner.PARTS)
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], atol=1e-5, rtol=1e-3)
    net.set_attn_implementation("eager")
    assert {part.config._attn_implementation for part in (net.encoder.first, net.encoder.second)} == {"eager"}


# ---- the scripts


TRAINING = ["--use_cpu", "--bf16=False", "--dataloader_num_workers=0", "--freeze_encoder", "--cache_features"]


@pytest.fixture(scope="module")
def trained_pair(tmp_path_factory) -> Path:
    """A folder with `data` and `run`, of a training of seconds."""
    root = tmp_path_factory.mktemp("pair")
    done = script(
        "dataloader.py", "--sample", "--limit_data=40", "--encoder", "tiny", "mit", "--decoder=tiny", "--num_proc=1",
        f"--save_path={root / 'data'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "for tiny + mit" in done.stderr
    words = [*TRAINING, f"--data_path={root / 'data'}", f"--output_dir={root / 'run'}", "--epochs=1"]
    done = script("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert "model: tiny + mit -> tiny" in done.stderr
    return root


def test_a_training_ends_with_a_folder_like_any_other(trained_pair, tmp_path, monkeypatch, capsys):
    run_folder = trained_pair / "run"
    assert json.loads((trained_pair / "data" / "dataset.json").read_text())["encoder"] == ["tiny", "mit"]
    results = json.loads((run_folder / "results.json").read_text())
    assert results["model"]["encoder"] == ["tiny", "mit"] and results["test"]["images"] == 4
    assert captioner.names_of(run_folder) == {"encoder": ["tiny", "mit"], "decoder": "tiny"}
    for page in ("report.html", "README.md"):
        assert "tiny + mit" in (run_folder / page).read_text(), page
    assert "import captioning.model.two_encoders" in (run_folder / "README.md").read_text()

    # Self-critical training goes on from it, with the features that are there; a file of flags may name two.
    flags = tmp_path / "flags.yaml"
    flags.write_text("encoder: [mit, tiny]")
    for more, message, names in (
        ([f"--model_path={run_folder}", "--self_critical_epochs=1"], "features: train from", ["tiny", "mit"]),
        ([f"--config={flags}"], "model: mit + tiny -> tiny", ["mit", "tiny"]),
    ):
        words = [*TRAINING, f"--data_path={trained_pair / 'data'}", f"--output_dir={tmp_path / names[0]}", "--epochs=1"]
        assert run("train", [*words, *more], monkeypatch) == 0
        assert message in capsys.readouterr().err
        assert captioner.names_of(tmp_path / names[0])["encoder"] == names


def test_plain_transformers_reads_it_after_one_import(trained_pair):
    code = (
        "import sys, torch, transformers; transformers.logging.set_verbosity_error()\n"
        "load = transformers.VisionEncoderDecoderModel.from_pretrained\n"
        "try: load(sys.argv[1])\n"
        "except Exception as error: print(type(error).__name__)\n"
        "import captioning.model.two_encoders\n"
        "print(load(sys.argv[1]).encoder(torch.full((1, 3, 64, 64), 0.5))[0].abs().sum().item())"
    )
    command = [sys.executable, "-c", code, str(trained_pair / "run")]
    alone, found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    ours = captioner.load(trained_pair / "run").model.encoder(torch.full((1, 3, 64, 64), 0.5))[0].abs().sum()
    assert alone.endswith("Error") and float(found) == pytest.approx(ours.item(), rel=1e-5)


def test_inference_does_with_it_what_it_does_with_others(trained_pair, capsys, tmp_path):
    call = caller(trained_pair / "run", capsys)
    photo = tmp_path / "photo.png"
    pictures(1)[0].save(photo)
    for flags in ((), ("--alternatives=2",), ("--dtype=bfloat16",), ("--json",), ("--max_words=3",)):
        code, out, _ = call(photo, *flags)
        assert code == 0 and out.strip(), flags
    assert call(photo, f"--explain={tmp_path / 'out.png'}")[0] == 0 and (tmp_path / "out.png").is_file()
    bundle = captioner.load(trained_pair / "run")
    words = explain.explain(bundle, pictures(1)[0]).words
    assert all(word.attention.shape == (8, 8) and word.attention.sum() <= 1.0001 for word in words)
    code, out, _ = call(f"--data_path={trained_pair / 'data'}", "--split=test")
    assert code == 0 and "cider_d" in out
    code, alone, _ = call(photo)
    assert call(photo, "--ensemble", trained_pair / "run")[1] == alone  # with itself


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("onnx", "onnxruntime", "onnxscript"))), reason="needs onnxruntime"
)
def test_an_exported_pair_gives_the_same_captions(folders, tokenizer, tmp_path):
    from captioning.model import onnx_captioner, onnx_export

    bundle = bundle_of([folders["clip"], folders["dinov2"]], tokenizer)  # normalised anew, and resized
    texts = [generate.decode(tokenizer, [[token]])[0] for token in range(len(tokenizer))]
    blank = [token for token, text in enumerate(texts) if token and not (text and text.isprintable())]
    bundle.model.generation_config.update(suppress_tokens=blank)
    captioner.save(bundle, tmp_path / "run")
    onnx_export.export(tmp_path / "run", tmp_path / "exported")
    pixels = pixels_of(bundle)
    ours = onnx_captioner.generate(onnx_captioner.load(tmp_path / "exported"), pixels.numpy())
    assert ours == generate.generate(bundle, pixels) and any(ours)


# ---- what cannot be


BAD = {
    "three": (["tiny", "mit", "small"], "--encoder names 3 encoders; give one, or two that see side by side"),
    "twice": (["tiny", "tiny"], "--encoder names 'tiny' twice"),
    "the second is none": (["tiny", "no such"], "--encoder 'no such' is not a folder, and not an id"),
    "the second speaks": (["tiny", "{gpt2}"], "--encoder '.*gpt2' is a gpt2, not a vision encoder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_pairs_are_refused_in_one_sentence(what, trained_pair, tokenizer, tmp_path, monkeypatch, capsys):
    data = trained_pair / "data"
    names, message = BAD[what]
    (tmp_path / "gpt2").mkdir()
    decoder = captioner.build_decoder("tiny", tokenizer)[0]
    decoder.save_pretrained(tmp_path / "gpt2")
    shutil.copy(data / "preprocessor_config.json", tmp_path / "gpt2")
    names = [name.format(gpt2=tmp_path / "gpt2") for name in names]
    prepare = ["--sample", "--limit_data=30", "--decoder=tiny", "--num_proc=1", f"--save_path={tmp_path / 'data'}"]
    for command in (
        ("dataloader", [*prepare, "--encoder", *names]),
        ("train", [f"--data_path={data}", f"--output_dir={tmp_path / 'run'}", "--use_cpu", "--encoder", *names]),
    ):
        assert run(*command, monkeypatch) == 2
        said = capsys.readouterr().err
        assert re.search(message, said) and "Traceback" not in said
    assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_one_rate_is_not_for_two_that_differ_in_what_they_know(trained_pair, folders, tmp_path, monkeypatch, capsys):
    words = [f"--data_path={trained_pair / 'data'}", f"--output_dir={tmp_path / 'run'}", "--use_cpu"]
    assert run("train", [*words, "--encoder", "tiny", folders["vit"]], monkeypatch) == 2
    assert "one starts from random weights and the other has learnt already" in capsys.readouterr().err


def test_tokens_without_a_grid_are_refused():
    net = captioner.build_encoder(["tiny", "mit"])[0]
    net.second.config.patch_size = 15  # 4 x 4 places of 60 pixels, and 36 tokens
    net.second.config.model_type = "odd"
    with pytest.raises(InputError, match="the 36 tokens of a odd encoder are no grid of patches"):
        captioner.give_patch_states(net, "it")


def change(file: Path, *keys, **values) -> None:
    content = place = json.loads(file.read_text())
    for key in keys:
        place = place[key]
    place.update(values)
    file.write_text(json.dumps(content))


PAIR = ("encoder",)
DAMAGED = [
    (PAIR, {"second_image_size": [4096, 4096]}, "in 262,144 patches, and 16,384 are the most|in 589,824 patches"),
    (PAIR, {"second_image_size": [0, 32]}, "says second_image_size .*, and a number from 1"),
    (PAIR, {"second_image_size": [32]}, "second_image_size is not a height and a width"),
    (PAIR, {"second_image_size": 32}, "second_image_size is not a height and a width"),
    (PAIR, {"second_scale": [1, 1]}, "second_scale is not three numbers"),
    (PAIR, {"second_scale": ["a", 1, 1]}, "second_scale is not three numbers"),
    (PAIR, {"second_shift": [1e30, 0, 0]}, "says second_shift"),
    (PAIR, {"second_shift": None}, "second_shift is not three numbers"),
    (PAIR, {"image_size": "large"}, "image_size is not a height and a width"),
    (PAIR, {"image_size": [64, 48]}, "not a vision encoder|does not take"),
    (PAIR, {"hidden_size": 7}, "does not fit its config.json|config.json"),
    (PAIR, {"hidden_size": [7]}, "hidden_size is not a number of channels"),
    ((*PAIR, "first"), {"num_hidden_layers": 999}, "says num_hidden_layers 999, and its weights hold"),
    ((*PAIR, "second"), {"depths": [900, 900]}, "says depths .*, and its weights hold"),
    ((*PAIR, "first"), {"image_size": 4096}, "in 262,144 patches"),
    ((*PAIR, "second"), {"auto_map": {"AutoModel": "code.Model"}}, "asks to run code of its own"),
    ((*PAIR, "second"), {"model_type": "gpt2"}, "config.json|lacks|not a vision encoder|fit"),
    ((*PAIR, "first"), {"model_type": two_encoders.KIND, "image_size": [9, 9]}, "is side_by_side_encoders itself"),
    ((*PAIR, "first"), {"model_type": "nothing"}, "config.json"),
    (PAIR, {"first": 5}, "config.json"),
    (PAIR, {"second": None}, "lacks|fit|config.json"),
]


@pytest.mark.parametrize(("keys", "values", "message"), DAMAGED, ids=lambda value: str(value)[:40])
def test_a_stranger_s_pair_is_refused_in_one_sentence(keys, values, message, trained_pair, tmp_path):
    folder = Path(shutil.copytree(trained_pair / "run", tmp_path / "run", ignore=shutil.ignore_patterns("check*")))
    change(folder / "config.json", *keys, **values)
    with pytest.raises(InputError) as error:
        captioner.load(folder)
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


def test_settings_that_cannot_be_are_refused_by_the_class_itself():
    with pytest.raises(ValueError, match="second_scale"):
        two_encoders.TwoEncodersConfig(second_scale=[1.0])
    whole = two_encoders.TwoEncodersConfig(first=ViTConfig(**PLAIN), second=ViTConfig(**PLAIN), hidden_size=32)
    assert isinstance(AutoModel.from_config(whole), two_encoders.TwoEncoders)
    assert VisionEncoderDecoderModel.main_input_name == two_encoders.TwoEncoders.main_input_name


def test_real_weights_side_by_side(shared, tokenizer):
    names = [str(shared / "weights" / "dinov2-small"), "tiny"]
    bundle = bundle_of(names, tokenizer)
    pixels = pixels_of(bundle)
    alone = captioner.build_encoder(names[0])[0].eval()
    with torch.inference_mode():
        states, found = alone(pixel_values=pixels)[0], bundle.model.encoder(pixel_values=pixels).last_hidden_state
    assert found.shape == (3, 257, 384 + 128)
    torch.testing.assert_close(found[..., :384], torch.nn.functional.layer_norm(states, (384,)), atol=1e-4, rtol=1e-4)
