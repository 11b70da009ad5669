"""Faster products on a CPU change nothing but the time: beside the plain ones, layer by layer, caption by caption."""

import json

import pytest
import torch
from toy import toy_tokenizer
from transformers.pytorch_utils import Conv1D

import inference
from captioning.model import captioner, fast, generate, parts

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("dtype", fast.DTYPES)
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (1, 1, 24)])
def test_a_layer_gives_what_it_gave(dtype, shape):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(24, 40), torch.nn.Linear(24, 9, bias=False), Conv1D(16, 24)]
    x = torch.randn(shape)
    for layer in layers:
        with torch.inference_mode():
            before = layer(x)
            assert fast.prepare(layer, dtype)
            after = layer(x)
        assert after.dtype == torch.float32 and after.shape == before.shape
        assert torch.allclose(before, after, atol=1e-5 if dtype == "float32" else 0.03)
        assert dtype == "float32" or not torch.equal(before, after)


def test_captions_are_the_same():
    torch.manual_seed(0)
    tokenizer = toy_tokenizer()
    bundle = captioner.Bundle(
        captioner.build("tiny", "tiny", tokenizer).eval(), tokenizer, parts.load_image_processor("tiny")
    )
    images = torch.randint(0, 256, (12, 3, 64, 64), dtype=torch.uint8)
    pixels = bundle.pixels.normalise(images)
    plain = generate.generate(bundle, pixels, max_new_tokens=12)
    assert fast.prepare(bundle.model)
    assert generate.generate(bundle, pixels, max_new_tokens=12) == plain


def test_bfloat16_is_a_setting_that_files_of_captions_know(untrained, tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (64, 64), (9, 99, 200)).save(tmp_path / "a.png")
    flags = [f"--model_path={untrained}", "--device=cpu", f"--image_path={tmp_path / 'a.png'}"]
    assert inference.main([*flags, f"--output={tmp_path / 'captions.json'}", "--dtype=bfloat16"]) == 0
    assert json.loads((tmp_path / ".captions.json.made_with").read_text())["dtype"] == "bfloat16"
    with pytest.raises(SystemExit):
        inference.main([f"--data_path={tmp_path}", "--dtype=bfloat16"])
    assert "scores are told of captions in float32" in capsys.readouterr().err
