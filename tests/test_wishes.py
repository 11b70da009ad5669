# ruff: noqa: RUF001 (Cyrillic letters are meant)
"""Captions as they are asked for: what wishes mean of a text, and that any model obeys them, in every way to decode."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import inference
from captioning import InputError
from captioning.model import captioner, constrain, edit, explain, generate, parts, wishes
from captioning.model.wishes import Wishes

ENGLISH = [
    "A man in a red shirt is walking his dog.",
    "Two dogs run through the grass, and a woman watches.",
    "The manual of the machine lies on a table .",
    "a photo of children who play football in the park",
]
RUSSIAN = ["Мужчина гуляет с собакой в парке.", "две собаки бегут по траве", "ребёнок играет с мячом , а кошка спит ."]
DIMENSIONS = 64  # pixels of a side


def byte_level(texts, size=320):
    """Shaped like GPT-2's: letter case kept, no space before the first word."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts * 3,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)


def word_pieces(texts):
    """Shaped like BERT's: what stands before a token decides whether a space does."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[PAD]", "[UNK]", "[EOS]"], show_progress=False)
    pieces.train_from_iterator(texts * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="[EOS]", eos_token="[EOS]", pad_token="[PAD]", unk_token="[UNK]"
    )


TOKENIZERS = {
    "lower case": lambda: parts.train_tokenizer(ENGLISH * 3, 400),
    "byte level": lambda: byte_level(ENGLISH),
    "Cyrillic": lambda: byte_level(RUSSIAN, 300),
    "word pieces": lambda: word_pieces(ENGLISH),
}


def make_bundle(kind, seed=0, sharp=6.0):
    """A tiny captioner with random weights, which writes nonsense: the hardest case."""
    tokenizer = TOKENIZERS[kind]()
    torch.manual_seed(seed)
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    net.generation_config.update(max_new_tokens=14)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "crossattention" in name or "lm_head" in name or "wte" in name:
                parameter.mul_(sharp)
    return captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny"))


@pytest.fixture(scope="module")
def bundles():
    return {kind: make_bundle(kind) for kind in TOKENIZERS}


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(3, 3, DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(1))


def captions(bundle, pixels, asked, count=1, **decoding):
    """As inference.py prepares the model and calls it."""
    bundle = dataclasses.replace(bundle, wishes=asked)
    before = bundle.model.generation_config.to_dict()
    bundle.model.generation_config.update(**decoding)
    try:
        constrain.make_room(bundle)
        constrain.rules_for(bundle, asked, bundle.model.generation_config.max_new_tokens)
        return [[one.text for one in found] for found in explain.best_captions(bundle, pixels, count)]
    finally:
        bundle.model.generation_config.update(**{key: before[key] for key in ("num_beams", "max_new_tokens")})


# ---- what wishes mean of a text


@pytest.mark.parametrize(
    ("asked", "right", "wrong"),
    [
        ({"prefix": "A photo of"}, ["A photo of a dog"], ["a dog", "the A photo of"]),
        ({"min_words": 3}, ["a big dog", "a dog - runs ."], ["a dog .", ""]),
        ({"max_words": 3}, ["a big dog .", "a"], ["a very big dog"]),
        ({"max_characters": 5}, ["a dog", "кошка"], ["a dog."]),
        ({"must": ["dog"]}, ["a dog", "Dog.", "a (dog), two", "DOG!"], ["a dogs", "a hot-dog", "hotdog", "dog's"]),
        ({"must": ["hot dog"]}, ["a hot  dog"], ["a hot red dog"]),
        ({"without": ["man", "Woman"]}, ["a manual", "women", "mankind"], ["a man", "MAN.", "a man's", "the woman,"]),
        ({"without": ["ice cream"]}, ["ice", "cream ice"], ["an ice cream."]),
        ({"without": ["кот"]}, ["котик", "скот"], ["Кот спит", "белый кот."]),
        ({"must": ["狗"]}, ["两只狗在跑"], ["猫"]),
        ({"without": ["狗"]}, ["猫"], ["两只狗在跑"]),
        ({"no_repeat_ngram_size": 2}, ["a dog and a cat"], ["a dog and a dog", "A dog and a dog."]),
        # An accent is a part of its letter, or a character of its own behind it.
        ({"without": ["cafe\u0301"]}, ["a cafe"], ["a caf\xe9", "a cafe\u0301"]),
        ({"must": ["caf\xe9"]}, ["a cafe\u0301", "a caf\xe9"], ["a cafe"]),
        ({"prefix": "Un cafe\u0301"}, ["un caf\xe9 noir"], ["un cafe"]),
    ],
)
def test_what_is_asked_of_a_text(asked, right, wrong):
    for text in right:
        assert Wishes(**asked).problems(text) == [], text
    for text in wrong:
        assert len(Wishes(**asked).problems(text)) == 1, text


@pytest.mark.parametrize(
    ("asked", "raw", "shown"),
    [
        ({}, " a  dog . ", "a dog ."),
        ({"case": "lower"}, "A Dog", "a dog"),
        ({"case": "sentence"}, "a dog , a cat .", "A dog, a cat."),
        ({"case": "sentence"}, "a dog runs", "A dog runs."),
        ({"case": "sentence"}, "does it run ? yes", "Does it run? Yes."),
        ({"case": "sentence", "full_stop": False}, "a dog", "A dog"),
        ({"full_stop": True}, "a dog ,", "a dog."),
        ({"full_stop": True}, "a dog !", "a dog!"),
        ({"case": "sentence"}, "ёж спит", "Ёж спит."),
        ({"case": "sentence"}, "", ""),
        ({"must": ["Rex"]}, "the dog rex .", "the dog Rex ."),
        ({"prefix": "Photo : a", "case": "sentence"}, "Photo : a dog .", "Photo : a dog."),
        ({"prefix": "iPhone photo of", "case": "sentence"}, "iPhone photo of a dog", "iPhone photo of a dog."),
        ({"must": ["eBay"], "case": "sentence"}, "ebay . a dog .", "eBay. A dog."),
        ({"must": ["Hund"]}, "ein hund in der straße", "ein Hund in der straße"),
        ({"must": ["Straße"]}, "strasse an straße", "Straße an Straße"),
    ],
)
def test_how_a_caption_is_shown(asked, raw, shown):
    assert Wishes(**asked).finished(raw) == shown
    assert Wishes(**asked).finished(shown) == shown


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        (["a", "dog", "."], "A dog.", [("A", 0), ("dog.", 1)]),
        (["a", "dog"], "A dog.", [("A", 0), ("dog.", 1)]),
        (["a", "dog", ",", "rex"], "a dog, Rex", [("a", 0), ("dog,", 1), ("Rex", 3)]),
        (["a", "dog"], "something else entirely", [("a", 0), ("dog", 1)]),
    ],
)
def test_shown_words_are_those_of_the_raw_caption(words, text, expected):
    assert wishes.shown(words, text) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--must", "Dog", "--without", "dog"], "--must 'Dog' has the word 'dog' of --without"),
        (["--min_words", "9", "--max_words", "8"], "--min_words 9 is more than --max_words 8"),
        (["--prefix", "A photo of", "--max_words", "3"], "--max_words 3 leaves no room: --prefix alone has 3 words"),
        (["--must", "red", "dog", "--max_words", "1"], "--max_words 1 leaves no room: --must alone has 2 words"),
        (["--prefix", "A photo of", "--max_characters", "11"], "--max_characters 11 is too short .* takes 12 at least"),
        (["--min_words", "9", "--max_characters", "16"], "--max_characters 16 is too short .* takes 17 at least"),
        (["--prefix", "The man", "--without", "man"], "--prefix 'The man' has the word 'man' of --without"),
        (["--prefix", "..."], "--prefix '...' has no letter"),
        (["--must", "!"], "--must '!' has no letter"),
        (["--max_words", "0"], "--max_words 0 is below 1"),
        (["--min_words", "-1"], "--min_words -1 is below 0"),
        (["--no_repeat_ngram_size", "-1"], "--no_repeat_ngram_size -1 is below 0"),
        (["--no_repeat_ngram_size", "1", "--prefix", "a dog a cat"], "--prefix 'a dog a cat' repeats what"),
        (["--repetition_penalty", "0"], "--repetition_penalty 0.0 is not above 0"),
        (["--length_penalty", "nan"], "--length_penalty nan is not between -10 and 10"),
        (["--length_penalty", "400"], "--length_penalty 400.0 is not between -10 and 10"),
        (["--temperature", "-1"], "--temperature -1.0 is not above 0"),
        (["--top_p", "1.5"], "--top_p 1.5 is not between 0 and 1"),
        (["--temperature", "1", "--seed", "-1"], "--seed -1 is not between 0 and"),
        (["--seed", "3"], "--seed is for captions that are drawn; add --temperature or --top_p"),
        (["--top_p", "0.9", "--num_beams", "3"], "--num_beams 3 is for a search"),
        (["--case", "title"], "invalid choice: 'title'"),
    ],
)
def test_wishes_that_cannot_be_are_refused_in_one_sentence(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        inference.main(["x.jpg", *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and len(error.splitlines()) == 1
    assert re.search(message, error), error


def test_what_a_model_cannot_write_is_refused(bundles):
    bundle = bundles["word pieces"]
    with pytest.raises(InputError, match="--must 'собака' is no word that this model's tokenizer can write"):
        constrain.rules_for(bundle, Wishes(must=("собака",)), 14)
    with pytest.raises(InputError, match="with 14 tokens at most; ask for less, or give a higher --max_new_tokens"):
        constrain.rules_for(bundle, Wishes(min_words=20), 14)
    with pytest.raises(InputError, match="--prefix takes"):
        constrain.rules_for(bundle, Wishes(prefix="a dog " * 500), 14)


# ---- the default


def test_wishes_that_ask_nothing_change_nothing(bundles, pixels):
    for kind, bundle in bundles.items():
        plain = generate.generate(bundle, pixels)
        states = bundle.model.encoder(pixel_values=pixels).last_hidden_state
        with torch.no_grad():
            stock = bundle.model.generate(pixel_values=pixels)
        assert torch.equal(generate.generate_tokens(bundle.model, states), stock), kind
        assert plain == generate.decode(bundle.tokenizer, stock)
        nothing = dataclasses.replace(bundle, wishes=Wishes())
        assert generate.generate(nothing, pixels) == plain


def test_wishes_that_hold_anyway_change_nothing(trained, pixels):
    bundle = captioner.load(trained)
    plain = generate.generate(bundle, pixels)
    longest = max(len(text.split()) for text in plain)
    for asked in (Wishes(max_words=longest + 40), Wishes(without=("zebra",)), Wishes(max_characters=1000)):
        assert [best for (best,) in captions(bundle, pixels, asked)] == plain


# ---- captions of an exact length


def test_edited_captions_have_the_scores_of_the_plain_model(bundles, pixels):
    """Captions of several lengths in one batch, with the image's keys and values shared, and a prompt."""
    for kind, mores in (("lower case", (-2, 1)), ("byte level", (-1, 2))):
        bundle = bundles[kind]
        model, words = bundle.model, constrain.vocabulary(bundle)
        states = model.encoder(pixel_values=pixels[:1]).last_hidden_state.detach()
        prompt = constrain.prompt(bundle.tokenizer, "A photo of")
        start, end = model.generation_config.decoder_start_token_id, bundle.tokenizer.eos_token_id
        caption = tuple(bundle.tokenizer(" two red dogs run .", add_special_tokens=False)["input_ids"])
        editor = edit.Editor(model, states, words, prompt, [end])
        for more in mores:
            found = editor.edited(caption, more)
            assert {len(wishes.words_of(words.read(tokens))) for tokens in found} == {4 + more}
            for tokens, (total, likely) in found.items():
                ids = torch.tensor([[start, *prompt, *tokens, end]])
                with torch.no_grad():
                    outputs = model(encoder_outputs=(states,), decoder_input_ids=ids[:, :-1])
                logs = outputs.logits[0].log_softmax(-1)
                values = [float(logs[at, token]) for at, token in enumerate(ids[0, 1:].tolist())]
                assert total == pytest.approx(sum(values[len(prompt) :]), abs=1e-3)
                assert words.read(tokens).endswith(" .")
                after = len(prompt) + len(tokens) - 1  # what follows the last word
                assert likely == pytest.approx(float(logs[after, [end, *words.full_stops]].exp().sum()), abs=1e-5)
        assert all(words.read(tokens).split() for tokens in editor.edited(caption, -3))
        assert editor.edited(caption, -4) == {}, "a caption has a word at least"


def test_a_full_stop_does_not_make_an_end_likely(bundles):
    """Behind "in ." an end is certain. That says nothing of an end behind "in"."""
    bundle = bundles["lower case"]
    words = constrain.vocabulary(bundle)
    rules = constrain.rules_for(bundle, Wishes(max_words=2), 14)
    processor = constrain.Constrain(rules, 1, 2, 1, 1.0)
    dog, stop = words.spell("dog", False), words.full_stops[0]
    tokens = [rules.end]
    for chosen in [*dog, stop]:
        logs = torch.full((2, len(words)), -9.0)
        logs[:, chosen] = -0.1
        logs[:, [rules.end, *words.full_stops]] = -30.0
        if chosen == stop:
            logs[:, [rules.end, stop]] = torch.tensor([1e-4, 1e-3]).log()
        processor(torch.tensor([tokens, tokens]), logs)
        tokens.append(chosen)
    logs = torch.full((2, len(words)), -30.0)
    logs[:, rules.end] = -0.01
    processor(torch.tensor([tokens, tokens]), logs)
    end = processor.ends[0][tuple(tokens[1:])]
    assert words.read(end.tokens).strip().startswith("dog") and end.tokens[-1] == stop
    assert end.likely == pytest.approx(1.1e-3, rel=1e-3) and end.score == pytest.approx(-7.12 / (len(tokens)), abs=0.1)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_caption_of_another_length_obeys_and_a_window_around_the_free_one_keeps_it(trained, pixels, more):
    bundle = captioner.load(trained)
    for number, (free,) in enumerate(captions(bundle, pixels, Wishes(full_stop=False))):
        length = len(wishes.words_of(free))
        image = pixels[number : number + 1]
        same = Wishes(min_words=length, max_words=length)
        assert captions(bundle, image, same) == [[free]]
        asked = Wishes(min_words=max(1, length + more), max_words=max(1, length + more))
        assert asked.problems(captions(bundle, image, asked)[0][0]) == []


# ---- any model obeys

WISHES = st.fixed_dictionaries(
    {},
    optional={
        "prefix": st.sampled_from(["A photo of", "Photo:", "The"]),
        "must": st.lists(st.sampled_from(["dog", "Red", "park", "zq"]), max_size=2).map(tuple),
        "without": st.lists(st.sampled_from(["a", "man", "the", "s", "in"]), max_size=3).map(tuple),
        "min_words": st.integers(0, 9),
        "max_words": st.integers(1, 10),
        "max_characters": st.integers(12, 60),
        "no_repeat_ngram_size": st.integers(0, 3),
        "case": st.sampled_from(wishes.CASES),
        "full_stop": st.booleans(),
        "repetition_penalty": st.sampled_from([1.0, 1.5]),
        "length_penalty": st.sampled_from([0.0, 2.0]),
    },
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=WISHES, kind=st.sampled_from(sorted(TOKENIZERS)), beams=st.sampled_from([1, 3]), drawn=st.booleans())
def test_any_model_obeys_in_every_way_to_decode(bundles, pixels, asked, kind, beams, drawn):
    if kind == "Cyrillic":
        letters = str.maketrans({"a": "а", "d": "д", "o": "о", "g": "г", "s": "с", "m": "м", "n": "н"})
        for name in ("must", "without"):
            asked[name] = tuple(word.translate(letters) for word in asked.get(name, ()))
    if drawn and beams == 1:
        asked |= {"temperature": 1.5, "seed": 3}
    try:
        asked = Wishes(**asked)
        found = captions(bundles[kind], pixels, asked, 2, num_beams=beams)
    except InputError:
        return  # a contradiction, which is refused
    for of_image in found:
        assert of_image and len(set(of_image)) == len(of_image)
        for text in of_image:
            assert asked.problems(text) == [], (asked.settings(), text)
            assert "\ufffd" not in text or not asked.constrain
            if asked.stops:
                assert text[-1] in ".!?…"


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_no_tokenisation_gets_round_a_forbidden_word(kind, pixels, bundles):
    """All one-letter words and half of the words are forbidden: whatever pieces they are spelt with."""
    bundle = bundles[kind]
    texts = [" ".join(generate.generate(dataclasses.replace(bundle, wishes=None), pixels))]
    for _ in range(2):
        forbidden = {word for text in texts for word in wishes.words_of(text) if word.isalpha()} | {"a", "s"}
        asked = Wishes(without=tuple(sorted(forbidden)), max_words=6)
        texts += [best for best, *_ in captions(bundle, pixels, asked)]
        assert all(asked.problems(text) == [] for text in texts[-3:])


def test_a_word_may_begin_with_a_forbidden_one(pixels):
    """The model writes "manual" from "man" and "ual": "man" is forbidden, "manual" is not."""
    tokenizer = byte_level(["man ual", "man dog", "man"], 268)
    bundle = make_bundle("lower case")
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    bundle = captioner.Bundle(net, tokenizer, bundle.image_processor)
    man, goes_on, end = tokenizer(" man")["input_ids"], tokenizer("ual")["input_ids"], tokenizer.eos_token_id
    path = [*tokenizer("the")["input_ids"], *man, *goes_on, end]

    class Path(torch.nn.Module):
        """Logits that write the path, but for a word "man" without more they are as good."""

        def forward(self, hidden):
            positions = hidden.shape[1]
            logits = torch.zeros(len(hidden), positions, len(tokenizer))
            for place in range(positions):
                step = min(Path.step + place, len(path) - 1)
                logits[:, place, path[step]] = 9.0
            Path.step += positions
            return logits

    Path.step = 0
    net.decoder.lm_head = Path()
    states = torch.zeros(1, 65, 128)

    def write(asked):
        Path.step = -1  # the start token is seen twice, see generate_tokens
        found = constrain.search(generate.generate_tokens, dataclasses.replace(bundle, wishes=asked), states)
        return found[0][0].text

    assert write(Wishes(max_words=9)) == "the manual"
    assert write(Wishes(without=("man",))) == "the manual"
    assert "manual" not in write(Wishes(without=("manual",)))


def test_a_prefix_is_shown_as_it_was_written(bundles, pixels):
    for kind in ("lower case", "byte level"):
        (best,) = captions(bundles[kind], pixels[:1], Wishes(prefix="A  photo of "))[0]
        assert best.startswith("A photo of") and not best[10:11].isalnum() and len(best) > 12
        (best,) = captions(bundles[kind], pixels[:1], Wishes(prefix="A photo of", case="lower"))[0]
        assert best.startswith("a photo of")


def test_a_caption_with_a_word_does_not_depend_on_the_images_beside_it():
    bundle, asked = make_bundle("byte level", seed=1), Wishes(must=("dog",))
    with torch.no_grad():  # an end is likelier, so that captions have several lengths
        bundle.model.decoder.transformer.wte.weight[bundle.tokenizer.eos_token_id] *= 2.5
    bundle.model.generation_config.update(max_new_tokens=24)
    eight = torch.randn(8, 3, DIMENSIONS, DIMENSIONS, generator=torch.Generator().manual_seed(2))
    together = captions(bundle, eight, asked, num_beams=2)
    assert together == [captions(bundle, eight[i : i + 1], asked, num_beams=2)[0] for i in range(8)]


def test_alternatives_stay_in_the_order_of_the_search(bundles, pixels, monkeypatch):
    """Captions that a limit cut short come last, however high they score."""
    search, order = constrain.search, []

    def noted(*arguments, **settings):
        found = search(*arguments, **settings)
        order.extend([caption.text for caption in own] for own in found)
        return found

    monkeypatch.setattr(constrain, "search", noted)
    for kind in ("lower case", "byte level"):
        order.clear()
        assert captions(bundles[kind], pixels, Wishes(max_words=3), 5) == order


# ---- models with other tokens than usual


@pytest.mark.parametrize("more", [7, -3])
def test_a_model_may_have_more_tokens_than_its_tokenizer_or_fewer(pixels, more):
    """Such as a vocabulary that was padded to a multiple of 64: what no token spells is never written."""
    bundle = make_bundle("byte level")
    with torch.no_grad():
        bundle.model.decoder.resize_token_embeddings(len(bundle.tokenizer) + more)
    for asked in (Wishes(must=("dog",)), Wishes(max_words=3), Wishes(min_words=9), Wishes(temperature=1.0)):
        assert all(asked.problems(best) == [] for (best,) in captions(bundle, pixels, asked))


def test_a_model_may_have_several_end_tokens(pixels):
    bundle = make_bundle("byte level")
    first, other = bundle.tokenizer.eos_token_id, bundle.tokenizer("park")["input_ids"][-1]
    bundle.model.generation_config.eos_token_id = [first, other]
    for asked in (Wishes(must=("dog",)), Wishes(max_words=3), Wishes(min_words=5), Wishes(temperature=1.0)):
        found = explain.best_captions(dataclasses.replace(bundle, wishes=asked), pixels)
        for (best,) in found:
            assert asked.problems(best.text) == []
            assert best.tokens[-1] == first and not {first, other} & {*best.tokens[:-1]}
    states = bundle.model.encoder(pixel_values=pixels).last_hidden_state
    judged = explain.judge(bundle, states, [["a dog"]] * 3)
    assert all(best.text == "a dog" and best.tokens[-1] == first for (best,) in judged)
    logs = torch.tensor([[0.5, 0.2, 0.3]]).log()
    assert edit.with_one_end(logs, [2, 0]).exp().tolist() == [pytest.approx([0.0, 0.2, 0.8])]


# ---- drawn captions


def test_a_drawn_caption_depends_on_the_image_and_the_seed_alone(bundles, pixels):
    bundle = bundles["byte level"]
    first = captions(bundle, pixels, Wishes(temperature=1.0), 3)
    assert first == captions(bundle, pixels, Wishes(temperature=1.0), 3)
    assert first != captions(bundle, pixels, Wishes(temperature=1.0, seed=1), 3)
    alone = [captions(bundle, pixels[i : i + 1], Wishes(temperature=1.0), 3)[0] for i in (2, 1, 0)]
    assert alone[::-1] == first
    assert len({text for of_image in first for text in of_image}) > len(first)


def test_captions_are_drawn_from_the_models_distribution(pixels):
    """The first token, against the softmax of its logits at that temperature."""
    bundle = make_bundle("lower case", sharp=3.0)
    states = bundle.model.encoder(pixel_values=pixels[:1]).last_hidden_state.detach()
    start = torch.tensor([[bundle.model.generation_config.decoder_start_token_id]])
    with torch.no_grad():
        logits = bundle.model(encoder_outputs=(states,), decoder_input_ids=start).logits[0, -1] / 2.0
    # Control characters, and bytes that no letter begins with, are never written.
    pieces = constrain.vocabulary(bundle).pieces
    written = [bool(piece) and not 0x80 <= piece[0] < 0xC2 and piece[0] < 0xF5 for piece in pieces]
    ranked = logits.masked_fill(~torch.tensor(written), -torch.inf).topk(constrain.DRAWN_FROM)
    probabilities = ranked.values.softmax(-1)
    nucleus = ranked.indices[probabilities.cumsum(-1) - probabilities < 0.6].tolist()
    asked = dataclasses.replace(bundle, wishes=Wishes(temperature=2.0, top_p=0.6))
    many = torch.arange(300.0)[:, None, None, None]
    found = constrain.search(generate.generate_tokens, asked, states.expand(300, -1, -1), 1, many, max_new_tokens=5)
    tokens = [captions[0].tokens[0] for captions in found]
    assert set(tokens) <= set(nucleus) and len(set(tokens)) > 1
    expected = probabilities[0] / probabilities[: len(nucleus)].sum()
    assert tokens.count(nucleus[0]) / 300 == pytest.approx(float(expected), abs=0.09)


# ---- the script


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    base = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30)
    Image.merge("RGB", (base, base.rotate(90).resize(base.size), base.transpose(0))).save(file)
    return file


def test_wishes_hold_in_every_form_of_output(trained, photo, tmp_path, capsys):
    flags = ["--prefix", "Photo:", "--must", "Zebra", "--max_words", "9", "--case", "sentence", "--device=cpu"]
    asked = Wishes(prefix="Photo:", must=("Zebra",), max_words=9, case="sentence")

    def out(*more):
        assert inference.main([str(photo), f"--model_path={trained}", *flags, *map(str, more)]) == 0
        return capsys.readouterr().out.strip()

    plain = out()
    assert asked.problems(plain) == [] and plain.startswith("Photo: ") and "Zebra" in plain and plain.endswith(".")
    entry = json.loads(out("--json"))
    assert entry["caption"] == plain
    given = len(captioner.load(trained).tokenizer("Photo:")["input_ids"])
    values = [token["log_probability"] for token in entry["tokens"][given:]]
    assert entry["score"] == pytest.approx(sum(values) / len(values), abs=1e-5)
    assert entry["tokens"][-1]["text"] == "<|endoftext|>"
    several = [line.split("\t")[1] for line in out("--alternatives", 3).splitlines()]
    assert several and all(asked.problems(text) == [] for text in several)
    assert out("--explain", tmp_path / "page.png") == plain and (tmp_path / "page.png").is_file()
    out("--output", tmp_path / "captions.json")
    assert json.loads((tmp_path / "captions.json").read_text())[0]["caption"] == plain
    assert asked.problems(out("--num_beams", 1)) == []
    assert asked.problems(out("--temperature", 1.2, "--alternatives", 2).splitlines()[0].split("\t")[1]) == []


def test_the_words_of_an_explanation_are_those_that_are_shown(bundles):
    image = Image.effect_mandelbrot((90, 70), (-2, -1.5, 1, 1.5), 30).convert("RGB")
    for kind in ("lower case", "byte level"):
        bundle = dataclasses.replace(bundles[kind], wishes=Wishes(prefix="A photo of", case="sentence", must=("Rex",)))
        explanation = explain.explain(bundle, image)
        assert " ".join(word.text for word in explanation.words) == explanation.caption.text
        assert explanation.caption.text.startswith("A photo of")


def test_a_split_is_scored_with_captions_as_asked(trained, few, tmp_path, capsys):
    file = tmp_path / "predictions.json"
    flags = [f"--model_path={trained}", f"--data_path={few}", f"--output={file}", "--device=cpu", "--max_words=3"]
    assert inference.main(flags) == 0
    assert all(len(wishes.words_of(entry["caption"])) <= 3 for entry in json.loads(file.read_text()))
    assert json.loads((tmp_path / "predictions_results.json").read_text())["decoding"]["max_words"] == 3
