"""A right folder, damaged in every way: it is refused in a sentence, or it works; nothing else, within limits.

2,000 cases are drawn from all by default, and all of them are tried with `-m slow`. The counts by outcome are printed.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from damage import Damage, damages, try_all
from PIL import Image

from captioning.data.folder import load_prepared
from captioning.model import captioner, parts
from captioning.model.generate import generate
from captioning.training import resumable

TOKENIZER = parts.train_tokenizer(["a dog runs", "a cat sleeps"] * 3, 300)


def open_data(folder: Path) -> None:
    """What train.py does with --data_path, before it trains."""
    parts.quiet_transformers()
    splits, description = load_prepared(folder)
    for split in splits.values():
        split.captions, split.lengths(), split.highest_token(), split.image_id
        for row in range(len(split)):
            split.labels(row), split.image(row)
    parts.load_tokenizer(folder, "--data_path")
    parts.load_image_processor(folder, "--data_path")
    json.dumps(description, allow_nan=False)


def open_captioner(folder: Path) -> None:
    """What inference.py does with --model_path and an image."""
    parts.quiet_transformers()
    bundle = captioner.load(folder)
    pixels = torch.from_numpy(bundle.pixels(Image.new("RGB", (80, 60), "red")))[None]
    assert isinstance(generate(bundle, bundle.pixels.normalise(pixels))[0], str)
    captioner.names_of(folder)


def open_encoder(folder: Path) -> None:
    """What train.py does with --encoder."""
    parts.quiet_transformers()
    image_processor = parts.load_image_processor(str(folder))
    captioner.check_parts(str(folder), "tiny", image_processor)
    model = captioner.build(str(folder), "tiny", TOKENIZER)
    captioner.refuse_misfit(model.encoder, image_processor, f"--encoder '{folder}'")


def open_decoder(folder: Path) -> None:
    """What train.py does with --decoder."""
    parts.quiet_transformers()
    tokenizer = parts.load_tokenizer(str(folder))
    parts.refuse_other_kinds("tiny", str(folder))
    captioner.build("tiny", str(folder), tokenizer)


def open_state(folder: Path) -> None:
    """What train.py does with the state in --resume_from_checkpoint."""
    resumable.check_state(folder)


OPENS = {
    "data": open_data,
    "captioner": open_captioner,
    "encoder": open_encoder,
    "decoder": open_decoder,
    "state": open_state,
}
DRAWN = {"data": 800, "captioner": 700, "encoder": 150, "decoder": 150, "state": 200}


@pytest.fixture(scope="module")
def right(few, tmp_path_factory) -> dict[str, Path]:
    """A right folder of each kind."""
    from datasets import load_from_disk

    root = tmp_path_factory.mktemp("right")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts.quiet_transformers()
    splits = load_from_disk(str(few))
    for split in splits:
        splits[split] = splits[split].select(range(4))
    splits.save_to_disk(str(root / "data"))
    for file in few.iterdir():
        if file.is_file() and not (root / "data" / file.name).exists():
            shutil.copy(file, root / "data")
    net = captioner.build("tiny", "tiny", TOKENIZER)
    bundle = captioner.Bundle(net, TOKENIZER, parts.load_image_processor("tiny"))
    captioner.save(bundle, root / "captioner")
    net.encoder.save_pretrained(root / "encoder")
    bundle.image_processor.save_pretrained(root / "encoder")
    net.decoder.save_pretrained(root / "decoder")
    TOKENIZER.save_pretrained(root / "decoder")
    (root / "state").mkdir()
    history = [{"loss": 2.5, "epoch": 0.5, "step": 1}, {"eval_loss": 2.0, "eval_cider_d": 0.5, "epoch": 1.0, "step": 2}]
    switches = ("should_epoch_stop", "should_evaluate", "should_log", "should_save", "should_training_stop")
    state = {
        "global_step": 2,
        "max_steps": 4,
        "epoch": 1.0,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "eval_steps": 500,
        "save_steps": 500,
        "train_batch_size": 16,
        "num_input_tokens_seen": 0,
        "total_flos": 0.0,
        "log_history": history,
        "best_metric": 0.5,
        "best_global_step": 2,
        "best_model_checkpoint": "run/checkpoint-2",
        "is_local_process_zero": True,
        "is_world_process_zero": True,
        "is_hyper_param_search": False,
        "stateful_callbacks": {
            "Resumed": {"args": {}, "attributes": {"data": "71a35eca23718b6c", "parts": "decoder and encoder"}},
            "TrainerControl": {"args": dict.fromkeys(switches, False), "attributes": {}},
        },
    }
    (root / "state" / "trainer_state.json").write_text(json.dumps(state))
    return {kind: root / kind for kind in OPENS}


def drawn(folder: Path, count: int) -> list[Damage]:
    """Some of what can be done to a folder; each file is drawn about as often as any other."""
    rng = random.Random(0)
    by_file: dict[str, list[Damage]] = {}
    for damage in damages(folder):
        by_file.setdefault(damage.file, []).append(damage)
    queues = [rng.sample(own, len(own)) for own in by_file.values()]
    turns = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return turns[:count]


def judge(kind: str, folder: Path, cases: list[Damage]) -> None:
    outcomes = try_all([(folder, damage) for damage in cases], OPENS[kind])
    counts = Counter(outcome.split(":")[0] for outcome in outcomes)
    print(f"{kind}: {len(cases):,} cases, {dict(counts)}")
    wrong = {str(case): outcome for case, outcome in zip(cases, outcomes, strict=True)}
    wrong = {case: outcome for case, outcome in wrong.items() if not outcome.startswith(("worked", "refused: "))}
    assert wrong == {}
    assert counts["refused"] and counts["worked"]


@pytest.mark.parametrize("kind", OPENS)
def test_a_damaged_folder_is_refused_in_a_sentence_or_works(kind, right):
    judge(kind, right[kind], drawn(right[kind], DRAWN[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPENS)
def test_every_damage_is_refused_in_a_sentence_or_works(kind, right):
    judge(kind, right[kind], list(damages(right[kind])))


def test_two_thousand_are_drawn():
    assert sum(DRAWN.values()) == 2000
