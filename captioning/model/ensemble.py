"""Several captioners that write one caption together: the mean of their probabilities at each step.

    bundle = join([load("run-0"), load("run-1")], ["run-0", "run-1"])     # captions as any other bundle

What the members see of an image, and what their encoders make of it, lies side by side in one tensor. So whatever
searches, draws or scores captions of one captioner does it with several. Encoders that are equal, such as the frozen
one of two trainings, run once.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithCrossAttentions

from captioning import InputError
from captioning.model.captioner import Bundle
from captioning.model.parts import Pixels

SPECIAL = ("decoder_start_token_id", "eos_token_id")


class Views:
    """The image processors of several encoders as one, as `parts.Pixels`.

    An image becomes one row of numbers: its pixels as the first encoder sees them, then as the second one does.
    """

    def __init__(self, pixels: Sequence[Pixels]):
        self.pixels = pixels
        blank = Image.new("RGB", (64, 64))
        self.shapes = [one(blank).shape for one in pixels]

    @property
    def resized_side(self) -> int:
        """The shorter side, in pixels, that images are resized to at most."""
        return max(one.resized_side for one in self.pixels)

    def __call__(self, image: Image.Image) -> np.ndarray:
        """An RGB image -> uint8 (numbers,)."""
        return np.concatenate([one(image).reshape(-1) for one in self.pixels])

    def normalise(self, rows: torch.Tensor) -> torch.Tensor:
        """uint8 (batch, numbers) -> float32 of the same shape, on the same device."""
        parts = zip(self.pixels, self.split(rows), strict=True)
        return torch.cat([one.normalise(part).flatten(1) for one, part in parts], 1)

    def split(self, rows: torch.Tensor) -> list[torch.Tensor]:
        """(batch, numbers) -> of each encoder (batch, 3, height, width)."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]


class Encoders(nn.Module):
    """Several encoders as one: their tokens one after the other, (batch, tokens, largest hidden size).

    Attributes:
        places: of each encoder, where its tokens lie, and its hidden size.
    """

    def __init__(self, encoders: Sequence[nn.Module], views: Views):
        super().__init__()
        self.encoders, self.views = nn.ModuleList(encoders), views
        self.places: list[tuple[slice, int]] = []
        blank = torch.zeros(1, sum(map(math.prod, views.shapes)))
        with torch.no_grad():
            for states in self._states(blank):
                begin = self.places[-1][0].stop if self.places else 0
                self.places.append((slice(begin, begin + states.shape[1]), states.shape[2]))

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=joined(self._states(pixel_values)))  # type: ignore[arg-type]

    def _states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        parts = zip(self.encoders, self.views.split(pixel_values), strict=True)
        return [encoder(pixel_values=part).last_hidden_state for encoder, part in parts]


def joined(every: Sequence[torch.Tensor]) -> torch.Tensor:
    """Several encoders' output, (batch, tokens, hidden size) each, as one tensor; `Encoders.places` takes it apart."""
    widest = max(states.shape[2] for states in every)
    return torch.cat([nn.functional.pad(states, (0, widest - states.shape[2])) for states in every], 1)


class Decoders(PreTrainedModel, GenerationMixin):
    """Several decoders as one, which plain `generate` takes: its logits are the logarithm of their mean probability.

    Args:
        models: captioners.
        places: of each, where its encoder's tokens lie, see `Encoders`.
    """

    def __init__(self, models: Sequence[Any], places: Sequence[tuple[slice, int]]):
        configs = [model.decoder.config for model in models]
        config = copy.deepcopy(configs[0])
        config._attn_implementation = "eager"  # of this class, which attends to nothing; each member keeps its own
        # Its cache has the layers of all.
        config.num_hidden_layers = sum(one.num_hidden_layers for one in configs)
        config.max_position_embeddings = min(one.max_position_embeddings for one in configs)
        super().__init__(config)
        self.members = nn.ModuleList(model.decoder for model in models)
        self.projections = nn.ModuleList(getattr(model, "enc_to_dec_proj", nn.Identity()) for model in models)
        self.places = places
        self.generation_config = models[0].decoder.generation_config

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        use_cache: bool = False,
        **_: Any,
    ) -> CausalLMOutputWithCrossAttentions:
        """As that of any decoder: token ids (rows, length) -> logits (rows, length, vocabulary)."""
        logs, begin = [], 0
        decoder: Any
        for decoder, projection, (tokens, width) in zip(self.members, self.projections, self.places, strict=True):
            states = encoder_hidden_states[:, tokens, :width]
            own = None
            if past_key_values is not None:
                layers = slice(begin, begin := begin + decoder.config.num_hidden_layers)
                own = EncoderDecoderCache(
                    _some(past_key_values.self_attention_cache, layers),
                    _some(past_key_values.cross_attention_cache, layers),
                )
            if own is None or not all(own.is_updated.values()):  # otherwise only the number of its tokens is read
                states = projection(states.contiguous())
            logits = decoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                encoder_hidden_states=states,
                past_key_values=own,
                use_cache=own is not None,
            ).logits
            logs.append(logits.float().log_softmax(-1))
        mean = torch.stack(logs).logsumexp(0) - math.log(len(logs))
        return CausalLMOutputWithCrossAttentions(logits=mean, past_key_values=past_key_values)  # type: ignore[arg-type]


def _some(cache: Any, layers: slice) -> DynamicCache:
    """Some layers of a cache. They are the same objects, so that the cache grows with them."""
    part = DynamicCache()
    part.layers = cache.layers[layers]
    return part


class Together(nn.Module):
    """Several captioners, as far as `VisionEncoderDecoderModel` is used to write captions."""

    def __init__(self, encoder: Encoders, decoder: Decoders, generation_config: Any):
        super().__init__()
        self.encoder, self.decoder, self.generation_config = encoder, decoder, generation_config

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def forward(
        self, encoder_outputs: BaseModelOutput, decoder_input_ids: torch.Tensor, use_cache: bool = False
    ) -> Any:
        assert not use_cache
        return self.decoder(decoder_input_ids, encoder_outputs.last_hidden_state)


@dataclass
class EnsembleBundle(Bundle):
    """What several run folders hold, ready to use as one bundle."""

    @functools.cached_property
    def pixels(self) -> Any:
        """The image processors of the encoders, see `Views`."""
        return self.model.encoder.views

    @property
    def image_processors(self) -> list[Any]:
        return [one.image_processor for one in self.pixels.pixels]


def join(bundles: Sequence[Bundle], names: Sequence[str]) -> Bundle:
    """Several captioners as one; how captions are searched for is the first one's to say.

    Args:
        bundles: on the CPU, as they were loaded.
        names: of each, for messages.

    Raises:
        InputError: they do not write the same tokens.
    """
    first, *others = bundles
    for bundle, name in zip(others, names[1:], strict=True):
        _refuse_other_tokens(first, names[0], bundle, name)
    encoders: list[Bundle] = []  # one bundle of each that differs
    which = []
    for bundle in bundles:
        same = next((number for number, other in enumerate(encoders) if _sees_alike(bundle, other)), len(encoders))
        encoders += [bundle] * (same == len(encoders))
        which.append(same)
    seeing = Encoders([bundle.model.encoder for bundle in encoders], Views([bundle.pixels for bundle in encoders]))
    models = [bundle.model for bundle in bundles]
    model: Any = Together(
        seeing, Decoders(models, [seeing.places[number] for number in which]), models[0].generation_config
    )
    return EnsembleBundle(model.eval(), first.tokenizer, first.image_processor)


def _refuse_other_tokens(first: Bundle, name: str, other: Bundle, other_name: str) -> None:
    same = first.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    same &= first.model.decoder.config.vocab_size == other.model.decoder.config.vocab_size
    for token in SPECIAL:
        same &= getattr(first.model.generation_config, token) == getattr(other.model.generation_config, token)
    if not same:
        raise InputError(
            f"--ensemble '{other_name}' has another tokenizer than '{name}'; name runs that were trained on the same "
            "prepared data"
        )


def _sees_alike(one: Bundle, other: Bundle) -> bool:
    """Whether two encoders give the same of every image."""
    if one.image_processor.to_dict() != other.image_processor.to_dict():
        return False
    if type(one.model.encoder) is not type(other.model.encoder):
        return False
    ours, theirs = (bundle.model.encoder.state_dict() for bundle in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
