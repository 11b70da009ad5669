"""processed_data/, written and read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError
from captioning.files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_captions(
    tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int
) -> tuple[list[list[int]], int]:
    """Captions -> token ids, each truncated to `max_length - 1` and ended by exactly one EOS.

    Returns:
        The ids of each caption, and how many captions were truncated.
    """
    eos = tokenizer.eos_token_id
    texts = [" ".join(caption.split()) for caption in captions]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
    # A caption that spells out the end token would otherwise end early.
    encoded = [[token for token in ids if token != eos] for ids in encoded]
    truncated = sum(len(ids) > max_length - 1 for ids in encoded)
    return [[*ids[: max_length - 1], eos] for ids in encoded], truncated


def load_prepared(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The splits of a folder that `dataloader.py` wrote, memory-mapped, and its `dataset.json`.

    Raises:
        InputError: it is no such folder, or not whole.
    """
    from datasets import load_from_disk

    description = read_json(folder / "dataset.json")
    try:
        splits = load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--data_path '{folder}' cannot be read ({reason}); run dataloader.py again") from None
    except IndexError:
        raise InputError(f"--data_path '{folder}' has a split without images; run dataloader.py again") from None
    for split in ("train", "validation", "test"):
        if split not in splits or not len(splits[split]):
            raise InputError(f"--data_path '{folder}' has no {split} images; run dataloader.py again")
        missing = {"image_id", "image", "captions", "labels"} - set(splits[split].column_names)
        if missing:
            raise InputError(
                f"the {split} split of --data_path '{folder}' has no column '{min(missing)}'; run dataloader.py again"
            )
    missing = {"source", "encoder", "decoder", "images"} - set(description)
    if missing:
        raise InputError(f"'{folder}/dataset.json' does not say '{min(missing)}'; run dataloader.py again")
    if not isinstance(description["images"], dict) or set(splits) - set(description["images"]):
        raise InputError(f"'{folder}/dataset.json' does not count each split's images; run dataloader.py again")
    return splits, description
