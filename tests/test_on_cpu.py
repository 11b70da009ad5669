"""What makes updates in bfloat16 on a CPU faster gives what transformers and torch give, and their gradients."""

import copy

import pytest
import torch
from toy import toy_tokenizer
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from captioning.model import captioner
from captioning.model.packing import decoder_mask
from captioning.training import on_cpu


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_the_eager_one(dtype, masked):
    torch.manual_seed(0)
    mask = torch.zeros(2, 1, 5, 7).masked_fill(torch.ones(5, 7, dtype=torch.bool).triu(3), torch.finfo().min)
    # As a decoder's are: views of one projection, not contiguous.
    inputs = [torch.randn(2, length, 3, 8).to(dtype).requires_grad_() for length in (5, 7, 7)]
    upstream = torch.randn(2, 5, 3, 8)
    found = []
    for function in (on_cpu.attention, eager_attention_forward):
        own = [x.detach().clone().requires_grad_() for x in inputs]
        q, k, v = (x.transpose(1, 2) for x in own)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out, _ = function(torch.nn.Module(), q, k, v, mask if masked else None, scaling=8**-0.5)
        (out.float() * upstream).sum().backward()
        found.append([out, *(x.grad for x in own)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype and ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs, **({} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 11, 1303), (1,)])
def test_dropout_has_its_rate_and_its_scale(dtype, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, dtype=dtype, requires_grad=True)
    out = on_cpu.drop(x, 0.2)
    out.sum().backward()
    assert torch.equal(x.grad, out), "what is left out has no gradient, and what is kept the scale's"
    assert set(out.unique().tolist()) <= {0, torch.tensor(1 / 0.8, dtype=dtype).item()}
    torch.manual_seed(0)
    assert torch.equal(on_cpu.drop(x, 0.2), out), "the seed decides"
    if x.numel() > 1:
        error = (0.2 * 0.8 / x.numel()) ** 0.5
        assert abs((out == 0).float().mean().item() - 0.2) < 4 * error
        dropped = (out == 0).flatten().float() - 0.2
        for apart in (1, 2, 3, 4):  # four elements are drawn together
            assert abs((dropped[apart:] * dropped[:-apart]).mean().item()) < 4 * 0.2 * 0.8 / x.numel() ** 0.5


def test_a_decoder_learns_the_same():
    torch.manual_seed(0)
    plain = captioner.build("tiny", "tiny", toy_tokenizer())
    plain.set_attn_implementation("eager")
    fast = copy.deepcopy(plain)
    on_cpu.prepare(fast.decoder)
    features, ids = torch.randn(2, 17, plain.encoder.config.hidden_size), torch.randint(50, (2, 9))
    segments = torch.tensor([[0] * 4 + [1] * 5, [0] * 6 + [-1] * 3])

    def learn(model, seed=0):
        torch.manual_seed(seed)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(
                encoder_outputs=(features,),
                decoder_input_ids=ids,
                decoder_attention_mask=decoder_mask(model, segments),
                use_cache=False,
            ).logits
        logits.float().logsumexp(-1).sum().backward()
        return logits, {name: x.grad for name, x in model.named_parameters() if x.grad is not None}

    for model in (plain, fast):
        captioner.set_dropout(model, 0.0)
        model.train()
    (expected, gradients), (logits, ours) = learn(plain), learn(fast)
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0.02)
    assert ours.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (ours[name] - gradient).norm() < 0.02 * gradient.norm() + 1e-4, name

    captioner.set_dropout(fast, 0.3)
    with_dropout, _ = learn(fast)
    assert torch.equal(learn(fast)[0], with_dropout) and not torch.equal(learn(fast, 1)[0], with_dropout)
    assert torch.equal(learn(fast.eval())[0], logits), "none while it writes"
    assert "cpu" not in fast.config.to_json_string(), "a saved model knows nothing of it"
