"""Packing: all captions of an image share one decoder row.

Two captions of one image, "a dog" and "a cat runs", as a batch usually holds them and packed (`.` is padding, `$` the
end token, `^` what the decoder is given before the first word):

    one caption a row                 packed
    inputs     ^ a dog .              ^ a dog ^ a cat runs
               ^ a cat runs
    labels     a dog $ .              a dog $ a cat runs $
               a cat runs $
    positions  0 1 2 .                0 1 2 0 1 2 3
               0 1 2 3
    segments                          0 0 0 1 1 1 1

    what each token may see (x), packed:      ^ a dog ^ a cat runs
                                        ^     x
                                        a     x x
                                        dog   x x x
                                        ^           x
                                        a           x x
                                        cat         x x x
                                        runs        x x x x

A block-diagonal causal mask keeps the captions apart, and positions restart at 0 for each. So the loss and its
gradients equal those of one row per caption. But the encoder runs once per image instead of once per caption, the
cross-attention projects the image's keys and values once, and hardly any padding is left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from transformers import VisionEncoderDecoderModel

IGNORED = -100  # cross_entropy's ignore_index


def decoder_rows(
    captions: Sequence[Sequence[Sequence[int]]], start_token_id: int, pad_token_id: int, packed: bool = True
) -> dict[str, torch.Tensor]:
    """The decoder's side of a batch, laid out as in the picture above.

    Args:
        captions: of each image the token ids of each caption, its end token included.
        start_token_id: what the decoder is given before the first token.
        pad_token_id: fills the decoder's input. Its loss is masked by length, never by id.
        packed: False gives each caption a row of its own.

    Returns:
        image_of_row: (rows,), the index in `captions` of each row's image
        decoder_input_ids, labels: (rows, length); `labels` is -100 where there is no token
        label_positions: (tokens,), where in the flattened `labels` there is one
        decoder_position_ids, segment_ids: (rows, length), packed only; padding is segment -1
    """
    if packed:
        groups = captions
        image_of_row = torch.arange(len(captions))
    else:
        groups = [[caption] for of_image in captions for caption in of_image]
        image_of_row = torch.tensor([index for index, of_image in enumerate(captions) for _ in of_image])
    if not groups:  # no image has a caption
        groups, image_of_row = [[]], torch.zeros(1, dtype=torch.long)

    shape = (len(groups), max(1, *(sum(map(len, group)) for group in groups)))
    inputs = np.full(shape, pad_token_id)
    labels = np.full(shape, IGNORED)
    positions = np.zeros(shape, dtype=np.int64)
    segments = np.full(shape, -1)
    for row, group in enumerate(groups):
        end = 0
        for segment, caption in enumerate(group):
            start, end = end, end + len(caption)
            inputs[row, start:end] = [start_token_id, *caption[:-1]]
            labels[row, start:end] = caption
            positions[row, start:end] = np.arange(len(caption))
            segments[row, start:end] = segment
    rows = {
        "image_of_row": image_of_row,
        "decoder_input_ids": torch.from_numpy(inputs),
        "labels": torch.from_numpy(labels),
        "label_positions": torch.from_numpy(np.flatnonzero(labels != IGNORED)),
    }
    if packed:
        rows["decoder_position_ids"] = torch.from_numpy(positions)
        rows["segment_ids"] = torch.from_numpy(segments)
    return rows


def packed_attention_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Which earlier tokens each token may see: those of its own caption.

    Args:
        segment_ids: (batch, length). Padding is one segment of its own, so that no row of the mask is empty.

    Returns:
        bool (batch, 1, length, length), True where attention is allowed.
    """
    length = segment_ids.shape[1]
    same_caption = segment_ids[:, :, None] == segment_ids[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_ids.device).tril()
    return (same_caption & causal)[:, None]


def decoder_mask(model: VisionEncoderDecoderModel, segment_ids: torch.Tensor) -> torch.Tensor:
    """`packed_attention_mask` as the model's kind of attention takes it."""
    mask = packed_attention_mask(segment_ids)
    if model.decoder.config._attn_implementation == "eager":
        # Eager attention adds its mask to the scores.
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, torch.finfo(torch.float32).min)
    return mask


@torch.no_grad()
def can_pack(model: VisionEncoderDecoderModel) -> bool:
    """Whether the decoder keeps packed captions apart: two captions, packed and each alone, must give the same logits.

    It does not where its attention takes no mask for each position, or where it counts positions by itself.
    """
    tokens = torch.arange(1, 5, device=model.device) % model.decoder.config.vocab_size
    features = torch.linspace(-1, 1, 2 * model.encoder.config.hidden_size, device=model.device)
    features = features.view(1, 2, -1)
    training = model.training
    model.eval()
    try:
        packed = model(
            encoder_outputs=(features,),
            decoder_input_ids=torch.cat([tokens, tokens])[None],
            decoder_position_ids=torch.arange(4, device=model.device).repeat(2)[None],
            decoder_attention_mask=decoder_mask(model, torch.tensor([[0] * 4 + [1] * 4], device=model.device)),
            use_cache=False,
        ).logits
        alone = model(encoder_outputs=(features,), decoder_input_ids=tokens[None], use_cache=False).logits
    except (ValueError, TypeError, RuntimeError):
        return False
    finally:
        model.train(training)
    return torch.allclose(packed, alone.repeat(1, 2, 1), atol=1e-3)


class LabelledProjection:
    """Lets a decoder project to the vocabulary only the positions that have a label.

    The projection is the largest matrix product of a small decoder, and padding needs none of it:

        with projection.only(label_positions):
            logits = model(**inputs).logits[0]      # (tokens, vocabulary)

    Outside of the block every position is projected. The hook stays in place and reads one attribute, because a hook
    that comes and goes would have `torch.compile` compile the model anew.
    """

    def __init__(self, projection: torch.nn.Module):
        self._positions: torch.Tensor | None = None
        projection.register_forward_pre_hook(self._select)

    @contextlib.contextmanager
    def only(self, positions: torch.Tensor) -> Iterator[None]:
        """
        Args:
            positions: (tokens,), indices into the flattened (rows, length).
        """
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def _select(self, projection, inputs):
        if self._positions is None:
            return None
        return (inputs[0].flatten(0, -2).index_select(0, self._positions)[None],)
