"""The scores of this project: their keys, what people call them, and the order of every table.

    {name: scores[key] for key, name in SCORE_NAMES.items() if key in scores}

A score that is added here appears in every table, report and model card whose results hold its key.
"""

from __future__ import annotations

COCO_KEYS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")  # the official COCO caption evaluation
ROUGE_KEYS = ("rouge_1", "rouge_2", "rouge_lsum")  # the rouge_score package
CLIP_KEYS = ("clip_score", "ref_clip_score")  # with --clip only

# key -> name. The loss is better where it is lower, every other score where it is higher.
SCORE_NAMES: dict[str, str] = {
    "loss": "loss",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider_d": "CIDEr-D",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_lsum": "ROUGE-Lsum",
    "clip_score": "CLIPScore",
    "ref_clip_score": "RefCLIPScore",
    "facts_right": "facts right",  # of drawn scenes alone: the share of captions whose facts are all right
}

# Where there is room for a few only, such as a line of progress.
BRIEF_KEYS = ("bleu_1", "bleu_4", "rouge_l", "cider_d", "facts_right")
