"""The loss in blocks of rows, its gradient with it, beside autograd's through torch's own cross-entropy."""

import pytest
import torch
from torch.nn import functional

from captioning.training import loss


def both(logits, labels, weights, smoothing, factor):
    """Loss and gradient of `weighted_loss`, and of the formula written out."""
    for function in (
        loss.weighted_loss,
        lambda x, y, w, s: (w * functional.cross_entropy(x.float(), y, reduction="none", label_smoothing=s)).sum(),
    ):
        own = logits.clone().requires_grad_()
        value = function(own, labels, weights, smoothing)
        (factor * value).backward()
        yield value.item(), own.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("block", [1, 3 * 37, 2**18])  # of one row, of three, of all
def test_it_is_the_cross_entropy(monkeypatch, dtype, smoothing, block):
    monkeypatch.setattr(loss, "BLOCK", block)
    torch.manual_seed(0)
    logits = (3 * torch.randn(10, 37)).to(dtype)
    labels = torch.randint(37, (10,))
    weights = torch.randn(10).index_fill(0, torch.tensor([4]), 0)  # as of advantages, and of a label that is ignored
    for factor in (1, 2):
        (value, gradient), (expected, its_gradient) = both(logits, labels, weights, smoothing, factor)
        assert value == pytest.approx(expected, rel=1e-5)
        assert gradient.dtype == dtype
        # Both compute in float32; what is left is the one rounding to the type of the logits.
        assert torch.allclose(gradient, its_gradient, rtol=1e-5 if dtype == torch.float32 else 2**-7, atol=1e-6)


def test_no_tokens_cost_nothing_and_no_gradient_is_made_in_vain():
    logits = torch.randn(0, 5, requires_grad=True)
    value = loss.caption_loss(logits, torch.zeros(0, dtype=torch.long), 7)
    value.backward()
    assert value.item() == 0 and logits.grad.shape == (0, 5)
    with torch.no_grad():
        assert not loss.caption_loss(torch.randn(4, 5), torch.arange(4), None).requires_grad
