"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): thin matrices beside a decoder's own learn for them.

    new = add(model, rank=8)            # W becomes W + B A; W keeps its values from here on, A and B learn
    merged(model)                       # the weights of a captioner as any other, with B A in W
    restore(model, weights, folder)     # of a checkpoint, what `merged` gave and `save` wrote
    merge(model)                        # for good: W + B A takes the place of W, A and B go

Adapters stand beside each matrix of the decoder's attention and feed-forward layers. B begins at zero, so that nothing
changes at first. Its embeddings, norms and biases stay. The cross-attention learns in full: a plain GPT-2 has none, so
it starts from random weights, and a change of low rank would leave it random.

The matrices and their products are those of `peft`; without adapters nothing here needs it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import VisionEncoderDecoderModel
from transformers.pytorch_utils import Conv1D

from captioning import InputError
from captioning.model.weights import is_cross_attention

FILE = "adapters.safetensors"  # in checkpoints
ADAPTER = "default"  # as peft calls the only one
BASE = ".base_layer."  # in the names of what was there before


def add(model: VisionEncoderDecoderModel, rank: int) -> set[str]:
    """Put adapters into a captioner's decoder, and let only them and the cross-attention of it learn.

    Args:
        rank: the rows of A and the columns of B.

    Returns:
        The names of the new parameters. A is random, B zero.

    Raises:
        InputError: the decoder has no matrices to adapt, or they are too small for the rank.
    """
    from peft import LoraConfig, inject_adapter_in_model

    decoder = model.decoder
    matrices = {
        name: module
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
        and not is_cross_attention(f"decoder.{name}.")
        and module is not decoder.get_output_embeddings()
    }
    if not matrices:
        raise InputError(
            "--lora needs a decoder with attention and feed-forward matrices; name another, or leave it out"
        )
    least = min(min(module.weight.shape) for module in matrices.values())
    if rank > least:
        raise InputError(f"--lora {rank} is above {least}, the rank of the decoder's own matrices; give less")
    connecting = [weight for name, weight in decoder.named_parameters() if is_cross_attention(f"decoder.{name}")]
    learning = [weight for weight in connecting if weight.requires_grad]
    before = {name for name, _ in model.named_parameters()}
    # The scale is lora_alpha / r = 1: with Adam a larger one is a larger learning rate, which has a flag of its own.
    transposed = any(isinstance(module, Conv1D) for module in matrices.values())
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(matrices), fan_in_fan_out=transposed)
    inject_adapter_in_model(config, decoder, ADAPTER)
    for weight in learning:
        weight.requires_grad_()  # peft lets the adapters alone learn
    return {name for name, _ in model.named_parameters() if BASE not in name} - before


def rank_of(model: torch.nn.Module) -> int:
    """The rank of a model's adapters; 0 where it has none."""
    return next((layer.r[ADAPTER] for _, layer in _adapted(model)), 0)


@torch.no_grad()
def merged(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's weights with its adapters in them, under the names that they have without; the model stays as it is."""
    state = {name.replace(BASE, "."): each for name, each in model.state_dict().items() if ".lora_" not in name}
    for name, layer in _adapted(model):
        state[f"{name}.weight"] = layer.get_base_layer().weight + layer.get_delta_weight(ADAPTER)
    return state


def merge(model: VisionEncoderDecoderModel) -> None:
    """Let a captioner hold what `merged` gives, without adapters."""
    state = merged(model)
    for name, layer in list(_adapted(model)):
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer.get_base_layer())
    model.load_state_dict(state)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write A and B of each matrix into a folder; nothing where there are no adapters."""
    if own := {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}:
        save_file(own, folder / FILE)


def restore(model: torch.nn.Module, weights: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Load a checkpoint's weights, and its adapters where the model has some.

    The matrices under the adapters keep their values, which never change: out of merged ones they would come back
    with a rounding, and a run that goes on would not be the one that was interrupted.

    Args:
        weights: as `merged` gave them.
        folder: the checkpoint, with what `save` wrote.

    Raises:
        Whatever torch and safetensors raise where names or shapes differ, or a file is missing or damaged.
    """
    state = {**weights, **(load_file(folder / FILE) if rank_of(model) else {})}
    for name, layer in _adapted(model):
        del state[f"{name}.weight"]
        state |= {f"{name}{BASE}{own}": each for own, each in layer.get_base_layer().named_parameters()}
        if f"{name}.bias" in state:
            state[f"{name}{BASE}bias"] = state.pop(f"{name}.bias")
    model.load_state_dict(state)


def base(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The matrices under the adapters, by name; empty without adapters."""
    return {name: layer.get_base_layer().weight for name, layer in _adapted(model)}


def _adapted(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    """Each layer of peft's that holds a matrix and its adapter, by the matrix's name."""
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
