"""A frozen encoder's output, computed once for every image of a split and kept on disk in float16.

    cache = FeatureCache(bundle, data_path / ".features", batch_size=32, say=print)
    dataset.features = [cache.features(dataset, "train", variant) for variant in range(3)]

A file holds a block of images. Its name has a hash of the encoder's weights and settings, of the image processor and
of the images, so that a stale file is never used. An interrupted computation goes on with the blocks that are missing,
and processes that see the same folder share them out: on one machine or on many, started together or not, and without
a word to each other. A file that came with somebody else's data is looked at before it is used, and nothing is written
through a link.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captioning import InputError, cli
from captioning.files import check_target, lock, make_folder, remove_leftovers, replacing
from captioning.model.captioner import Bundle
from captioning.training.batches import AUGMENTATION, CaptionDataset

DTYPE = np.dtype(np.float16)
BLOCK = 256  # images: what an interruption loses at most, and what one of several processes takes at a time
# Images at a time on a CPU at most. The activations of more are too large for malloc to keep: the system takes each
# back and fills the next with zeros, which was a sixth of the time with 64 images of DINOv2-small, 32 of ViT-Base.
CPU_BATCH = 8
ABANDONED = 3600  # seconds; on some disks locks do not reach other machines, which may be writing there
LOOK_AGAIN = 0.2  # seconds, while other processes compute what is still missing


class Joined:
    """The features of several parts as if they were one array; they stay where they lie.

    Args:
        parts: (images, tokens, hidden size) each: blocks, or others that were joined.
    """

    def __init__(self, parts: Sequence[Any]):
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """(tokens, hidden size) of one image."""
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part] + len(self.parts[part])]


@dataclass(frozen=True)
class Block:
    """The features of some images that follow each other. A row is read from the file when it is asked for.

    No file stays open or mapped: COCO 2014 has 480 blocks for each variant, and many systems let a process open 1,024
    files, or 256.

    Attributes:
        path: of their file.
        start: the first image.
        shape: (images, tokens, hidden size)
    """

    path: Path
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        return self.start + self.shape[0]

    @property
    def size(self) -> int:
        """Bytes of the numbers."""
        return DTYPE.itemsize * math.prod(self.shape)

    def is_there(self) -> bool:
        """Whether there is a file of such features, and not only a link."""
        try:
            check_target(self.path)
            with self.path.open("rb") as file:
                if np.lib.format.read_magic(file) != (1, 0):
                    return False
                found = np.lib.format.read_array_header_1_0(file)
                size = file.tell() + self.size
                return found == (self.shape, False, DTYPE) and self.path.stat().st_size == size
        except (OSError, ValueError, EOFError, InputError):
            return False

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, row: int) -> np.ndarray:
        """(tokens, hidden size) of one image."""
        shape = self.shape[1:]
        with self.path.open("rb") as file:
            file.seek(row * self.size // len(self) - self.size, os.SEEK_END)
            return np.fromfile(file, DTYPE, math.prod(shape)).reshape(shape)

    def whole(self) -> np.ndarray:
        """(images, tokens, hidden size), mapped into memory as long as the array lives."""
        return np.memmap(self.path, DTYPE, "r", self.path.stat().st_size - self.size, self.shape)


@dataclass(frozen=True)
class FeatureCache:
    """Features of one encoder.

    Attributes:
        bundle: its encoder is used on the device where it is, in evaluation mode.
        folder: where the files lie; created.
        batch_size: images at a time; on a CPU at most CPU_BATCH.
        say: told in one line what is about to be written, or reused.
        precision: of the encoder's matrix products (autocast), as training itself would run it.
        readers: threads that decode images while the encoder works.
        show: whether a bar shows the progress.
    """

    bundle: Bundle
    folder: Path
    batch_size: int
    say: Callable[[str], None]
    precision: torch.dtype = torch.float32
    readers: int = 1
    show: bool = True

    def features(self, dataset: CaptionDataset, split: str, variant: int = 0) -> Joined:
        """The features of every image of `dataset`, in its order, from the cache or computed now.

        Blocks that another process is computing are waited for; if it ends before they are whole, they are computed
        here.

        Args:
            split: part of the files' names.
            variant: which augmentation of the images; 0: as they are.

        Returns:
            float16 (images, tokens, hidden size), read from the disk.

        Raises:
            InputError: the disk has no room for it.
        """
        name = f"{split}-{self.fingerprint(dataset, variant)}"
        shape = self.encode([dataset.image(0, variant)]).shape[1:]
        whole = Block(self.folder / f"{name}.npy", 0, (len(dataset), *shape))
        if whole.is_there():  # of an earlier version
            self.say(f"features: {split} from {whole.path}")
            return Joined([whole])
        blocks = [
            Block(self.folder / f"{name}.{number:06d}.npy", start, (min(BLOCK, len(dataset) - start), *shape))
            for number, start in enumerate(range(0, len(dataset), BLOCK))
        ]
        missing = [block for block in blocks if not block.is_there()]
        if missing:
            self._compute(dataset, name, variant, missing)
        else:
            self.say(f"features: {split} from {self.folder / name}")
        return Joined(blocks)

    def fingerprint(self, dataset: CaptionDataset, variant: int = 0) -> str:
        """Twenty hexadecimal digits that change whenever the features would."""
        digest = hashlib.sha256()
        if self.precision != torch.float32:
            digest.update(str(self.precision).encode())
        if variant:
            may_mirror = list(map(dataset.may_mirror, dataset.split.captions_in_turn()))
            digest.update(json.dumps([AUGMENTATION, variant, dataset.seed, may_mirror]).encode())
            digest.update(json.dumps(dataset.split.image_id).encode())  # which decide the variant of each
        encoder = self.bundle.model.encoder
        digest.update(encoder.config.to_json_string().encode())
        digest.update(json.dumps(self.bundle.image_processor.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        digest.update(dataset.split.image_digests)
        return digest.hexdigest()[:20]

    @torch.inference_mode()
    def encode(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 (3, height, width) each -> float16 (images, tokens, hidden size)."""
        encoder = self.bundle.model.encoder.eval()
        device = next(encoder.parameters()).device
        normalised = self.bundle.pixels.normalise(torch.from_numpy(np.stack(images)).to(device))
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            states = encoder(pixel_values=normalised).last_hidden_state
        return states.to(torch.float16).cpu().numpy()

    def _compute(self, dataset: CaptionDataset, name: str, variant: int, missing: list[Block]) -> None:
        """See to it that the blocks that are missing are there: computed here, or by other processes."""
        split = name.partition("-")[0]
        make_folder(self.folder, self.folder.parent)
        size, free = sum(block.size for block in missing), shutil.disk_usage(self.folder).free
        if size > free:
            raise InputError(
                f"--cache_features needs {size / 1e9:.1f} GB in '{self.folder}' for {split}, and "
                f"{free / 1e9:.1f} GB are free; make room or leave the flag out"
            )
        for block in missing:
            check_target(block.path)
            if block.path.exists():
                self.say(f"features: {block.path} is not what it should hold; it is computed anew")
        done = len(dataset) - sum(block.shape[0] for block in missing)
        going_on = f" (going on, {done:,} images are there)" if done else ""
        self.say(f"features: {split}, {size / 1e6:,.0f} MB, to {self.folder / name}{going_on}")
        remove_leftovers(self.folder, idle=ABANDONED)
        with (
            ThreadPoolExecutor(self.readers) as pool,
            cli.bar(
                total=len(dataset), initial=done, unit="image", desc=f"{split} features", disable=not self.show
            ) as bar,
        ):
            while missing:
                waiting: list[Block] = []
                for block in missing:
                    waiting = _still_missing(waiting, bar)
                    with lock(block.path.with_suffix(".lock"), wait=False) as mine:
                        if mine and not block.is_there():
                            self._write(block, dataset, variant, pool, bar)
                        else:  # another process is computing it, or has
                            waiting.append(block)
                missing = _still_missing(waiting, bar)
                if missing:
                    time.sleep(LOOK_AGAIN)

    def _write(self, block: Block, dataset: CaptionDataset, variant: int, pool: ThreadPoolExecutor, bar: Any) -> None:
        """Compute a block's features. Its batches are the same whoever computes it, and so are its bytes."""
        images = pool.map(lambda index: dataset.image(index, variant), range(block.start, block.stop))
        computed = np.empty(block.shape, DTYPE)
        on_cpu = self.bundle.model.device.type == "cpu"
        size = min(self.batch_size, CPU_BATCH) if on_cpu else self.batch_size
        for start in range(0, len(computed), size):
            batch = list(itertools.islice(images, size))
            computed[start : start + len(batch)] = self.encode(batch)
            bar.update(len(batch))
        with replacing(block.path) as part, part.open("wb") as file:
            np.save(file, computed)


def _still_missing(blocks: Sequence[Block], bar: Any) -> list[Block]:
    """Those that other processes are still computing; the bar counts the others."""
    missing = []
    for block in blocks:
        if block.is_there():
            bar.update(len(block))
        else:
            missing.append(block)
    return missing
