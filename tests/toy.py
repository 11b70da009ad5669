"""A toy data set, and a trainer of tiny presets on it."""

import numpy as np
import torch
from transformers import Seq2SeqTrainingArguments, set_seed

from captioning.data import folder
from captioning.model import captioner, parts
from captioning.training import batches
from captioning.training.trainer import CaptionTrainer

WORDS = ["red", "green", "blue", "small", "large", "dog", "cat", "tree", "car", "runs", "on", "under", "the", "a"]


def caption(rng) -> str:
    return " ".join(rng.choice(WORDS, rng.integers(2, 9)))


class Rows(torch.utils.data.Dataset):
    """Random images with a ragged number of ragged captions."""

    def __init__(self, tokenizer, count, captions=(1, 6), seed=0):
        rng = np.random.default_rng(seed)
        self.captions = {100 + i: [caption(rng) for _ in range(rng.integers(*captions))] for i in range(count)}
        self.rows = [
            {
                "image_id": image_id,
                "pixels": rng.integers(0, 256, (3, 64, 64), dtype=np.uint8),
                "labels": folder.encode_captions(tokenizer, captions, 20)[0],
            }
            for image_id, captions in self.captions.items()
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self)]

    def lengths(self):
        return [sum(map(len, row["labels"])) for row in self.rows]


def make_trainer(
    tokenizer,
    rows,
    output_dir,
    packed=True,
    dropout=0.0,
    waiting=None,
    self_critical=None,
    attention="sdpa",
    **settings,
):
    set_seed(0)
    net = captioner.build("tiny", "tiny", tokenizer)
    net.set_attn_implementation(attention)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    defaults = {
        "output_dir": str(output_dir),
        "report_to": "none",
        "remove_unused_columns": False,
        "predict_with_generate": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "weight_decay": 0.0,
    }
    bundle = captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny"))
    collator = batches.Collator(tokenizer.bos_token_id, tokenizer.pad_token_id, packed)
    return CaptionTrainer(
        bundle,
        rows.captions,
        {},
        waiting,
        self_critical,
        args=Seq2SeqTrainingArguments(**{**defaults, **settings}),
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows,
    )


def toy_tokenizer():
    return parts.train_tokenizer([" ".join(WORDS)] * 3, 400)
