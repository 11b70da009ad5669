"""A frozen encoder's output, computed once for every image of a split and kept on disk in float16.

    cache = FeatureCache(bundle, data_path / ".features", batch_size=32, say=print)
    dataset.features = [cache.features(dataset, "train", variant) for variant in range(3)]

The file's name holds a hash of the encoder's weights and settings, of the image processor and of the images, so that
a stale file is never used. An interrupted computation goes on where it stopped. A file that came with somebody else's
data is looked at before it is used, and nothing is written through a link.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from captioning import InputError, cli
from captioning.files import check_target, lock, make_folder, open_in_place, write_whole
from captioning.model.captioner import Bundle
from captioning.training.batches import AUGMENTATION, CaptionDataset

DTYPE = np.dtype(np.float16)
SAVE_EVERY = 16  # batches; what an interruption loses at most


class Joined:
    """The features of several parts as if they were one array; they stay where they lie.

    Args:
        parts: (images, tokens, hidden size) each.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = parts
        self.ends = list(itertools.accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, index: int) -> np.ndarray:
        """(tokens, hidden size) of one image."""
        part = bisect.bisect_right(self.ends, index)
        return self.parts[part][index - self.ends[part]]


@dataclass(frozen=True)
class FeatureCache:
    """Features of one encoder.

    Attributes:
        bundle: its encoder is used on the device where it is, in evaluation mode.
        folder: where the files lie; created.
        batch_size: images at a time.
        say: told in one line what is about to be written, or reused.
        precision: of the encoder's matrix products (autocast), as training itself would run it.
    """

    bundle: Bundle
    folder: Path
    batch_size: int
    say: Callable[[str], None]
    precision: torch.dtype = torch.float32

    def features(self, dataset: CaptionDataset, split: str, variant: int = 0) -> np.ndarray:
        """The features of every image of `dataset`, in its order, from the cache or computed now.

        Args:
            split: part of the file's name.
            variant: which augmentation of the images; 0: as they are.

        Returns:
            float16 (images, tokens, hidden size), memory-mapped.

        Raises:
            InputError: the disk has no room for it.
        """
        path = self.folder / f"{split}-{self.fingerprint(dataset, variant)}.npy"
        shape = (len(dataset), *self.encode([dataset.image(0, variant)]).shape[1:])
        if (kept := mapped(path, shape)) is not None:
            self.say(f"features: {split} from {path}")
            return kept
        make_folder(self.folder, self.folder.parent)
        with lock(path.with_suffix(".lock"), wait=True):
            if mapped(path, shape) is None:  # another run may have finished it while this one waited
                check_target(path)
                if path.exists():
                    self.say(f"features: {path} is not what it should hold; it is computed anew")
                self._compute(dataset, path, split, variant, shape)
        kept = mapped(path, shape)
        assert kept is not None, "it was just written"
        return kept

    def fingerprint(self, dataset: CaptionDataset, variant: int = 0) -> str:
        """Twenty hexadecimal digits that change whenever the features would."""
        digest = hashlib.sha256()
        if self.precision != torch.float32:
            digest.update(str(self.precision).encode())
        if variant:
            may_mirror = list(map(dataset.may_mirror, dataset.split.captions))
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
    def encode(self, images: list[np.ndarray]) -> np.ndarray:
        """uint8 (3, height, width) each -> float16 (images, tokens, hidden size)."""
        encoder = self.bundle.model.encoder.eval()
        device = next(encoder.parameters()).device
        normalised = self.bundle.pixels.normalise(torch.from_numpy(np.stack(images)).to(device))
        with torch.autocast(device.type, self.precision, enabled=self.precision != torch.float32):
            states = encoder(pixel_values=normalised).last_hidden_state
        return states.to(torch.float16).cpu().numpy()

    def _compute(self, dataset: CaptionDataset, path: Path, split: str, variant: int, shape: tuple[int, ...]) -> None:
        """Write the features of `dataset` to `path`, going on where an earlier call was interrupted."""
        size = 2 * int(np.prod(shape, dtype=np.int64))
        part, progress = path.with_suffix(".part"), path.with_suffix(".done")
        check_target(progress)
        with open_in_place(part) as file:
            free = shutil.disk_usage(self.folder).free + os.fstat(file.fileno()).st_size
            if size > free:
                if not os.fstat(file.fileno()).st_size:
                    part.unlink()
                raise InputError(
                    f"--cache_features needs {size / 1e9:.1f} GB in '{self.folder}' for {split}, and {free / 1e9:.1f} "
                    "GB are free; make room or leave the flag out"
                )
            # Counted only after the features are on disk: `done` images are always whole.
            begin = _data_begins(file, shape)
            done = _count(progress, len(dataset)) if begin else 0
            going_on = f" (going on from image {done:,})" if done else ""
            self.say(f"features: {split}, {size / 1e6:,.0f} MB, to {path}{going_on}")
            if not done:
                file.seek(0)
                file.truncate()
                header = {"descr": np.lib.format.dtype_to_descr(DTYPE), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, header)
                begin = file.tell()
                file.truncate(begin + size)
                file.flush()
            features = np.memmap(file, DTYPE, "r+", begin, shape)
            with cli.bar(total=len(dataset), initial=done, unit="image", desc=f"{split} features") as bar:
                for number, start in enumerate(range(done, len(dataset), self.batch_size), 1):
                    stop = min(start + self.batch_size, len(dataset))
                    features[start:stop] = self.encode([dataset.image(index, variant) for index in range(start, stop)])
                    bar.update(stop - start)
                    if number % SAVE_EVERY == 0:
                        features.flush()
                        write_whole(progress, str(stop))
            features.flush()
            del features
        part.replace(path)
        progress.unlink(missing_ok=True)


def mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """The features in a file, mapped into memory; None where there is no file of such features, or only a link."""
    try:
        check_target(path)
        with path.open("rb") as file:
            begin = _data_begins(file, shape)
            return np.memmap(file, DTYPE, "r", begin, shape) if begin else None
    except (OSError, InputError):
        return None


def _data_begins(file: BinaryIO, shape: tuple[int, ...]) -> int:
    """Where the numbers begin in a whole file of float16 of that shape; 0: it is none."""
    try:
        file.seek(0)
        if np.lib.format.read_magic(file) != (1, 0):
            return 0
        found, fortran_order, kind = np.lib.format.read_array_header_1_0(file)
    except (ValueError, EOFError, OSError):
        return 0
    begin = file.tell()
    whole = begin + DTYPE.itemsize * int(np.prod(shape, dtype=np.int64))
    right = (found, fortran_order, kind) == (shape, False, DTYPE) and os.fstat(file.fileno()).st_size == whole
    return begin if right else 0


def _count(progress: Path, most: int) -> int:
    """How many images are done, as a file says; 0 where it says nothing of the kind."""
    try:
        with progress.open("rb") as file:
            text = file.read(20)
    except OSError:
        return 0
    return int(text) if text.isdigit() and int(text) <= most else 0
