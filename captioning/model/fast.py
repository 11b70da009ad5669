"""Faster matrix products where captions are made on a CPU.

PyTorch multiplies float32 matrices with MKL. oneDNN, which it brings too, is twice as fast on an AMD EPYC, with weights
that are laid out for it once. In bfloat16 it is faster again where the processor multiplies in it; layer norms,
attention and what passes from layer to layer stay in float32. Scores that are told are computed without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prepare(model: torch.nn.Module, dtype: str = "float32") -> bool:
    """Let each linear layer of a model on a CPU multiply with oneDNN, for inference alone; False: there is no oneDNN.

    Args:
        dtype: of the products, a key of DTYPES; what goes in and comes out stays float32.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            _replace_forward(module, module.weight, DTYPES[dtype])
        elif isinstance(module, Conv1D):  # GPT-2's, whose weight is transposed
            _replace_forward(module, module.weight.t(), DTYPES[dtype])
    return True


@torch.no_grad()
def _replace_forward(module: Any, weight: torch.Tensor, dtype: torch.dtype) -> None:
    ops: Any = torch.ops.mkldnn
    weight = weight.detach().to(dtype).contiguous()
    bias = None if module.bias is None else module.bias.detach().to(dtype)
    # On a processor without AVX-512 oneDNN lays out no weights in bfloat16, and raises.
    packs = dtype == torch.float32 or ops._is_mkldnn_bf16_supported()
    if packs:
        weight = ops._reorder_linear_weight(weight)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if packs:
            return ops._linear_pointwise(x.to(dtype), weight, bias, "none", [], "").to(x.dtype)
        return torch.nn.functional.linear(x.to(dtype), weight, bias).to(x.dtype)

    module.forward = forward


def multiplies_in_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16; it is slower in it otherwise."""
    processor = torch.cpu.get_capabilities()
    return bool(processor.get("amx_bf16") or processor.get("avx512_bf16"))


def bfloat16_pays(device_type: str) -> bool:
    """Whether training computes in bfloat16 on a kind of device where nobody asks for another precision."""
    if device_type == "cpu":
        return multiplies_in_bfloat16()
    return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def in_dtype(make: Callable[..., Any], device: torch.device, dtype: str) -> Callable[..., Any]:
    """`make`, computing in `dtype` on an accelerator, as training does there."""
    if device.type == "cpu" or dtype == "float32":
        return make

    def mixed(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device.type, DTYPES[dtype]):
            return make(*args, **kwargs)

    return mixed
