"""Model folders that carry code: it is refused and never runs. A payload that would leave a file behind tells."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, ViTConfig, ViTModel
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning import InputError
from captioning.model import captioner, parts

SIDE = 32
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


class Payload:
    """Runs when it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.fixture
def folder(tmp_path):
    """A whole captioner, which `load`, `build` and `load_tokenizer` take."""
    tokenizer = parts.train_tokenizer(["a dog runs"] * 3, 300)
    encoder = ViTModel(ViTConfig(image_size=SIDE, patch_size=8, **SIZES))
    decoder = GPT2LMHeadModel(
        GPT2Config(
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=64,
            vocab_size=len(tokenizer),
            is_decoder=True,
            add_cross_attention=True,
        )
    )
    net = VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    image_processor = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE})
    captioner.save(captioner.Bundle(net, tokenizer, image_processor), tmp_path / "captioner")
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    for part in ("encoder", "decoder"):
        tokenizer.save_pretrained(tmp_path / part)
        image_processor.save_pretrained(tmp_path / part)
    return tmp_path


def open_everything(folder: Path) -> list[str]:
    """What the three scripts open, one after the other; the refusals."""
    tokenizer = parts.train_tokenizer(["a dog runs"] * 3, 300)
    calls = [
        lambda: captioner.load(folder / "captioner"),
        lambda: captioner.build(str(folder / "encoder"), "tiny", tokenizer),
        lambda: captioner.build("tiny", str(folder / "decoder"), tokenizer),
        lambda: parts.load_tokenizer(folder / "decoder"),
        lambda: parts.load_image_processor(folder / "encoder"),
    ]
    refusals = []
    for call in calls:
        try:
            call()
            refusals.append("")
        except InputError as error:
            refusals.append(str(error))
    return refusals


def three_folders(folder: Path):
    return [folder / name for name in ("captioner", "encoder", "decoder")]


def test_the_folders_are_taken_as_they_are(folder):
    assert open_everything(folder) == [""] * 5


@pytest.mark.parametrize(
    ("name", "how"), [("pytorch_model.bin", "torch"), ("pytorch_model.bin", "pickle"), ("model.ckpt", "torch")]
)
def test_pickled_weights_do_not_run(name, how, folder):
    mark = folder / "it ran"
    for part in three_folders(folder):
        (part / "model.safetensors").unlink()
        if how == "torch":
            torch.save({"weight": Payload(mark)}, part / name)
        else:
            (part / name).write_bytes(pickle.dumps(Payload(mark)))
    refusals = open_everything(folder)
    reason = "asks to run code when it is opened" if name == "pytorch_model.bin" else "not a name that transformers"
    assert all(reason in refusal for refusal in refusals[:3])
    assert not mark.exists()
    torch.load(folder / "encoder" / name, weights_only=False) if how == "torch" else pickle.loads(
        (folder / "encoder" / name).read_bytes()
    )
    assert mark.exists(), "the payload is one"


def test_pickles_beside_safe_weights_are_left_alone(folder):
    mark = folder / "it ran"
    for part in three_folders(folder):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.pkl", "scheduler.pt"):
            (part / name).write_bytes(pickle.dumps(Payload(mark)))
    assert open_everything(folder) == [""] * 5
    assert not mark.exists()


def plant_code(part: Path, mark: Path) -> None:
    code = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    names = ("Config", "Model", "Tokenizer", "Processor")
    code += "".join(f"class {name}:\n    pass\n" for name in names)
    (part / "evil.py").write_text(code)


@pytest.mark.parametrize(
    ("file", "entry", "refused"),
    [
        ("config.json", {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, {0, 1, 2}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}, set()),
        ("preprocessor_config.json", {"AutoImageProcessor": "evil.Processor"}, set()),
    ],
)
@pytest.mark.parametrize("known", [True, False], ids=["a known class beside it", "that class alone"])
def test_code_beside_a_model_does_not_run(file, entry, refused, known, folder, monkeypatch):
    mark = folder / "it ran"
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
    for part in three_folders(folder):
        plant_code(part, mark)
        content = json.loads((part / file).read_text()) | {"auto_map": entry}
        if not known:
            for key in ("model_type", "tokenizer_class", "image_processor_type", "processor_class"):
                if key in content:
                    content[key] = "Evil"
        (part / file).write_text(json.dumps(content))
    refusals = open_everything(folder)
    assert not mark.exists()
    for number in refused:
        assert "code of its own (auto_map)" in refusals[number]
    assert not any(os.walk(folder / "modules"))
