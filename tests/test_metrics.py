"""Scores against the official evaluation's scores, rouge_score, and what must always hold."""
# ruff: noqa: RUF001

import importlib.util
import json
import math
import random
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from captioning import InputError
from captioning.scores.cider import InverseDocumentFrequencies, cider_d, document_frequencies
from captioning.scores.metrics import coco_scores, protocol
from captioning.scores.names import COCO_KEYS, ROUGE_KEYS, SCORE_NAMES
from captioning.scores.ngrams import count
from captioning.scores.reward import CiderReward
from captioning.scores.words import choose, unicode_words

sys.path.insert(0, str(Path(__file__).resolve().parent / "golden"))

import make_golden
import oracle

GOLDEN = json.loads(make_golden.GOLDEN.read_text())
TEN = GOLDEN["sets"]["ten images"]


def by_id(captions):
    return dict(enumerate(captions))


def assert_official(official: dict, predictions: dict, references: dict):
    """The scores, and those of every image, equal the official ones."""
    scores, per_image = coco_scores(predictions, references, per_image=True, rouge=False)
    assert scores == pytest.approx(official["scores"], rel=1e-9, abs=1e-15)
    for ours, theirs in zip(per_image.values(), official["per_image"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", GOLDEN["sets"])
def test_golden_scores(name):
    golden = GOLDEN["sets"][name]
    assert_official(golden, by_id(golden["predictions"]), by_id(golden["references"]))


def test_official_evaluation_now():
    """Captions with words swapped, lost and repeated, scored by pycocoevalcap while we wait."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        pytest.skip("pycocoevalcap is not installed; the golden scores above came from it")
    if shutil.which("java") is None:
        pytest.skip("there is no java, which the official tokenizer needs")
    rng = random.Random(0)
    words = [word for caption in make_golden.CAPTIONS if caption.isascii() for word in caption.split()]
    job = {
        "predictions": [" ".join(rng.choices(words, k=rng.randrange(30))) for _ in range(50)],
        "references": [
            [" ".join(rng.choices(words, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 6))] for _ in range(50)
        ],
    }
    assert_official(*oracle.run([job]), by_id(job["predictions"]), by_id(job["references"]))


TEXTS = st.text(alphabet="ab c\n.'", max_size=12) | st.text(max_size=20)


ENGLISH = st.text(alphabet="ab c\n.'", max_size=12) | st.text(st.characters(max_codepoint=127), max_size=20)


@given(prediction=TEXTS, references=st.lists(ENGLISH, min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_rouge_is_that_of_rouge_score(prediction, references):
    from rouge_score.rouge_scorer import RougeScorer

    names = ["rouge1", "rouge2", "rougeLsum"]
    best = RougeScorer(names, use_stemmer=False).score_multi(references, prediction)
    ours = coco_scores({1: prediction}, {1: references})
    for ours_name, name in zip(ROUGE_KEYS, names, strict=True):
        assert ours[ours_name] == pytest.approx(best[name].fmeasure, rel=1e-12)


def test_bleu_is_nltks_on_the_same_tokens():
    """An independent implementation, on captions long enough that the official code's tiny constants do not show."""
    from nltk.translate.bleu_score import corpus_bleu

    from captioning.scores.ptb import tokenize

    predictions = ["a brown dog runs over the wet grass", "two people sit at a long table with food", "an old red bus"]
    references = [
        ["A brown dog is running over grass.", "The dog runs over the wet grass in a park."],
        ["Two people sit at a table.", "Three people at a long table with food on it.", "People eat."],
        ["An old red bus on a street.", "A red bus."],
    ]
    hypotheses = [line.split() for line in tokenize(predictions)]
    targets = [[line.split() for line in tokenize(captions)] for captions in references]
    scores = coco_scores(by_id(predictions), by_id(references), rouge=False)
    for n in (1, 2, 3):
        expected = corpus_bleu(targets, hypotheses, weights=[1 / n] * n)
        assert scores[f"bleu_{n}"] == pytest.approx(expected, rel=1e-6)


def test_rouge_can_be_left_out():
    arguments = by_id(TEN["predictions"]), by_id(TEN["references"])
    scores = coco_scores(*arguments)
    assert set(scores) == {*COCO_KEYS, *ROUGE_KEYS}
    assert coco_scores(*arguments, rouge=False) == {key: scores[key] for key in COCO_KEYS}


@given(st.lists(st.tuples(st.text(), st.lists(st.text(), min_size=1, max_size=3)), max_size=4))
@settings(deadline=None, max_examples=50)
def test_any_text_scores_in_range(rows):
    predictions, references = by_id([row[0] for row in rows]), by_id([row[1] for row in rows])
    scores, per_image = coco_scores(predictions, references, per_image=True)
    for row in (scores, *per_image.values()):
        for key, value in row.items():
            assert 0 <= value <= (10 if key == "cider_d" else 1) + 1e-9, key
            assert type(value) is float
    for key in ("rouge_l", "cider_d", *ROUGE_KEYS):  # BLEU is not a mean over images
        if per_image:
            mean = sum(row[key] for row in per_image.values()) / len(per_image)
            assert math.isclose(mean, scores[key], abs_tol=1e-12)


WORDS = st.lists(st.sampled_from(["a", "the", "dog", "cat", "runs", "on", "mat"]), min_size=4, max_size=9)


@given(st.lists(WORDS.map(" ".join), min_size=1, max_size=5))
@settings(deadline=None, max_examples=25)
def test_identical_captions_have_bleu_one(captions):
    scores = coco_scores(by_id(captions), {i: [caption] for i, caption in enumerate(captions)})
    for key in ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", *ROUGE_KEYS):
        assert scores[key] == pytest.approx(1, abs=1e-8)


@given(
    st.dictionaries(st.integers(), st.tuples(WORDS.map(" ".join), st.lists(WORDS.map(" ".join), min_size=1))),
    st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=25)
def test_the_order_of_ids_does_not_matter(images, rng):
    predictions = {i: prediction for i, (prediction, _) in images.items()}
    references = {i: references for i, (_, references) in images.items()}
    scores, per_image = coco_scores(predictions, references, per_image=True)
    ids = list(images)
    rng.shuffle(ids)
    again, per_image_again = coco_scores({i: predictions[i] for i in ids}, references, per_image=True)
    assert again == pytest.approx(scores)
    assert set(per_image_again) == set(images)
    for i in images:
        assert per_image_again[i] == pytest.approx(per_image[i])


def test_nothing_to_score():
    assert coco_scores({}, {}) == dict.fromkeys((*COCO_KEYS, *ROUGE_KEYS), 0)
    assert coco_scores({}, {}, per_image=True)[1] == {}


def test_empty_predictions_score_zero():
    scores = coco_scores({1: "", 2: " "}, {1: ["A dog."], 2: ["A cat on a mat."]})
    assert scores == dict.fromkeys(scores, 0)


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ({1: "a"}, {2: ["a"]}, "1 image.* of the references have no prediction, for example id 2"),
        ({1: "a", 2: "b"}, {1: ["a"]}, "1 image.* of the predictions have no reference, for example id 2"),
        ({7: "a"}, {7: []}, "Image 7 has no reference"),
        ({7: None}, {7: ["a"]}, "prediction of image 7 is NoneType, not a string"),
        ({7: ["a"]}, {7: ["a"]}, "prediction of image 7 is list, not a string"),
        ({7: "a"}, {7: "a"}, "references of image 7 are str, not a list"),
        ({7: "a"}, {7: ["a", 5]}, "reference of image 7 is int, not a string"),
        (["a"], {0: ["a"]}, "predictions must be a dict"),
        ({0: "a"}, [["a"]], "references must be a dict"),
    ],
)
def test_bad_input(predictions, references, message):
    with pytest.raises(InputError, match=message):
        coco_scores(predictions, references)


def test_evaluate_metric(monkeypatch, tmp_path):
    """The same numbers through `evaluate`, at once and in batches, with no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from captioning.scores.metrics import CocoCaptionMetric

    expected = coco_scores(by_id(TEN["predictions"]), by_id(TEN["references"]))
    metric = CocoCaptionMetric(cache_dir=str(tmp_path))
    assert metric.compute(predictions=TEN["predictions"], references=TEN["references"]) == expected
    for begin in range(0, 10, 4):
        batch = slice(begin, begin + 4)
        metric.add_batch(predictions=TEN["predictions"][batch], references=TEN["references"][batch])
    assert metric.compute(rouge=False) == {key: expected[key] for key in COCO_KEYS}


def test_ngrams_are_counted_with_their_repetitions():
    ngrams, again, empty = map(count, ["a dog and a dog", "dog a", ""])
    assert ngrams.length == 5
    assert [sorted(counts.values()) for counts in ngrams.counts] == [[1, 2, 2], [1, 1, 2], [1, 1, 1], [1, 1]]
    assert len(ngrams.counts[0].keys() & again.counts[0].keys()) == 2
    assert not ngrams.counts[1].keys() & again.counts[1].keys()
    assert empty.length == 0
    assert empty.counts == [{}, {}, {}, {}]


def test_ngrams_of_any_two_captions_can_be_compared_also_from_threads():
    texts = [f"{word} dog and a new{number} cat" for number in range(300) for word in ("a", "one")]
    with ThreadPoolExecutor(8) as threads:
        counted = list(threads.map(count, texts))
    assert counted == list(map(count, texts))
    cat, dog = count("a cat"), count("a dog")
    assert len(cat.counts[0].keys() & dog.counts[0].keys()) == 1 and not cat.counts[1].keys() & dog.counts[1].keys()


def test_every_score_has_a_name():
    assert set(coco_scores({1: "a"}, {1: ["a"]})) <= set(SCORE_NAMES)


def test_cider_d_by_hand():
    """Two images, one word each: of all n-grams only the 1-gram "dog" of the first image is shared."""
    references = [[count("dog")], [count("cat")]]
    idf = InverseDocumentFrequencies(*document_frequencies(references))
    scores = cider_d([count("dog"), count("dog")], references, idf)
    assert scores == [10 / 4, 0]  # the cosine is 1 for n = 1, and 0 for n = 2, 3, 4


def test_the_reward_is_cider_d_with_the_document_frequencies_of_all_training_images(monkeypatch):
    references = {
        1: ["A dog runs", "The brown dog is running fast"],
        2: ["Two cats sleep on a red sofa", "Cats on a sofa"],
        3: ["A man rides a horse", "A man on a brown horse"],
    }
    candidates = {1: "a dog is running", 2: "two cats on a sofa", 3: "a brown horse"}
    monkeypatch.setattr("captioning.scores.reward.END", "")
    reward = CiderReward(references)
    _, official = coco_scores(candidates, references, per_image=True)
    together = reward(list(candidates), list(candidates.values()), [True] * 3)
    assert together == pytest.approx([official[i]["cider_d"] for i in candidates], abs=1e-12)
    # Several captions of one image, in any order, each scored by itself.
    assert reward([3, 1, 3], ["a brown horse", "a dog is running", "zebra"], [True] * 3) == pytest.approx(
        [together[2], together[0], 0.0]
    )


def test_a_caption_that_stops_in_mid_sentence_earns_less():
    references = {1: ["a man with a hat"], 2: ["a dog on a sofa"], 3: ["a cat"]}
    reward = CiderReward(references)
    whole, cut, unfinished = reward(
        [1] * 3, ["a man with a hat", "a man with a", "a man with a hat"], [True, True, False]
    )
    assert whole > max(cut, unfinished)
    assert whole == pytest.approx(10)


@pytest.mark.parametrize(
    ("references", "right", "wrong"),
    [
        (
            ["A man with a hat .", "A dog on a sofa .", "A cat ."],
            "a man with a hat .",
            [
                "a man with a hat . .",
                "a man with a hat . . . . . . .",
                "a man , with , a hat .",
                'a man with a " hat .',
            ],
        ),
        (
            ["Человек в шляпе.", "Собака на диване.", "Кот."],
            "человек в шляпе.",
            ["человек в шляпе. .", "человек в шляпе!!!", "человек, в шляпе."],
        ),
        (
            ["一只黑狗在雪地里奔跑。", "两个男人正在爬山。", "红色的圆。"],
            "一只黑狗在雪地里奔跑。",
            ["一只黑狗在雪地里奔跑。。", "一只黑狗在雪地里奔跑。。。。。。。", "一只黑狗,在雪地里奔跑。"],
        ),
        (
            ["a man with a hat", "a dog on a sofa", "a cat"],
            "a man with a hat",
            ["a man with a hat .", "a man with a hat !"],
        ),
    ],
)
def test_marks_that_nobody_wrote_earn_less(references, right, wrong):
    """The evaluation drops them. A reward that did too would let captions grow into "a man with a hat . . . . ."."""
    reward = CiderReward(dict(enumerate([caption] for caption in references)))
    most, *others = reward([0] * (1 + len(wrong)), [right, *wrong], [True] * (1 + len(wrong)))
    assert most == pytest.approx(10)
    assert max(others) < 9.5


def test_each_further_mark_earns_less():
    """The official tokenizer drops three to five dots in a row and dashes before it looks for punctuation."""
    reward = CiderReward({1: ["a man with a hat ."], 2: ["a dog on a sofa ."], 3: ["a cat ."]})
    captions = ["a man with a hat" + number * " ." for number in range(1, 13)]
    earned = reward([1] * 12, captions, [True] * 12)
    assert earned[0] == pytest.approx(10) and sorted(earned, reverse=True) == earned and len(set(earned)) == 12
    odd = ["...", "…", "---", "----", "–", "—", "-- .", "&mdash;"]
    assert max(reward([1] * len(odd), [f"a man with a hat {mark} ." for mark in odd], [True] * len(odd))) < 9


# ---- other languages

PERFECT = {
    "Russian": ["Чёрная собака бежит по снегу.", "Красный круг на сером фоне."],
    "Arabic": ["قطة سوداء تنام على العشب الأخضر.", "رجلان يجلسان على مقعد في الحديقة."],
    "Hindi": ["एक काला कुत्ता बर्फ में दौड़ रहा है।", "दो आदमी पार्क में बैठे हैं।"],
    "Korean": ["검은 강아지가 눈 위를 달린다.", "두 남자가 공원에 앉아 있다."],
    "French": ["Un chien noir court à côté d'une forêt enneigée.", "Deux hommes assis près d'un étang."],
    "Vietnamese": ["Một con chó đen chạy trên tuyết.", "Hai người đàn ông ngồi trong công viên."],
    "Chinese": ["一只黑狗在雪地里奔跑。", "两个男人正在爬山。"],
    "Japanese": ["黒い犬が雪の上を走っている。", "二人の男が公園のベンチに座っている。"],
    "Thai": ["สุนัขสีดำวิ่งบนหิมะ", "ผู้ชายสองคนนั่งอยู่ในสวน"],
    "Khmer": ["ឆ្កែខ្មៅរត់លើព្រិល", "បុរសពីរនាក់អង្គុយក្នុងសួន"],
}


@pytest.mark.parametrize("language", PERFECT)
def test_a_perfect_caption_is_perfect_in_any_language(language):
    captions = by_id(PERFECT[language])
    scores = coco_scores(captions, {i: [caption] for i, caption in captions.items()})
    assert scores == {key: pytest.approx(10 if key == "cider_d" else 1, abs=1e-6) for key in scores}
    # Nothing in common is 0, as in English.
    others = coco_scores(dict.fromkeys(captions, "zebra"), {i: [caption] for i, caption in captions.items()})
    assert others == dict.fromkeys(others, pytest.approx(0, abs=1e-6))


def test_rouge_of_other_languages_is_that_of_rouge_score_with_their_words():
    from rouge_score.rouge_scorer import RougeScorer

    class Tokenizer:
        def tokenize(self, text):
            return [word.strip(".,") for word in text.lower().split()]

    reference = "Чёрная собака бежит по снегу,\nа кошка спит."
    scorer = RougeScorer(["rouge1", "rouge2", "rougeLsum"], tokenizer=Tokenizer())
    for caption in ("Собака бежит по снегу", "чёрная кошка\nспит, а собака бежит."):
        ours = coco_scores({1: caption}, {1: [reference]})
        for key, theirs in zip(ROUGE_KEYS, scorer.score(reference, caption).values(), strict=True):
            assert ours[key] == pytest.approx(theirs.fmeasure, rel=1e-12)
            assert ours[key] > 0.2


def test_where_words_have_no_spaces_each_character_is_one():
    """The scores of Chinese are those of the same captions with spaces between the characters."""
    predictions = {1: "一只黑狗在雪地上奔跑。", 2: "两个男人在爬山。"}
    references = {1: ["一只黑狗在雪地里奔跑。", "狗在跑"], 2: ["两个男人正在爬山。"]}
    scores = coco_scores(predictions, references)
    assert 0.5 < scores["bleu_4"] < 1 and 1 < scores["cider_d"] < 10
    letters = {character: chr(ord("a") + n) * 2 for n, character in enumerate("一只黑狗在雪地上奔跑里两个男人爬山正")}

    def spelt(caption):
        return " ".join(letters[character] for character in caption.rstrip("。"))

    spaced = coco_scores(
        {i: spelt(caption) for i, caption in predictions.items()},
        {i: list(map(spelt, captions)) for i, captions in references.items()},
    )
    assert scores == pytest.approx(spaced, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("一只穿T恤的狗，第12只。", "一 只 穿 t 恤 的 狗 第 12 只"),
        ("コーヒーと Café １２", "コ ー ヒ ー と café 12"),
        ("วิ่งบนหิมะ", "วิ่ ง บ น หิ ม ะ"),
        ("बाएँ ओर।", "बाएँ ओर"),
        ("می‌روم، خانه؟", "می\u200cروم خانه"),
        ("L'école_du «Straße»", "l école du strasse"),
        ("cafe\u0301", "café"),
        ("\ud800 👍 — ...", ""),
    ],
)
def test_words_of_unicode(text, words):
    assert unicode_words(text) == words.split(" ") * bool(words)


def test_the_protocol_says_what_a_word_is():
    english, russian, chinese = (protocol([[text]]) for text in ("A dog.", "Собака.", "一只狗。"))
    assert english == (
        "one caption per image against all of its references; BLEU-1..4, ROUGE-L and CIDEr-D as in the official COCO "
        "caption evaluation (PTB tokenisation, punctuation removed); ROUGE-1, ROUGE-2 and ROUGE-Lsum as in "
        "rouge_score, best over the references"
    )
    assert "ROUGE-1, ROUGE-2 and ROUGE-Lsum with Unicode words" in russian
    assert "characters as words, for a language without spaces" in chinese
    assert protocol([]) == english
    # What most captions are decides; a rare word of another language changes nothing.
    assert protocol([["A dog runs on the grass."] * 20, ["A café."]]) == english
    assert protocol([["Ein Hund läuft über die Wiese.", "Ein Hund."]]) == russian
    assert protocol([["狗 runs on the grass."]]) == russian
    assert protocol([["A dog runs.", "一只狗在草地上奔跑。"]]) == chinese


def test_the_reward_has_the_words_of_the_evaluation():
    references = {1: ["一只黑狗在雪地里奔跑。"], 2: ["两个男人正在爬山。"], 3: ["红色的圆"]}
    candidates = {1: "一只狗在雪地里跑", 2: "男人在山上", 3: "圆"}
    official = coco_scores(candidates, references, per_image=True)[1]
    reward = CiderReward(references)(list(candidates), list(candidates.values()), [False] * 3)
    assert all(0 < value < 10 for value in reward)
    assert sorted(range(3), key=reward.__getitem__) == sorted(
        range(3), key=[row["cider_d"] for row in official.values()].__getitem__
    )


@given(st.lists(st.text(st.characters(max_codepoint=127)), max_size=4))
@settings(max_examples=50)
def test_english_has_the_words_of_the_official_evaluation(captions):
    from captioning.scores.ptb import tokenize

    assert choose(captions).tokenize is tokenize
