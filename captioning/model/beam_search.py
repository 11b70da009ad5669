"""Greedy and beam search in numpy: the tokens that `generate` of transformers gives, without torch.

    settings = Decoding.read(generation_config, vocabulary, positions, "--model_path 'exported'")
    sequences = search(step, images=4, settings=settings)

`step` runs the decoder. The rules are those of `GenerationMixin._beam_search` and `_sample` in transformers 5.23, which
a test compares with it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from captioning import InputError
from captioning.foreign import check
from captioning.model.limits import decoding_schema

# The decoder's answer to the newest token of each row: (rows, 1) token ids, and which earlier row each row continues
# (None: the same) -> logits (rows, vocabulary). The first call brings one row for each image; a later one may bring
# several, those of an image together.
Step = Callable[[np.ndarray, "np.ndarray | None"], np.ndarray]

OUT = np.float32(-1e9)  # what transformers adds to a score that must not be chosen

# What transformers may be told of a search, and does not change captions here.
_OF_NO_EFFECT = {
    "bos_token_id",
    "cache_implementation",
    "decoder_start_token_id",
    "eos_token_id",
    "max_length",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "temperature",  # of sampling, as the next ones
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}
# Each at the value that leaves the search as it is.
_NEUTRAL = {
    "diversity_penalty": 0.0,
    "do_sample": False,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "guidance_scale": 1.0,
    "min_length": 0,
    "num_beam_groups": 1,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "typical_p": 1.0,
}


@dataclass(frozen=True)
class Decoding:
    """How captions are searched for: those settings of transformers' `GenerationConfig` that are known here."""

    start: int
    end: int
    pad: int
    num_beams: int = 1
    max_new_tokens: int = 20
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    no_repeat_ngram_size: int = 0
    repetition_penalty: float = 1.0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any], vocabulary: int, positions: int, what: str) -> Decoding:
        """The settings of a `generation_config.json`.

        Args:
            vocabulary, positions: of the decoder, tokens.
            what: names the file's owner in messages.

        Raises:
            InputError: a value is out of its range, or it asks for something that this search does not do, such as
                sampling.
        """
        where = f"the generation_config.json of {what}"
        check(config, decoding_schema(vocabulary, positions), where, "export it again")
        told = {name: value for name, value in config.items() if value is not None}
        own = {field.name for field in dataclasses.fields(cls)} - {"start", "end", "pad"}
        for name, value in told.items():
            if name.startswith("_") or name in own | _OF_NO_EFFECT or _NEUTRAL.get(name, ()) == value:
                continue
            raise InputError(
                f"{what} decodes with {name}={value!r} in its generation_config.json, which captions without PyTorch "
                "cannot follow; remove it there"
            )
        start = told.get("decoder_start_token_id", told.get("bos_token_id"))
        end = told.get("eos_token_id")
        if not isinstance(start, int) or not isinstance(end, int):
            raise InputError(f"{what} names no single start and end token in its generation_config.json")
        settings = {name: told[name] for name in own & told.keys()}
        if "max_new_tokens" not in told and "max_length" in told:
            settings["max_new_tokens"] = max(told["max_length"] - 1, 1)
        return cls(start, end, told.get("pad_token_id", end), **settings)


def search(step: Step, images: int, settings: Decoding, count: int = 1) -> np.ndarray:
    """The best token sequences of each image.

    Args:
        step: runs the decoder, see `Step`.
        images: how many.
        count: sequences for each image, at most `settings.num_beams`; the best one first.

    Returns:
        int64 (images * count, length): the start token, the caption's tokens, the end token if there is one, padding.
    """
    return _greedy(step, images, settings) if settings.num_beams == 1 else _beams(step, images, settings, count)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of the last axis, in float32."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float32))


def _greedy(step: Step, images: int, settings: Decoding) -> np.ndarray:
    """The most probable token each time."""
    sequences = np.full((images, 1), settings.start, np.int64)
    finished = np.zeros(images, bool)
    for _ in range(settings.max_new_tokens):
        logits = _processed(step(sequences[:, -1:], None).astype(np.float32), sequences, settings)
        chosen = np.where(finished, settings.pad, logits.argmax(-1))
        sequences = np.concatenate([sequences, chosen[:, None]], 1)
        finished |= chosen == settings.end
        if finished.all():
            break
    return sequences


def _beams(step: Step, images: int, settings: Decoding, count: int) -> np.ndarray:
    """The sequences of the highest sum of log-probabilities over length to the power of the length penalty."""
    beams, longest = settings.num_beams, settings.max_new_tokens
    kept = 2 * beams  # enough to go on with where each of the best ones ends
    running = np.full((images, beams, longest + 1), settings.pad, np.int64)
    running[:, :, 0] = settings.start
    best = running.copy()
    running_scores = np.zeros((images, beams), np.float32)
    running_scores[:, 1:] = OUT  # at first all beams are the same
    scores = np.full((images, beams), OUT)
    finished = np.zeros((images, beams), bool)
    improvable = np.ones((images, 1), bool)
    came_from: np.ndarray | None = None
    for made in range(1, longest + 1):
        if made == 1:
            log_probabilities = log_softmax(step(running[:, 0, :1], None).astype(np.float32))
            log_probabilities = log_probabilities.repeat(beams, 0)
        else:
            log_probabilities = log_softmax(step(running[:, :, made - 1].reshape(-1, 1), came_from).astype(np.float32))
        log_probabilities = _processed(log_probabilities, running[:, :, :made].reshape(images * beams, made), settings)
        vocabulary = log_probabilities.shape[-1]
        totals = log_probabilities.reshape(images, beams, vocabulary) + running_scores[:, :, None]
        top, where = _top(totals.reshape(images, -1), kept)  # (images, kept)
        parents = where // vocabulary
        grown = np.take_along_axis(running, parents[:, :, None], 1)
        grown[:, :, made] = where % vocabulary
        ended = (grown[:, :, made] == settings.end) | (made == longest)

        # What goes on.
        open_scores = top + ended * OUT
        running_scores, chosen = _top(open_scores, beams)
        running = np.take_along_axis(grown, chosen[:, :, None], 1)
        parents = np.take_along_axis(parents, chosen, 1)
        if made == 1:
            came_from = np.arange(images).repeat(beams)  # there was one row for each image
        else:
            came_from = (parents + beams * np.arange(images)[:, None]).reshape(-1)

        # What is complete: only those among the best may enter.
        complete = ended & (np.arange(kept) < beams)
        final = top / np.float32(made**settings.length_penalty)
        if settings.early_stopping is True:
            final = final + finished.all(1, keepdims=True) * OUT
        final = final + ~improvable * OUT + ~complete * OUT
        scores, chosen = _top(np.concatenate([scores, final], 1), beams)
        best = np.take_along_axis(np.concatenate([best, grown], 1), chosen[:, :, None], 1)
        finished = np.take_along_axis(np.concatenate([finished, complete], 1), chosen, 1)

        # Can a running one still become better than the worst complete one?
        length = longest if settings.early_stopping == "never" and settings.length_penalty > 0 else made
        possible = running_scores[:, :1] / np.float32(length**settings.length_penalty)
        improvable &= (possible > np.where(finished, scores.min(1, keepdims=True), OUT)).any(1, keepdims=True)
        if not improvable.any() or ended.all() or (settings.early_stopping is True and finished.all()):
            break
    chosen_ones = best[:, :count].reshape(images * count, -1)
    lengths = _lengths(chosen_ones, settings)
    return chosen_ones[:, : lengths.max()]


def _lengths(sequences: np.ndarray, settings: Decoding) -> np.ndarray:
    """How long each sequence is, the start and the end token included."""
    ends = sequences[:, 1:] == settings.end
    return np.where(ends.any(1), ends.argmax(1) + 2, sequences.shape[1])


def _top(values: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The largest of each row, the largest first: values and positions, (rows, count)."""
    if values.shape[1] > 4 * count:
        found = np.argpartition(values, -count, axis=1)[:, -count:]
        found.sort(1)
    else:
        found = np.broadcast_to(np.arange(values.shape[1]), values.shape)
    order = np.argsort(-np.take_along_axis(values, found, 1), axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(found, order, 1)
    return np.take_along_axis(values, found, 1), found


def _processed(scores: np.ndarray, sequences: np.ndarray, settings: Decoding) -> np.ndarray:
    """The scores (rows, vocabulary) of the next token, changed as the settings ask.

    Args:
        sequences: (rows, tokens) so far, the start token first.
    """
    if settings.repetition_penalty != 1.0:
        seen = np.take_along_axis(scores, sequences, 1)
        penalty = np.float32(settings.repetition_penalty)
        scores = scores.copy()
        np.put_along_axis(scores, sequences, np.where(seen < 0, seen * penalty, seen / penalty), 1)
    size = settings.no_repeat_ngram_size
    if 0 < size <= sequences.shape[1] + 1:
        scores = scores.copy()
        for row, tokens in enumerate(sequences.tolist()):
            prefix = tokens[len(tokens) - size + 1 :]
            for start in range(len(tokens) - size + 1):
                if tokens[start : start + size - 1] == prefix:
                    scores[row, tokens[start + size - 1]] = -np.inf
    if sequences.shape[1] - 1 < settings.min_new_tokens:
        scores = scores.copy()
        scores[:, settings.end] = -np.inf
    if settings.suppress_tokens:
        scores = scores.copy()
        scores[:, list(settings.suppress_tokens)] = -np.inf
    return scores
