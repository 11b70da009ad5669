"""Captions as they are asked for: a logits processor that keeps `generate` to texts which obey the wishes.

    captions = search(generate_tokens, bundle, states)      # Bundle.wishes says what is asked

The processor reads, for each hypothesis, the text that its tokens spell. Of the tokens that may follow, the likeliest
are tried in turn. One is offered to `generate` if the text is still right with it, and if there is a way out: a few
more tokens that end the caption as it was asked for, within the room that is left. The way out begins with the words
that are still missing. Each hypothesis that is kept has one, so none ends in a dead end.

Wherever a hypothesis may end, what it would score with an end there is noted down, as beam search scores it. Where a
limit on words has a part in a caption, those are noted down too that `edit` makes of what the model writes without the
limit. The best of the ends is taken at which the model itself finds an end likely enough.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import itertools
import math
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation.logits_process import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from captioning import InputError, cli
from captioning.model.caption import ids_of_end, length_to_end
from captioning.model.captioner import Bundle
from captioning.model.edit import Editor, with_one_end
from captioning.model.wishes import Wishes, words_of

# Where the model ends a caption by itself, it finds an end (or a full stop) about as likely as that, or likelier.
LIKELY_END = 0.1
MOST_TRIED = 256  # tokens of a hypothesis, per step; the way out is among them
DRAWN_FROM = 100  # tokens that are tried in turn where captions are drawn
# Nats by which missing words are made likelier, one search after the other. The best caption of them is taken.
ENCOURAGEMENT = (2.0, 4.0, 8.0)
MOST_FILLERS = 400
SPELT_ALONE = "a"  # anchor of a token whose text depends on what stands before it

# A token that is less likely than that is tried only where there is no other way.
UNLIKELY = math.log(1e-4)
MORE_BEAMS = 4  # times as many, where a limit cuts short all that was found
MOST_EDITS = 4  # words that are taken out of a caption, or put into it
LONG_WORD = 20  # characters, with the space before it: where there is less room, a limit may have cut a caption short

ENDS_SENTENCE = frozenset(".!?…\u3002\uff01\uff1f")
_STAYS = re.compile(r"[^\W_]+|['\u2019][^\W_]*|\s*[.!?…\u3002\uff01\uff1f]+|\ufffd+")
# What a hypothesis is charged, in nats, whose last word has to go on, such as "man" without the word "man": it seldom
# does. It gets them back when the word goes on, which then has to be this likely.
SELDOM = math.log(0.05)


Generate = Callable[..., torch.Tensor]  # the model, the encoder's output and settings -> token ids


class Found(NamedTuple):
    """A caption.

    Attributes:
        text: as it is shown.
        tokens: ids of the whole caption, those of the prefix and the end token included.
        given: how many of them are the prefix's.
    """

    text: str
    tokens: list[int]
    given: int


class Text(NamedTuple):
    """What the tokens of a hypothesis spell.

    Attributes:
        read: the text, white space at its ends included.
        rest: bytes of a letter that is not whole.
        plan: a way out, see `Rules.way_out`.
    """

    read: str
    rest: bytes = b""
    plan: tuple[int, ...] = ()


class End(NamedTuple):
    """A hypothesis that ends here.

    Attributes:
        tokens: without prefix and end token.
        score: as in beam search.
        likely: the probability of an end after its last word, by an end token or by punctuation that ends a sentence.
            After a full stop an end is always likely, whatever stands before it.
    """

    tokens: tuple[int, ...]
    score: float
    likely: float


# ---- the vocabulary


class Vocabulary:
    """What each token that a model may write spells.

    Args:
        size: the model's tokens. A model may have more than its tokenizer, which spell nothing, or fewer.

    Attributes:
        pieces: bytes of each token, written behind another word; None: not to be written, as special tokens are.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, size: int):
        self.tokenizer, self.size = tokenizer, size
        special = set(tokenizer.all_special_ids)
        self.pieces = [
            None if token in special or token >= size or not _readable(piece) else piece
            for token, piece in enumerate(_pieces(tokenizer))
        ]
        self.pieces += [None] * (size - len(self.pieces))
        texts = [(piece or b"").decode("utf-8", "replace") for piece in self.pieces]
        self.full_stops = [
            token for token, text in enumerate(texts) if text.strip() and set(text.strip()) <= ENDS_SENTENCE
        ]
        # What a caption that has as many words as it may does not go on with: all but the rest of its last word and the
        # end of the sentence. Hyphens would get round the limit.
        self.next_word = torch.tensor([not _STAYS.fullmatch(text) for text in texts[:size]], dtype=torch.bool)
        whole_word = [text[:1] == " " and text[1:].isalpha() for text in texts[:size]]
        self.whole_word = torch.tensor(whole_word, dtype=torch.bool)
        # Whole words in one token, the shortest first: what a caption that is too short is filled with at worst.
        words = [(len(texts[token]), token) for token in self.whole_word.nonzero()[:, 0].tolist()]
        self.fillers = [(token, texts[token]) for _, token in sorted(words)[:MOST_FILLERS]]
        # Letters that a word can go on with, and bytes that a letter can.
        letters = [(text != text.lower(), len(text), token) for token, text in enumerate(texts) if text.isalpha()]
        self.letters = [(token, texts[token]) for *_, token in sorted(letters)[:24]]
        alone = {piece: token for token, piece in enumerate(self.pieces) if piece is not None and len(piece) == 1}
        self.continuing = [alone[bytes([byte])] for byte in range(0x80, 0xC0) if bytes([byte]) in alone]

    def __len__(self) -> int:
        return self.size

    @functools.cached_property
    def spell(self):
        """Tokens of a word; kept, for the same words are asked for at every step."""
        return functools.lru_cache(maxsize=1024)(self._spell)

    def _spell(self, word: str, first: bool) -> tuple[int, ...]:
        """The tokens that write a word, after a space or (`first`) at the beginning of a caption."""
        found: tuple[int, ...] = ()
        for text in [word] if first else [" " + word, word]:
            found = tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            read = self.read(found)
            if read[:1].isspace() or first:
                break
        return found

    def read(self, tokens: Sequence[int]) -> str:
        """What tokens spell, `�` where one is not whole."""
        return b"".join(self.pieces[token] or b"\xff" for token in tokens).decode("utf-8", "replace")


_VOCABULARIES: weakref.WeakKeyDictionary[PreTrainedTokenizerBase, dict[int, Vocabulary]] = weakref.WeakKeyDictionary()


def vocabulary(bundle: Bundle) -> Vocabulary:
    """The vocabulary of a captioner, read once."""
    size = bundle.model.decoder.config.vocab_size
    known = _VOCABULARIES.setdefault(bundle.tokenizer, {})
    if size not in known:
        known[size] = Vocabulary(bundle.tokenizer, size)
    return known[size]


def _readable(piece: bytes) -> bool:
    """Whether a token has no control characters and no white space but spaces."""
    return all(char.isprintable() or char in cli.JOINERS for char in piece.decode("utf-8", "replace"))


def _pieces(tokenizer: Any) -> list[bytes]:
    """The bytes of each token, written behind another word."""
    from tokenizers import decoders
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    size = len(tokenizer)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(backend.decoder, decoders.ByteLevel):
        of_char = {char: byte for byte, char in bytes_to_unicode().items()}
        names = tokenizer.convert_ids_to_tokens(list(range(size)))
        added = set(tokenizer.get_added_vocab())
        return [
            name.encode() if name in added or not set(name) <= of_char.keys() else bytes(of_char[c] for c in name)
            for name in (name or "" for name in names)
        ]
    # Any other kind: what a token adds to the text behind a word.
    anchor = tokenizer(SPELT_ALONE, add_special_tokens=False)["input_ids"]
    before = tokenizer.decode(anchor, clean_up_tokenization_spaces=False)
    texts = tokenizer.batch_decode([[*anchor, token] for token in range(size)], clean_up_tokenization_spaces=False)
    return [
        text[len(before) :].encode() if text.startswith(before) and "\ufffd" not in text else b"\xff" for text in texts
    ]


# ---- the processor


@dataclass(frozen=True)
class Rules:
    """What may be written: wishes, a vocabulary, and room.

    Attributes:
        ends: ids of the end tokens, most often one. They count as one, which is written as the first of them.
        room: tokens, prefix aside and end token included.
    """

    wishes: Wishes
    words: Vocabulary
    ends: tuple[int, ...]
    room: int

    @property
    def end(self) -> int:
        """The end token that is written."""
        return self.ends[0]

    def beginning(self) -> Text | None:
        """What every caption begins with; None where none can be as it is asked for."""
        return self._with_plan(Text(self.wishes.prefix), 0)

    def after(self, text: Text, token: int, used: int) -> Text | None:
        """The text with one more token, None where that cannot become a caption as it is asked for.

        Args:
            used: tokens that are written before it.
        """
        longer = self.written(text, token)
        if longer is None:
            return None
        if not used and _within_word(longer.read, len(text.read)):
            return None  # the prefix ends in a whole word
        needs_more = len(words_of(longer.read)) < self.wishes.min_words or self.wishes.missing(longer.read)
        if token in self._full_stops and (needs_more or text.read.rstrip()[-1:] in ENDS_SENTENCE):
            return None  # the sentence has to go on, or it has ended
        if self.full(text) and self.words.next_word[token]:
            return None
        if self.wishes.spoilt(longer.read, goes_on=True):
            return None
        if text.plan[:1] == (token,):
            return longer._replace(plan=text.plan[1:])  # a word may be half written: no new plan knows of it
        return self._with_plan(longer, used + 1)

    def _with_plan(self, text: Text, used: int) -> Text | None:
        plan = self.way_out(text, used)
        return None if plan is None else text._replace(plan=tuple(plan))

    def full(self, text: Text) -> bool:
        """Whether a text has as many words as it may, the last of which may go on."""
        return self.wishes.max_words is not None and len(words_of(text.read)) >= self.wishes.max_words

    def cornered(self, text: Text) -> bool:
        """Whether the last word has to go on, because it may not be there as it is."""
        return self.wishes.spoilt(text.read, goes_on=False)

    def may_end(self, text: Text) -> bool:
        """Whether the text is a whole caption as it is asked for."""
        if text.rest or self.wishes.problems(self.wishes.finished(text.read)):
            return False
        return len(words_of(text.read)) > len(words_of(self.wishes.prefix)) and "\ufffd" not in text.read

    def way_out(self, text: Text, used: int) -> list[int] | None:
        """Tokens that make a text a caption as it is asked for, without the end token; None where there are none."""
        plan: list[int] = []
        for step in (self._whole_letter, self._whole_word, self._missing_words, self._enough_words):
            done = step(text)
            if done is None:
                return None
            tokens, text = done
            plan += tokens
        return plan if used + len(plan) < self.room and self.may_end(text) else None

    @functools.cached_property
    def _full_stops(self) -> frozenset[int]:
        return frozenset(self.words.full_stops)

    def written(self, text: Text, token: int) -> Text | None:
        """The text with one more token, None where it spells no text."""
        piece = self.words.pieces[token]
        if not piece or token in self.ends:
            return None
        data = text.rest + piece
        try:
            return Text(text.read + data.decode())
        except UnicodeDecodeError as error:
            if error.end == len(data) and "unexpected end" in error.reason:
                return Text(text.read + data[: error.start].decode(), data[error.start :])
            return None

    def _whole_letter(self, text: Text) -> tuple[list[int], Text] | None:
        tokens: list[int] = []
        while text.rest:
            for token in self.words.continuing:
                if (longer := self.written(text, token)) is not None:
                    break
            else:
                return None
            tokens.append(token)
            text = longer
        return tokens, text

    def _whole_word(self, text: Text) -> tuple[list[int], Text] | None:
        if not self.wishes.spoilt(text.read, goes_on=False):
            return [], text
        for token, letters in self.words.letters:
            longer = Text(text.read + letters)
            if not self.wishes.spoilt(longer.read, goes_on=False):
                return [token], longer
        return None

    def _missing_words(self, text: Text) -> tuple[list[int], Text]:
        tokens: list[int] = []
        for word in self.wishes.missing(text.read):
            if word in self.wishes.missing(text.read):
                spelt = self.words.spell(word, not text.read.strip())
                tokens += spelt
                text = Text(text.read + self.words.read(spelt))
        return tokens, text

    def _enough_words(self, text: Text) -> tuple[list[int], Text]:
        here = words_of(text.read)
        least = max(self.wishes.min_words, len(words_of(self.wishes.prefix)) + 1)
        number = least - len(here)
        if number <= 0:
            return [], text
        there = {word.casefold() for word in here}
        tokens: list[int] = []
        for token, word in self._fillers:
            if len(tokens) < number and word.strip().casefold() not in there:
                there.add(word.strip().casefold())
                tokens.append(token)
        return tokens, Text(text.read + self.words.read(tokens))

    @functools.cached_property
    def _fillers(self) -> list[tuple[int, str]]:
        return [(token, word) for token, word in self.words.fillers if not self.wishes.spoilt(word, goes_on=False)]


def _within_word(text: str, place: int) -> bool:
    """Whether the characters on both sides of a place are letters of one word."""
    return place > 0 and text[place - 1].isalnum() and text[place : place + 1].isalnum()


class Constrain(LogitsProcessor):
    """Offers `generate` the tokens that keep each caption as it is asked for.

    Args:
        rules: what may be written.
        beams: hypotheses of an image, 1 for greedy search and for drawing.
        given: tokens before the generated ones, the start token and the prefix.
        length_penalty: of beam search.
        encouragement: nats that are added to tokens of missing words.
        draws: a generator of random numbers for each image; captions are drawn with them.
    """

    def __init__(
        self,
        rules: Rules,
        images: int,
        beams: int,
        given: int,
        length_penalty: float,
        encouragement: float = 0.0,
        draws: Sequence[torch.Generator] | None = None,
    ):
        self.rules, self.beams, self.given = rules, beams, given
        self.length_penalty, self.encouragement, self.draws = length_penalty, encouragement, draws
        # Of each image: what a hypothesis spells and the sum of its tokens' log-probabilities; where it may end.
        beginning = rules.beginning()
        assert beginning is not None  # `rules_for` has seen to it
        start = (beginning, 0.0)
        self.texts: list[dict[tuple[int, ...], tuple[Text, float]]] = [{(): start} for _ in range(images)]
        self.ends: list[dict[tuple[int, ...], End]] = [{} for _ in range(images)]
        self.likely: list[dict[tuple[int, ...], float]] = [{} for _ in range(images)]  # as in `End`
        self.stops = {rules.end, *rules.words.full_stops}
        # Beam search keeps twice as many hypotheses as it has beams, for the best ones may end.
        self.offers = DRAWN_FROM if draws else 2 * beams if beams > 1 else 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        # Beam search gives log-probabilities, the others logits.
        logs = with_one_end(scores if self.beams > 1 else scores.log_softmax(-1), self.rules.ends)
        end = self.rules.end
        likely = logs[:, [end, *self.rules.words.full_stops]].exp().sum(-1).tolist()
        ends = logs[:, end].tolist()
        offered = torch.full_like(logs, -math.inf)
        rows = [tuple(row) for row in input_ids[:, self.given :].tolist()]
        values, order = (part.tolist() for part in self._urged(rows, logs).topk(min(MOST_TRIED, logs.shape[1])))
        for row, tokens in enumerate(rows):
            image = row // self.beams
            if tokens not in self.texts[image]:
                continue  # a hypothesis that has ended, or that nothing was offered to
            text, total = self.texts[image][tokens]
            before = self.likely[image].get(tokens[:-1]) if tokens and tokens[-1] in self.stops else None
            self.likely[image][tokens] = likely[row] if before is None else before
            if self.rules.may_end(text):
                score = (total + ends[row]) / (len(tokens) + 1) ** self.length_penalty
                self.ends[image][tokens] = End(tokens, score, self.likely[image][tokens])
            chosen = self._offers(image, tokens, zip(order[row], values[row], strict=True), logs[row])
            ids = torch.tensor(list(chosen), device=logs.device, dtype=torch.long)
            found = torch.tensor(list(chosen.values()), device=logs.device, dtype=logs.dtype)
            if self.draws and chosen:
                found = self._drawn(found, self.draws[row])
            offered[row, ids] = found
        return offered

    def _offers(
        self, image: int, tokens: tuple[int, ...], ranked: Iterable[tuple[int, float]], logs: torch.Tensor
    ) -> dict[int, float]:
        """The tokens that may follow, with their scores."""
        chosen: dict[int, float] = {}
        rules, texts, used = self.rules, self.texts[image], len(tokens)
        text, total = texts[tokens]
        cornered, full, corners = rules.cornered(text), rules.full(text), 0
        owed = -SELDOM if cornered and self.beams > 1 else 0.0
        for token, value in ranked:
            if len(chosen) - corners == self.offers or value < UNLIKELY:
                break
            if value < SELDOM and (cornered or full) and token not in self.stops:
                continue  # the word would go on for no other reason than the wishes
            if token == rules.end:
                if tokens in self.ends[image]:
                    chosen[token] = value + owed
            elif (longer := rules.after(text, token, used)) is not None:
                if into := rules.cornered(longer):
                    if self.beams == 1:
                        continue  # there is no other hypothesis, should the word not go on
                    corners += 1
                chosen[token] = value + owed + SELDOM * into
                texts[(*tokens, token)] = (longer, total + float(logs[token]))
        if not chosen and (self.beams == 1 or not self.ends[image]):
            # Nothing likely will do: the way out, which every hypothesis has.
            token = next(iter(text.plan), rules.end)
            value = max(float(logs[token]), 3 * UNLIKELY)  # some other processor may forbid it
            chosen[token] = value
            if text.plan and (longer := rules.written(text, token)) is not None:
                texts[(*tokens, token)] = (longer._replace(plan=text.plan[1:]), total + value)
        return chosen

    def _urged(self, rows: Sequence[tuple[int, ...]], logs: torch.Tensor) -> torch.Tensor:
        """`logs` with the tokens of missing words made likelier, and without new words where there is no room."""
        if not self.encouragement and self.rules.wishes.max_words is None:
            return logs
        urged, next_word = logs.clone(), self.rules.words.next_word.to(logs.device)
        for row, tokens in enumerate(rows):
            found = self.texts[row // self.beams].get(tokens)
            if found is None:
                continue
            if self.rules.full(found[0]):
                urged[row, next_word] = -math.inf
            first = not found[0].read.strip()
            for word in self.rules.wishes.missing(found[0].read):
                spelt = self.rules.words.spell(word, first)
                within = max((n for n in range(1, len(spelt)) if tokens[-n:] == spelt[:n]), default=0)
                urged[row, spelt[within]] += self.encouragement
        return urged

    def _drawn(self, values: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Scores whose highest is a draw from softmax(values): the Gumbel-max trick (https://arxiv.org/abs/1611.00712).

        So each image has random numbers of its own, and its caption does not depend on the images beside it.
        """
        wishes = self.rules.wishes
        warped = values / (wishes.temperature or 1.0)
        if wishes.top_p is not None and wishes.top_p < 1:
            ranked = warped.softmax(-1).sort(descending=True)
            before = ranked.values.cumsum(-1) - ranked.values
            warped = warped.index_fill(0, ranked.indices[before >= wishes.top_p], -math.inf)
        noise = torch.rand(len(values), generator=draw).clamp_min(1e-20).to(values)
        return warped - (-noise.log()).log()


class _AfterStart(LogitsProcessor):
    """A processor that does not see the start token, which is GPT-2's end token as well.

    Otherwise the end would count as a token that has occurred: less likely with a repetition penalty, and forbidden
    where no token may occur twice.
    """

    def __init__(self, processor: LogitsProcessor):
        self.processor = processor

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> Any:
        rest: Any = input_ids[:, 1:]
        return self.processor(rest, cast(Any, scores)) if rest.shape[1] else scores


# ---- the search


def search(
    generate: Generate,
    bundle: Bundle,
    states: torch.Tensor,
    count: int = 1,
    pixel_values: torch.Tensor | None = None,
    **settings,
) -> list[list[Found]]:
    """Captions as `bundle.wishes` asks for them.

    Args:
        generate: `captioning.model.generate.generate_tokens`.
        states: the encoder's output, (batch, encoder tokens, hidden size).
        count: captions of each image; two that read the same count once, so that there may be fewer.
        pixel_values: of the images, (batch, channels, height, width): what is drawn for an image depends on them.
        settings: as in `model.generate`.

    Returns:
        A list for each image, the best caption first.

    Raises:
        InputError: the model cannot write such captions, see `rules_for`.
    """
    wishes, config = bundle.wishes, copy.deepcopy(bundle.model.generation_config)
    assert wishes is not None
    config.update(**settings)
    if wishes.length_penalty is not None:
        config.length_penalty = settings["length_penalty"] = wishes.length_penalty
    rules = rules_for(bundle, wishes, config.max_new_tokens)
    settings |= {"max_new_tokens": rules.room}
    run = _Run(generate, bundle, states, rules, count, config, settings)
    if wishes.drawn:
        assert pixel_values is not None
        return run.drawn(pixel_values)
    if not wishes.constrain:
        return run.plain()
    if not wishes.must:
        return run.constrained()
    # Those that have the words anyway, as the model writes them by itself.
    free = dataclasses.replace(rules, wishes=dataclasses.replace(wishes, must=()))
    found = _Run(generate, bundle, states, free, count, config, settings).constrained(again=False)
    lacking = [
        image for image, own in enumerate(found) if not own or any(wishes.missing(caption.text) for caption in own)
    ]
    # Not much longer than those: a caption that puts the words off would be searched to the very end. Images of one
    # length are searched together, so that no caption depends on the images beside its own.
    more = 4 + 2 * sum(len(rules.words.spell(word, False)) for word in wishes.must)
    by_room: dict[int, list[int]] = {}
    for image in lacking:
        longest = max((len(caption.tokens) - caption.given for caption in found[image]), default=rules.room)
        by_room.setdefault(min(rules.room, longest + more), []).append(image)
    for room, images in by_room.items():
        nearer = dataclasses.replace(rules, room=room)
        nearer = nearer if nearer.beginning() is not None else rules
        settings |= {"max_new_tokens": nearer.room}
        urged = _Run(generate, bundle, states[images], nearer, count, config, settings).encouraged()
        for image, captions in zip(images, urged, strict=True):
            found[image] = captions
    return found


@dataclass
class _Run:
    """One search; the arguments of `search`."""

    generate: Generate
    bundle: Bundle
    states: torch.Tensor
    rules: Rules
    count: int
    config: GenerationConfig
    settings: dict[str, Any]

    @functools.cached_property
    def prompt(self) -> list[int]:
        return prompt(self.bundle.tokenizer, self.rules.wishes.prefix)

    def plain(self) -> list[list[Found]]:
        """By `generate` alone: nothing can be wrong."""
        rows = self._generate(self.states, None, max(self.count, self.config.num_beams or 1), self.count)
        texts = self.bundle.tokenizer.batch_decode(
            list(map(list, rows)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        found: list[dict[str, Found]] = [{} for _ in range(len(self.states))]
        for number, (row, text) in enumerate(zip(rows, texts, strict=True)):
            shown = self.rules.wishes.finished(text)
            found[number // self.count].setdefault(shown, Found(shown, list(row), 0))
        return [list(captions.values()) for captions in found]

    def constrained(self, again: bool = True) -> list[list[Found]]:
        """What beam search finds, and in its place a better end where a limit cut it short.

        Args:
            again: search with more beams what was cut short; otherwise nothing is returned of it.
        """
        beams = max(self.count, self.config.num_beams or 1)
        processor = self._processor(len(self.states), beams)
        rows = self._generate(self.states, processor, beams, self.count)
        ends = processor.ends
        of_image = [rows[image * self.count :][: self.count] for image in range(len(ends))]
        short = [image for image, found in enumerate(ends) if not self._natural(found, of_image[image])]
        if not again:
            return [[] if i in short else self._best(ends[i], of_image[i]) for i in range(len(ends))]
        kept: dict[int, list[Found]] = {}
        if beams > 1 and self._editable:
            # Also what ends well: where a limit had a part in it, there may be something likelier of that length.
            natural = list(map(self._natural, ends, of_image))
            bound = [image for image, own in enumerate(natural) if not (own and all(map(self._unbound, own)))]
            kept, edited = self._edit(bound, ends)
            of_image = [[] if image in edited else rows for image, rows in enumerate(of_image)]
            short = [image for image in short if image not in kept and not any(map(_whole, ends[image].values()))]
        if short and beams > 1:
            processor = self._processor(len(short), MORE_BEAMS * beams)
            self._generate(self.states[short], processor, MORE_BEAMS * beams, 1)
            for image, more in zip(short, processor.ends, strict=True):
                ends[image] |= more
        return [kept.get(image) or self._best(ends[image], of_image[image]) for image in range(len(ends))]

    @property
    def _editable(self) -> bool:
        """Whether a caption that only has too many or too few words can be edited, and its score be known."""
        wishes = self.rules.wishes
        counted = wishes.min_words or wishes.max_words is not None
        return bool(counted and not wishes.no_repeat_ngram_size and wishes.repetition_penalty == 1)

    def _edit(
        self, images: Sequence[int], ends: list[dict[tuple[int, ...], End]]
    ) -> tuple[dict[int, list[Found]], set[int]]:
        """Add to `ends` what the model writes without limits, with so many words as are asked for.

        Returns:
            By image, what the model writes without limits, where that is as asked; and the images to which some
            were added.
        """
        wishes, words = self.rules.wishes, self.rules.words
        wide = dataclasses.replace(wishes, min_words=0, max_words=None, max_characters=None)
        rules = dataclasses.replace(self.rules, wishes=wide)
        run = _Run(self.generate, self.bundle, self.states[list(images)], rules, 1, self.config, self.settings)
        kept: dict[int, list[Found]] = {}
        added: set[int] = set()
        if not images:
            return kept, added
        for image, found in zip(images, run.constrained(again=False) if wide.constrain else run.plain(), strict=True):
            if not found or found[0].tokens[-1] not in self.rules.ends:
                continue
            tokens = tuple(found[0].tokens[found[0].given : -1])
            number = len(words_of(found[0].text))
            more = max(wishes.min_words - number, 0) or min((wishes.max_words or number) - number, 0)
            if not more and self.count == 1 and not wishes.problems(found[0].text):
                kept[image] = found
            if not 0 < abs(more) <= MOST_EDITS:
                continue
            editor = Editor(self.bundle.model, self.states[image : image + 1], words, self.prompt, self.rules.ends)
            for own, (total, likely) in editor.edited(tokens, more).items():
                text = Text(wishes.prefix + words.read(own))
                if len(own) < self.rules.room and self.rules.may_end(text) and not self.rules.cornered(text):
                    ends[image][own] = End(own, total / (len(own) + 1) ** self._penalty, likely)
                    added.add(image)
        return kept, added

    def encouraged(self) -> list[list[Found]]:
        """The best captions of several searches, each of which makes the missing words likelier than the last."""
        beams = max(self.count, self.config.num_beams or 1)
        ends: list[dict[tuple[int, ...], End]] = [{} for _ in range(len(self.states))]
        for encouragement in ENCOURAGEMENT:
            processor = self._processor(len(self.states), beams, encouragement)
            self._generate(self.states, processor, beams, 1)
            for all_, some in zip(ends, processor.ends, strict=True):
                all_ |= some
        return [self._best(of_image, []) for of_image in ends]

    def drawn(self, pixel_values: torch.Tensor) -> list[list[Found]]:
        """Captions drawn from the model's distribution."""
        wishes, count = self.rules.wishes, self.count
        keys = [hashlib.sha256(image.cpu().numpy().tobytes()).digest() for image in pixel_values]
        draws = []
        for key, number in itertools.product(keys, range(count)):
            digest = hashlib.sha256(f"{wishes.seed} {number} ".encode() + key).digest()
            draws.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
        processor = self._processor(len(draws), 1, 0.0, draws)
        rows = self._generate(self.states.repeat_interleave(count, 0), processor, 1, 1)
        found: list[dict[str, Found]] = [{} for _ in range(len(self.states))]
        for number, row in enumerate(rows):
            caption = self._best(processor.ends[number], [row])[0]
            found[number // count].setdefault(caption.text, caption)
        return [list(captions.values()) for captions in found]

    def _processor(
        self, images: int, beams: int, encouragement: float = 0.0, draws: Sequence[torch.Generator] | None = None
    ) -> Constrain:
        return Constrain(self.rules, images, beams, 1 + len(self.prompt), self._penalty, encouragement, draws)

    @property
    def _penalty(self) -> float:
        return 1.0 if self.config.length_penalty is None else self.config.length_penalty

    def _generate(
        self, states: torch.Tensor, processor: Constrain | None, beams: int, count: int
    ) -> list[tuple[int, ...]]:
        """The tokens of each sequence without start token and prefix, the end token last if there is one."""
        wishes = self.rules.wishes
        processors = LogitsProcessorList()
        if wishes.no_repeat_ngram_size:
            processors.append(_AfterStart(NoRepeatNGramLogitsProcessor(wishes.no_repeat_ngram_size)))
        if wishes.repetition_penalty != 1:
            processors.append(_AfterStart(RepetitionPenaltyLogitsProcessor(wishes.repetition_penalty)))
        if processor is not None:
            processors.append(processor)
        sequences = self.generate(
            self.bundle.model,
            states,
            prompt=self.prompt,
            logits_processor=processors,
            **{**self.settings, "num_beams": beams, "num_return_sequences": count, "do_sample": False},
        )
        rows = sequences[:, 1 + len(self.prompt) :].tolist()
        return [tuple(row[: length_to_end(row, self.rules.ends)]) for row in rows]

    def _best(self, ends: dict[tuple[int, ...], End], rows: Sequence[tuple[int, ...]]) -> list[Found]:
        """The best captions of an image.

        Args:
            ends: where its hypotheses may end.
            rows: what `generate` returned, the best one first. Each is taken, unless a limit cut it short.
        """
        wishes, found = self.rules.wishes, dict[str, Found]()
        others = sorted(ends.values(), key=lambda end: (_whole(end), end.score), reverse=True)
        for end in [*self._natural(ends, rows), *others]:
            text = wishes.finished(wishes.prefix + self.rules.words.read(end.tokens))
            tokens = [*self.prompt, *end.tokens, self.rules.end]
            found.setdefault(text, Found(text, tokens, len(self.prompt)))
            if len(found) == self.count:
                break
        if not found:
            raise InputError("no caption was found that is as it is asked for; ask for less")
        return list(found.values())

    def _natural(self, ends: dict[tuple[int, ...], End], rows: Sequence[tuple[int, ...]]) -> list[End]:
        """Those of `rows` that no limit cut short."""
        generated = [ends[row[:-1]] for row in rows if row and row[-1] == self.rules.end and row[:-1] in ends]
        # What is drawn is taken as it was drawn, unless a wish cut it short.
        most = math.inf if self.rules.wishes.drawn else self.rules.room - 1
        return [end for end in generated if _whole(end) or (self._unbound(end) and len(end.tokens) < most)]

    def _unbound(self, end: End) -> bool:
        """Whether no limit on words or characters had a part in how long a caption is."""
        wishes = self.rules.wishes
        text = wishes.finished(wishes.prefix + self.rules.words.read(end.tokens))
        words, characters = wishes.max_words or math.inf, wishes.max_characters or math.inf
        return wishes.min_words < len(words_of(text)) < words and len(text) + LONG_WORD <= characters


def _whole(end: End) -> bool:
    """Whether the model itself might end a caption there."""
    return end.likely >= LIKELY_END


def prompt(tokenizer: PreTrainedTokenizerBase, prefix: str) -> list[int]:
    """The tokens of a prefix, as those of a caption in training."""
    ids = tokenizer(prefix, add_special_tokens=False, verbose=False)["input_ids"] if prefix else []
    return [token for token in ids if token != tokenizer.eos_token_id]


def make_room(bundle: Bundle) -> None:
    """Let a model write as many tokens as its wishes may need, where its own limit is lower and it has the places."""
    wishes, config = bundle.wishes, bundle.model.generation_config
    if wishes is None or not config.max_new_tokens or not (wishes.min_words or wishes.must):
        return
    words = vocabulary(bundle)
    given = 1 + len(prompt(bundle.tokenizer, wishes.prefix))
    least = 3 * wishes.min_words + sum(len(words.spell(word, False)) for word in wishes.must) + 4
    positions = bundle.model.decoder.config.max_position_embeddings - given
    config.max_new_tokens = max(config.max_new_tokens, min(least, positions))


def rules_for(bundle: Bundle, wishes: Wishes, max_new_tokens: int | None) -> Rules:
    """What may be written by a model.

    Args:
        max_new_tokens: how many tokens may follow the prefix.

    Raises:
        InputError: the model cannot write what is asked for.
    """
    words = vocabulary(bundle)
    given = 1 + len(prompt(bundle.tokenizer, wishes.prefix))
    positions = bundle.model.decoder.config.max_position_embeddings - given
    if positions < 1:
        raise InputError(f"--prefix takes {given} of the decoder's {positions + given} positions; give a shorter one")
    for word in wishes.must:
        if word in wishes.missing(words.read(words.spell(word, False))):
            raise InputError(f"--must '{word}' is no word that this model's tokenizer can write; name another")
    ends = tuple(ids_of_end(bundle.model.generation_config.eos_token_id))
    rules = Rules(wishes, words, ends, min(max_new_tokens or positions, positions))
    if rules.beginning() is None:
        raise InputError(
            f"this model cannot write captions as they are asked for, with {rules.room} tokens at most; ask for less, "
            "or give a higher --max_new_tokens"
        )
    return rules
