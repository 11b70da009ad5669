"""Captions without PyTorch: the search in numpy, the pixels, and exported graphs, each against the usual path."""

import csv
import importlib.util
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, contents
from encoders import ENCODERS, SIDE
from PIL import Image
from transformers import GenerationConfig
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import inference
from captioning import InputError
from captioning.model import captioner, explain, generate, onnx_captioner, parts, strip
from captioning.model.beam_search import Decoding, search
from captioning.scores import confidence
from captioning.show import serve

MISSING = [name for name in ("onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install onnxruntime onnx onnxscript"
)


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(["a dog runs on the grass", "two cats and a dog"] * 3, 300)


def make_bundle(tokenizer, encoder="tiny", processor=None):
    """A captioner of random weights whose captions differ from image to image."""
    torch.manual_seed(0)
    net = captioner.build(str(encoder), "tiny", tokenizer).eval()
    with torch.no_grad():  # random weights attend evenly: make them prefer something
        for name, parameter in net.named_parameters():
            if "crossattention" in name or "wte" in name:
                parameter.mul_(6)
    texts = [generate.decode(tokenizer, [[token]])[0] for token in range(len(tokenizer))]
    blank = [token for token, text in enumerate(texts) if not text.isprintable() or not text]
    blank.remove(tokenizer.eos_token_id)
    net.generation_config.update(max_new_tokens=12, min_new_tokens=2, suppress_tokens=blank)
    return captioner.Bundle(net, tokenizer, processor or parts.load_image_processor(encoder))


def photographs(count=6, width=90, height=60):
    noise = np.random.default_rng(0)
    made = [noise.integers(0, 256, (3 + n % 3, 4, 3), np.uint8) for n in range(count)]
    return [Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC) for one in made]


def pixels_of(bundle, pictures):
    return bundle.pixels.normalise(torch.from_numpy(np.stack([bundle.pixels(one) for one in pictures])))


# ---- the search


@pytest.fixture(scope="module")
def bundle(tokenizer):
    return make_bundle(tokenizer)


class Step:
    """The decoder in torch, without a cache, as a step of the search."""

    def __init__(self, bundle, states):
        self.decoder, self.states, self.tokens = bundle.model.decoder, states, None

    @torch.no_grad()
    def __call__(self, tokens, came_from):
        if came_from is not None:
            self.tokens = self.tokens[came_from]
        self.tokens = tokens if self.tokens is None else np.concatenate([self.tokens, tokens], 1)
        states = self.states.repeat_interleave(len(tokens) // len(self.states), 0)
        outputs = self.decoder(input_ids=torch.from_numpy(self.tokens), encoder_hidden_states=states, use_cache=False)
        return outputs.logits[:, -1].numpy()


SETTINGS = [
    {"num_beams": 1},
    {"num_beams": 1, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    {"num_beams": 2},
    {"num_beams": 3},
    {"num_beams": 3, "max_new_tokens": 1, "min_new_tokens": 0},
    {"num_beams": 3, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "length_penalty": -1.0},
    {"num_beams": 4, "early_stopping": True},
    {"num_beams": 4, "no_repeat_ngram_size": 1, "min_new_tokens": 4},
    {"num_beams": 5, "repetition_penalty": 1.7, "suppress_tokens": [260, 261, 270]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(f"{k}={v}" for k, v in settings.items()))
def test_the_search_gives_the_tokens_of_transformers(bundle, settings):
    config = {**bundle.model.generation_config.to_diff_dict(), **settings}
    decoding = Decoding.read(config, bundle.model.decoder.config.vocab_size, 128, "the model")
    states = bundle.model.encoder(pixel_values=pixels_of(bundle, photographs())).last_hidden_state.detach()
    for count in {1, decoding.num_beams}:
        found = search(Step(bundle, states), len(states), decoding, count)
        expected = generate.generate_tokens(bundle.model, states, num_return_sequences=count, **settings)
        width = max(found.shape[1], expected.shape[1])
        pad = {"constant_values": decoding.pad}
        found = np.pad(found, ((0, 0), (0, width - found.shape[1])), **pad)
        expected = np.pad(expected.numpy(), ((0, 0), (0, width - expected.shape[1])), **pad)
        assert found.tolist() == expected.tolist()
    assert len({tuple(row) for row in found.tolist()}) > 2, "captions that are all the same show nothing"


@pytest.mark.parametrize("setting", [{"do_sample": True}, {"bad_words_ids": [[5]]}, {"eos_token_id": [0, 1]}])
def test_other_searches_are_refused(bundle, setting):
    config = GenerationConfig(**{**bundle.model.generation_config.to_diff_dict(), **setting}).to_diff_dict()
    with pytest.raises(InputError, match=r"generation_config\.json"):
        Decoding.read(config, 300, 128, "--model_path 'run'")


@pytest.mark.parametrize(
    "setting",
    [
        *({"num_beams": value} for value in ("3", 0, 10**7, True)),
        *({"max_new_tokens": value} for value in ("x", 0, 128)),
        {"max_length": "a"},
        {"length_penalty": "a"},
        *({"eos_token_id": value} for value in (-5, 300)),
        {"suppress_tokens": [300]},
    ],
    ids=str,
)
def test_settings_of_a_search_that_cannot_be_are_refused_in_a_sentence(setting):
    """As `captioner.load` refuses them, which needs torch."""
    sound = {"decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "num_beams": 3, "max_new_tokens": 40}
    Decoding.read(sound, 300, 128, "--model_path 'exported'")
    (name,) = setting
    with pytest.raises(InputError, match=f"says {name} .*, which is not .*; export it again"):
        Decoding.read({**sound, **setting}, 300, 128, "--model_path 'exported'")


# ---- the pixels

PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    "bilinear, not square": ViTImageProcessorPil(size={"height": 40, "width": 31}, resample=2, do_rescale=True),
    "deit": DeiTImageProcessorPil(size={"height": 40, "width": 40}, crop_size={"height": SIDE, "width": SIDE}),
    "clip": CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
    "a crop larger than the image": CLIPImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 33, "width": 32}
    ),
    "bit": BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": SIDE, "width": SIDE}),
    "no normalisation": ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, do_normalize=False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_the_pixels_are_those_of_the_image_processor(kind):
    ours = onnx_captioner.Pixels(PROCESSORS[kind].to_dict(), "it")
    usual = parts.Pixels(PROCESSORS[kind])
    assert ours.resized_side == usual.resized_side
    for width, height in ((90, 60), (61, 200), (32, 32), (33, 31), (7, 500)):
        for picture in photographs(2, width, height):
            found, expected = ours(picture), usual(picture)
            assert found.dtype == np.uint8 and np.array_equal(found, expected)
            normalised = usual.normalise(torch.from_numpy(expected)[None])
            assert np.array_equal(ours.normalise(found[None]), normalised.numpy())


@pytest.mark.parametrize("size", [(1, 32768), (8001, 2), (3, 30000)], ids=str)
@pytest.mark.parametrize("kind", ["clip", "bit"])
def test_a_strip_takes_no_more_memory_than_another_image(kind, size, monkeypatch):
    """Its shorter side is enlarged before the crop. What the crop sees is the same in the middle part alone."""
    largest = []
    resize = Image.Image.resize

    def watched(image, size, *more, **settings):
        largest.append(max(size))
        return resize(image, size, *more, **settings)

    monkeypatch.setattr(Image.Image, "resize", watched)
    base = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    middle = [slice(side // 2 - 200, side // 2 + 200 + side % 2) if side > 500 else slice(None) for side in base.shape]
    for pixels in (parts.Pixels(PROCESSORS[kind]), onnx_captioner.Pixels(PROCESSORS[kind].to_dict(), "it")):
        found = pixels(Image.fromarray(base))
        assert largest and max(largest) <= strip.MOST_RESIZED
        part = pixels(Image.fromarray(np.ascontiguousarray(base[middle[0], middle[1]])))
        assert np.abs(found.astype(int) - part).max() <= 3  # sides are whole pixels, so that scales differ a little


# ---- exported folders


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """The trained tiny captioner, exported as a user does it."""
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}: pip install onnxruntime onnx onnxscript")
    folder = tmp_path_factory.mktemp("exported") / "exported"
    assert inference.main([f"--model_path={trained}", "--export=onnx", f"--output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, picture in enumerate(photographs(7)):
        picture.save(folder / f"{number}.png")
    photographs(1)[0].convert("L").save(folder / "grey.jpg")
    return folder


def call(capsys, *arguments):
    code = inference.main(list(map(str, arguments)))
    return code, capsys.readouterr().out


def without_seconds(out):
    entries = [json.loads(line) for line in out.splitlines()]
    for entry in entries:
        del entry["seconds"]
    return entries


def test_the_layout_is_that_of_transformers_js(exported, trained):
    import onnx

    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert names == {
        "onnx/encoder_model.onnx",
        "onnx/encoder_model_quantized.onnx",
        "onnx/decoder_model_merged.onnx",
        "onnx/decoder_model_merged_quantized.onnx",
        "config.json",
        "confidence.json",
        "generation_config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((exported / "config.json").read_text())
    cache = [f"{layer}.{kind}" for layer in range(config["decoder"]["n_layer"]) for kind in ("key", "value")]
    for kind in ("", "_quantized"):
        graphs = [
            onnx.load(exported / "onnx" / f"{name}{kind}.onnx") for name in ("encoder_model", "decoder_model_merged")
        ]
        encoder, decoder = graphs
        assert all(opset.version == 20 for graph in graphs for opset in graph.opset_import if opset.domain == "")
        assert [one.name for one in encoder.graph.input] == ["pixel_values"]
        assert [one.name for one in encoder.graph.output] == ["last_hidden_state"]
        assert [one.name for one in decoder.graph.input] == [
            "input_ids",
            "encoder_hidden_states",
            *(f"past_key_values.{name}" for name in cache),
        ]
        assert [one.name for one in decoder.graph.output] == ["logits", *(f"present.{name}" for name in cache)]
        past = decoder.graph.input[2].type.tensor_type.shape.dim
        # transformers.js reads these two names to make the empty cache of the first token.
        assert (past[0].dim_param, past[2].dim_param) == ("batch_size", "past_sequence_length")
    assert "_name_or_path" not in (exported / "config.json").read_text()
    assert str(trained) not in "".join(map(str, contents(exported).values()))


@pytest.mark.parametrize(
    "options", [[], ["--num_beams=1"], ["--num_beams=5", "--max_new_tokens=6"], ["--alternatives=4"]]
)
def test_captions_and_their_scores_are_those_of_pytorch(exported, trained, pictures, capsys, options):
    outs = []
    for model in (trained, exported):
        code, out = call(capsys, f"--model_path={model}", "--image_path", pictures, "--json", "--device=cpu", *options)
        assert code == 0
        outs.append(without_seconds(out))
    usual, ours = outs
    for expected, found in zip(usual, ours, strict=True):
        assert found["caption"] == expected["caption"] and found["path"] == expected["path"]
        assert [one["caption"] for one in found["alternatives"]] == [one["caption"] for one in expected["alternatives"]]
        assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
        assert [(token["id"], token["text"]) for token in found["tokens"]] == [
            (token["id"], token["text"]) for token in expected["tokens"]
        ]
        for one, other in zip(found["tokens"], expected["tokens"], strict=True):
            assert one["log_probability"] == pytest.approx(other["log_probability"], abs=1e-3)
        assert found["confidence"] == pytest.approx(expected["confidence"], abs=1e-3)
        assert [word["text"] for word in found["words"]] == [word["text"] for word in expected["words"]]


def test_plain_captions_do_not_depend_on_the_batch(exported, trained, pictures, capsys):
    outputs = {
        call(capsys, f"--model_path={model}", "--image_path", pictures, f"--batch_size={size}")
        for model, size in ((trained, 16), (exported, 1), (exported, 3), (exported, 16))
    }
    assert len(outputs) == 1


def test_int8_captions_come_with_the_flag_or_where_there_is_nothing_else(exported, pictures, capsys, tmp_path):
    code, out = call(capsys, f"--model_path={exported}", "--image_path", pictures, "--int8")
    assert code == 0 and len(out.splitlines()) == 8
    small = tmp_path / "small"
    for path, data in contents(exported).items():
        if not path.endswith(("encoder_model.onnx", "merged.onnx")):
            target = small / path.removeprefix(f"{exported}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    assert call(capsys, f"--model_path={small}", "--image_path", pictures) == (code, out)


def test_a_split_is_scored_as_with_pytorch(exported, trained, prepared, capsys, tmp_path):
    scores = []
    for model in (trained, exported):
        output = tmp_path / f"{model.name}.json"
        scores.append(
            call(capsys, f"--model_path={model}", f"--data_path={prepared}", f"--output={output}", "--split=test")
        )
    assert scores[0] == scores[1]
    assert (tmp_path / "run.json").read_bytes() == (tmp_path / "exported.json").read_bytes()


def test_an_export_knows_how_sure_it_is(exported, trained, pictures, capsys, tmp_path):
    assert confidence.read(exported) == confidence.read(trained)
    tables = []
    for model in (trained, exported):
        output = tmp_path / f"{model.name}.csv"
        flags = [f"--model_path={model}", f"--image_path={pictures}", f"--output={output}", "--device=cpu"]
        assert call(capsys, *flags, "--min_confidence=1")[0] == 0
        tables.append([(row["path"], row["draft"]) for row in csv.DictReader(output.open())])
    assert tables[0] == tables[1] and all(draft for _, draft in tables[0])
    answer = serve.Captioner(onnx_captioner.load(exported), calibration=confidence.read(exported))
    assert answer.file(str(pictures / "1.png")).sure.startswith("Confidence: ")
    folder = tmp_path / "earlier"
    shutil.copytree(exported, folder, ignore=shutil.ignore_patterns("confidence.json"))
    (entry,) = without_seconds(call(capsys, f"--model_path={folder}", "--json", pictures / "1.png")[1])
    assert "confidence" not in entry and "words" not in entry
    with pytest.raises(InputError, match=r"needs confidence.json, which .* lacks; export a run folder that has it"):
        inference.main([f"--model_path={folder}", "--min_confidence=0.5", str(pictures / "1.png")])


def test_no_torch_is_loaded(exported, pictures):
    code = (
        "import sys, inference; code = inference.main(sys.argv[1:]); "
        "print({'torch', 'transformers', 'datasets'} & {*sys.modules}, code)"
    )
    command = [sys.executable, "-c", code, f"--model_path={exported}", "--json", str(pictures / "1.png")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "set() 0" and json.loads(done.stdout.splitlines()[0])["caption"]


@needs_onnx
@pytest.mark.parametrize(
    "kind", [kind if kind == "dinov2" else pytest.param(kind, marks=pytest.mark.slow) for kind in sorted(ENCODERS)]
)
def test_every_kind_of_encoder_gives_the_same_captions(kind, tokenizer, tmp_path):
    from captioning.model import onnx_export

    torch.manual_seed(0)
    encoder = tmp_path / "encoder"
    ENCODERS[kind]().save_pretrained(encoder)
    size = {"height": SIDE, "width": SIDE}
    ViTImageProcessorPil(size=size).save_pretrained(encoder)
    bundle = make_bundle(tokenizer, encoder)
    captioner.save(bundle, tmp_path / "run")
    onnx_export.export(tmp_path / "run", tmp_path / "exported")
    ours = onnx_captioner.load(tmp_path / "exported")
    pixels = pixels_of(bundle, photographs(5))
    assert onnx_captioner.generate(ours, pixels.numpy()) == generate.generate(bundle, pixels)
    found, expected = onnx_captioner.best_captions(ours, pixels.numpy(), 3), explain.best_captions(bundle, pixels, 3)
    assert [[one.text for one in image] for image in found] == [[one.text for one in image] for image in expected]
    assert len({images[0].text for images in expected}) > 1


@needs_onnx
def test_what_cannot_be_exported_or_asked_of_an_export_is_refused(exported, trained, tokenizer, tmp_path, pictures):
    photo = str(pictures / "1.png")
    for arguments, message in (
        ([f"--model_path={trained}", "--export=onnx"], "--export needs --output"),
        ([f"--model_path={trained}", "--export=onnx", f"--output={exported}"], "exists and is not an empty folder"),
        (
            [f"--model_path={exported}", "--export=onnx", f"--output={tmp_path / 'x'}"],
            "--export needs PyTorch's weights",
        ),
        ([f"--model_path={trained}", "--int8", photo], "--int8 needs an exported folder"),
        ([f"--model_path={exported}", photo, f"--explain={tmp_path / 'x.png'}"], "--explain needs PyTorch's weights"),
        ([f"--model_path={exported}", photo, f"--ensemble={trained}"], "--ensemble needs PyTorch's weights"),
        ([f"--model_path={trained}", photo, f"--ensemble={exported}"], "is an exported folder; name the run folder"),
        ([f"--model_path={exported}", photo, "--device=cuda"], "run on the CPU only"),
        ([f"--model_path={exported}", photo, "--max_new_tokens=9999"], "is too long; the decoder has"),
    ):
        with pytest.raises((InputError, SystemExit)) as refused:
            inference.main(arguments)
        if isinstance(refused.value, InputError):
            assert message in str(refused.value)
    before = contents(exported)
    bundle = make_bundle(tokenizer, processor=ConvNextImageProcessorPil(size={"shortest_edge": 64}, crop_pct=0.9))
    captioner.save(bundle, tmp_path / "crop_pct")
    bundle = make_bundle(tokenizer)
    bundle.model.generation_config.do_sample = True
    captioner.save(bundle, tmp_path / "sampling")
    from captioning.model import onnx_export

    for name, message in (("crop_pct", "cannot be used"), ("sampling", "do_sample")):
        with pytest.raises(InputError, match=message):
            onnx_export.export(tmp_path / name, tmp_path / "x")
    assert not (tmp_path / "x").exists() and contents(exported) == before


@needs_onnx
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("onnx/encoder_model.onnx", b"half", "not a whole ONNX file"),
        ("onnx/decoder_model_merged.onnx", None, "has no onnx/decoder_model_merged.onnx"),
        ("tokenizer.json", b"{}", "cannot be read"),
        ("preprocessor_config.json", b'{"do_resize": true, "size": {"longest_edge": 9}}', "cannot be used"),
        ("preprocessor_config.json", b'{"size": {"shortest_edge": 1000000}}', "which is not a side from 1 to 4,096"),
        ("generation_config.json", b"[]", "not a JSON object"),
        ("config.json", b"{}", "n_positions"),
        ("config.json", b'{"decoder": {"n_positions": 128, "vocab_size": -1}}', "which is not a whole number from 1"),
    ],
)
def test_a_damaged_folder_is_refused_in_a_sentence(exported, pictures, tmp_path, name, content, message):
    for path, data in contents(exported).items():
        target = tmp_path / "copy" / path.removeprefix(f"{exported}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)
    damaged = tmp_path / "copy" / name
    damaged.unlink() if content is None else damaged.write_bytes(content)
    with pytest.raises(InputError, match=message) as refused:
        inference.main([f"--model_path={tmp_path / 'copy'}", str(pictures / "1.png")])
    assert "\n" not in str(refused.value)


def test_without_onnxruntime_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "encoder_model.onnx").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    with pytest.raises(InputError, match="pip install onnxruntime"):
        inference.main([f"--model_path={tmp_path}", str(tmp_path / "photo.png")])
