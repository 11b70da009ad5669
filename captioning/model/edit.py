"""A caption made shorter or longer by whole words, so that it keeps its end.

    editor = Editor(model, states, vocabulary, prompt, end)        # of one image
    for tokens, (total, likely) in editor.edited(caption, -2).items(): ...

A beam search that has to stop at a word keeps what begins well, such as "a man is standing in the". The model's own
caption of another length ends well: here words are taken out of it, or put into it where the model finds them likely,
one at a time. The likeliest captions of each round go on to the next.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, EncoderDecoderCache, VisionEncoderDecoderModel

KEPT = 4  # captions of a round
TRIED = 4  # words at each place of a caption that is to be longer
JUDGED_TOGETHER = 32  # captions: with GPT-2's vocabulary and 40 tokens their logits take 260 MB

Tokens = tuple[int, ...]


class Edited(NamedTuple):
    """What the model thinks of an edited caption.

    Attributes:
        total: the sum of its tokens' log-probabilities, the end token's included; natural logarithm.
        likely: the probability of an end after its last word, by an end token or by punctuation that ends a sentence.
    """

    total: float
    likely: float


def with_one_end(logs: torch.Tensor, ends: Sequence[int]) -> torch.Tensor:
    """Log-probabilities of tokens, (..., vocabulary), where the first of several end tokens stands for all of them."""
    if len(ends) == 1:
        return logs
    logs = logs.clone()
    every = logs[..., list(ends)].logsumexp(-1)
    logs[..., list(ends)] = -torch.inf
    logs[..., ends[0]] = every
    return logs


class Editor:
    """Edits captions of one image.

    Args:
        states: the encoder's output, (1, encoder tokens, hidden size).
        words: what the tokens spell, a `constrain.Vocabulary`.
        prompt: ids that each caption begins with, and that stay.
        ends: ids of the end tokens, see `with_one_end`.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: VisionEncoderDecoderModel,
        states: torch.Tensor,
        words: Any,
        prompt: Sequence[int],
        ends: Sequence[int],
    ):
        self.decoder: Any = model.decoder
        self.states = model.enc_to_dec_proj(states) if hasattr(model, "enc_to_dec_proj") else states
        self.words, self.ends, self.end = words, ends, ends[0]
        self.given = [model.generation_config.decoder_start_token_id, *prompt]
        config = self.decoder.config
        seen = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        start = torch.tensor([self.given[:1]], device=states.device)
        self.decoder(input_ids=start, encoder_hidden_states=self.states, past_key_values=seen, use_cache=True)
        self.of_image = seen.cross_attention_cache  # its keys and values, computed once

    @torch.no_grad()
    def edited(self, caption: Tokens, more: int) -> dict[Tokens, Edited]:
        """Captions with `more` words, or with fewer where it is negative.

        Args:
            caption: ids, without prompt and end token.
        """
        found: dict[Tokens, Edited] = {}
        kept = [caption]
        for _ in range(abs(more)):
            tried = self._longer(kept) if more > 0 else {shorter for one in kept for shorter in self._shorter(one)}
            if not tried:
                return {}
            captions, found = sorted(tried), {}
            for first in range(0, len(captions), JUDGED_TOGETHER):
                found |= self._judged(captions[first : first + JUDGED_TOGETHER])
            kept = sorted(found, key=lambda tokens: -found[tokens].total)[:KEPT]
        return found

    def _places(self, caption: Tokens) -> list[tuple[int, int]]:
        """Where each word begins and ends; punctuation between words is none."""
        pieces = [self.words.read([token]) for token in caption]
        starts = [at for at, piece in enumerate(pieces) if at == 0 or piece[:1].isspace()]
        ends = [*starts[1:], len(caption)]
        return [
            (start, end)
            for start, end in zip(starts, ends, strict=True)
            if any(char.isalnum() for char in "".join(pieces[start:end]))
        ]

    def _shorter(self, caption: Tokens) -> Iterable[Tokens]:
        places = self._places(caption)
        return [caption[:start] + caption[end:] for start, end in places] if len(places) > 1 else []

    def _longer(self, captions: Sequence[Tokens]) -> set[Tokens]:
        """Each caption with one more word, at each place one of those that the model finds likeliest there."""
        logits = self._logits(captions)
        logits[..., ~self.words.whole_word.to(logits.device)] = -torch.inf
        likeliest = logits.topk(TRIED).indices.tolist()
        found = set()
        for caption, words in zip(captions, likeliest, strict=True):
            places = self._places(caption)
            for at in [*(start for start, _ in places), places[-1][1]] if places else []:
                beside = caption[max(at - 1, 0) : at + 1]  # no word twice in a row
                found |= {(*caption[:at], word, *caption[at:]) for word in words[at] if word not in beside}
        return found

    def _judged(self, captions: Sequence[Tokens]) -> dict[Tokens, Edited]:
        logs = with_one_end(self._logits(captions).float().log_softmax(-1), self.ends)
        closing = [self.end, *self.words.full_stops]
        found = {}
        for row, caption in enumerate(captions):
            chosen = logs[row, range(len(caption) + 1), [*caption, self.end]]
            last = len(caption)
            while last and caption[last - 1] in closing:
                last -= 1
            found[caption] = Edited(float(chosen.sum()), float(logs[row, last, closing].exp().sum()))
        return found

    def _logits(self, captions: Sequence[Tokens]) -> torch.Tensor:
        """Of what follows each token, from the last given one on, (captions, longest + 1, vocabulary)."""
        longest = max(map(len, captions))
        rows = [[*self.given, *caption, *[self.end] * (longest - len(caption))] for caption in captions]
        of_image = copy.deepcopy(self.of_image)
        of_image.batch_repeat_interleave(len(rows))
        cache = EncoderDecoderCache(DynamicCache(config=self.decoder.config), of_image)
        ids = torch.tensor(rows, device=self.states.device)
        states = self.states.expand(len(rows), -1, -1)
        outputs = self.decoder(input_ids=ids, encoder_hidden_states=states, past_key_values=cache, use_cache=True)
        return outputs.logits[:, len(self.given) - 1 :]
