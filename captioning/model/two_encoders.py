"""Two vision encoders side by side, as one: a captioner with two pairs of eyes.

    import captioning.model.two_encoders  # now transformers knows the model_type "side_by_side_encoders"
    model = VisionEncoderDecoderModel.from_pretrained("a run folder of train.py --encoder A B")

Both encoders see the image. Each token of the first one gets the channels of the second one's patches at the same
place: of CLIP ViT-B/16 (14 x 14 patches and a class token, 768 channels) and DINOv2-small (16 x 16 and one, 384) come
197 tokens of 1,152 channels. The decoder's cross-attention reads no more tokens than of the first encoder alone.

* Before the channels are joined, each token is normalised over those of its encoder (a layer norm without parameters),
  so that neither encoder drowns the other. It comes before the resampling, so that a token of great length does not
  bleed into its neighbours.
* The second encoder's patches are resampled to the grid of the first one: bilinear, with a wider filter where the grid
  shrinks. Two grids of one size are not resampled.
* The class tokens are joined too. If only the first encoder has one, the mean of the second one's patches takes its
  place; if the first has none, neither has the pair. Distillation and register tokens are left out.
* There is one `pixel_values`, made by the first encoder's image processor. For the second one it is normalised anew,
  and resized if it wants another size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.configuration_utils import SubConfigSpec
from transformers.modeling_outputs import BaseModelOutput

from captioning.model.grid import as_tokens, patch_grid

KIND = "side_by_side_encoders"


class TwoEncodersConfig(PreTrainedConfig):
    """The settings of both encoders, and of what lies between them.

    Attributes:
        first, second: the configurations of the encoders.
        hidden_size: channels of both together.
        image_size: (height, width) in pixels of what comes in, as the first encoder sees it.
        second_image_size: the same, of what the second one sees.
        second_scale, second_shift: what makes pixels that are normalised for the first encoder into those for the
            second one, by channel: pixels * scale + shift.

    Raises:
        ValueError: a setting cannot be.
    """

    model_type = KIND
    sub_configs_defaults: ClassVar = {
        "first": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
        "second": SubConfigSpec(config_class=AutoConfig, model_type="vit"),
    }

    first: PreTrainedConfig | dict | None = None
    second: PreTrainedConfig | dict | None = None
    hidden_size: int = 2 * 768
    image_size: Sequence[int] = (224, 224)
    second_image_size: Sequence[int] = (224, 224)
    second_scale: Sequence[float] = (1.0, 1.0, 1.0)
    second_shift: Sequence[float] = (0.0, 0.0, 0.0)

    def __post_init__(self, **options):
        super().__post_init__(**options)
        for part in (self.first, self.second):
            if part.model_type == KIND:
                raise ValueError(f"one of the encoders side by side is {KIND} itself")
        for name, right, wanted in (
            ("image_size", _is_side, (2, "a height and a width in pixels")),
            ("second_image_size", _is_side, (2, "a height and a width in pixels")),
            ("second_scale", _is_number, (3, "three numbers")),
            ("second_shift", _is_number, (3, "three numbers")),
        ):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or len(value) != wanted[0] or not all(map(right, value)):
                raise ValueError(f"{name} is not {wanted[1]}")
        if type(self.hidden_size) is not int or self.hidden_size < 1:
            raise ValueError("hidden_size is not a number of channels")


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e6


class TwoEncoders(PreTrainedModel):
    """Two encoders side by side; `pixel_values` (batch, 3, height, width) -> (batch, tokens, hidden size).

    Args:
        first, second: the encoders that `config` describes; None: with random weights.
    """

    config_class = TwoEncodersConfig
    base_model_prefix = "two_encoders"
    main_input_name = "pixel_values"
    input_modalities = "image"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: TwoEncodersConfig, first: Any = None, second: Any = None):
        super().__init__(config)
        self.first = first or AutoModel.from_config(config.first)
        self.second = second or AutoModel.from_config(config.second)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **options) -> BaseModelOutput:
        """What both see; options such as `output_attentions` are passed over.

        Raises:
            InputError: the tokens of one of them are no grid of patches.
        """
        own, rest, grid = _tokens(self.first, pixel_values)
        their_own, theirs, their_grid = _tokens(self.second, self.for_second(pixel_values))
        if their_own is None:
            their_own = theirs.mean(1, keepdim=True)
        if their_grid != grid:
            places = theirs.transpose(1, 2).unflatten(2, their_grid)  # (batch, channels, rows, columns)
            places = functional.interpolate(places, grid, mode="bilinear", align_corners=False, antialias=True)
            theirs = places.flatten(2).transpose(1, 2)
        tokens = torch.cat([rest, theirs], 2)
        if own is not None:
            tokens = torch.cat([torch.cat([own, their_own], 2), tokens], 1)
        return BaseModelOutput(last_hidden_state=tokens.to(pixel_values.dtype))

    def for_second(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels as the first encoder takes them -> as the second one does, (batch, 3, height, width)."""
        config = self.config
        if (tuple(config.second_scale), tuple(config.second_shift)) != ((1.0, 1.0, 1.0), (0.0, 0.0, 0.0)):
            scale, shift = (
                torch.tensor(values, dtype=pixel_values.dtype, device=pixel_values.device).reshape(3, 1, 1)
                for values in (config.second_scale, config.second_shift)
            )
            pixel_values = pixel_values * scale + shift
        size = tuple(config.second_image_size)
        if tuple(pixel_values.shape[2:]) != size:
            pixel_values = functional.interpolate(
                pixel_values, size, mode="bicubic", align_corners=False, antialias=True
            )
        return pixel_values


def _tokens(encoder: Any, pixels: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, tuple[int, int]]:
    """An encoder's class token (batch, 1, channels), if it has one, its patches and their grid; all normalised."""
    states = as_tokens(encoder(pixel_values=pixels)[0])
    rows, columns = patch_grid(states.shape[1], pixels.shape[2:], encoder.config)
    states = functional.layer_norm(states.float(), states.shape[2:])
    patches = states[:, states.shape[1] - rows * columns :]
    return states[:, :1] if states.shape[1] > rows * columns else None, patches, (rows, columns)


def side_by_side(first: Any, second: Any, pixels: Sequence[Any]) -> TwoEncoders:
    """Two encoders as one.

    Args:
        pixels: the image processor of each, as `parts.Pixels`.
    """
    ours, theirs = pixels
    # Each makes (value * scale - mean) / std of a value from 0 to 255; solved for the second one, given the first.
    ratio = theirs.scale / ours.scale
    scale = ours.std.double() / theirs.std.double() * ratio
    shift = (ours.mean.double() * ratio - theirs.mean.double()) / theirs.std.double()
    # Copies, because settings such as the kind of attention pass from config to config. They are as they will be when
    # they come from a file, so that cached features are found again, and do not tell of what folder they are.
    as_stored = {"dtype": "float32", "_name_or_path": ""}
    copies = [{**part.config.to_dict(), **as_stored} for part in (first, second)]
    config = TwoEncodersConfig(
        first=copies[0],
        second=copies[1],
        dtype=torch.float32,
        hidden_size=first.config.hidden_size + second.config.hidden_size,
        image_size=list(ours.size),
        second_image_size=list(theirs.size),
        second_scale=scale.expand(3, 1, 1).flatten().tolist(),
        second_shift=shift.expand(3, 1, 1).flatten().tolist(),
    )
    return TwoEncoders(config, first, second).eval()  # as `from_pretrained` gives its models


AutoConfig.register(KIND, TwoEncodersConfig)
AutoModel.register(TwoEncodersConfig, TwoEncoders)
