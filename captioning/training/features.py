"""A frozen encoder's output, computed once for every image of a split and kept on disk in float16.

The file's name holds a hash of the encoder's weights and settings, of the image processor and of the images, so that
a stale file is never used. An interrupted computation goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from captioning import InputError
from captioning.files import write_whole
from captioning.model.captioner import Bundle
from captioning.training.batches import CaptionDataset, augmented

SAVE_EVERY = 16  # batches; what an interruption loses at most


def fingerprint(
    bundle: Bundle, dataset: CaptionDataset, variant: int = 0, precision: torch.dtype = torch.float32
) -> str:
    """Twenty hexadecimal digits that change whenever the features would."""
    digest = hashlib.sha256()
    if precision != torch.float32:
        digest.update(str(precision).encode())
    if variant:
        digest.update(inspect.getsource(augmented).encode())
        digest.update(json.dumps([variant, dataset.seed, list(dataset.rows["captions"])]).encode())
    digest.update(bundle.model.encoder.config.to_json_string().encode())
    digest.update(json.dumps(bundle.image_processor.to_dict(), sort_keys=True, default=str).encode())
    for name, tensor in sorted(bundle.model.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for image in dataset.encoded_images():
        digest.update(hashlib.sha256(image).digest())
    return digest.hexdigest()[:20]


@torch.inference_mode()
def cached_features(
    bundle: Bundle,
    dataset: CaptionDataset,
    folder: Path,
    split: str,
    batch_size: int,
    say: Callable[[str], None],
    variant: int = 0,
    precision: torch.dtype = torch.float32,
) -> np.ndarray:
    """The features of every image of `dataset`, in its order, from the cache or computed now.

    Args:
        bundle: its encoder is used on the device where it is, in evaluation mode.
        folder: where the cache lies; created.
        split: part of the file's name.
        batch_size: images at a time.
        say: told in one line what is about to be written, or reused.
        variant: which augmentation of the images; 0: as they are.
        precision: of the encoder's matrix products (autocast), as training itself would run it.

    Returns:
        float16 (images, tokens, hidden size), memory-mapped.

    Raises:
        InputError: the disk has no room for it.
    """
    path = folder / f"{split}-{fingerprint(bundle, dataset, variant, precision)}.npy"
    if path.is_file():
        say(f"features: {split} from {path}")
        return np.load(path, mmap_mode="r")
    folder.mkdir(parents=True, exist_ok=True)
    with _only_one(path.with_suffix(".lock")):
        if not path.is_file():  # another run may have finished it while this one waited
            _compute(bundle, dataset, path, split, batch_size, say, variant, precision)
    return np.load(path, mmap_mode="r")


@contextlib.contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """Let one process at a time through; the others wait. Where there is no flock (Windows), nobody waits."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compute(
    bundle: Bundle,
    dataset: CaptionDataset,
    path: Path,
    split: str,
    batch_size: int,
    say: Callable[[str], None],
    variant: int,
    precision: torch.dtype,
) -> None:
    """Write the features of `dataset` to `path`, going on where an earlier call was interrupted."""
    folder = path.parent
    encoder, pixels = bundle.model.encoder.eval(), dataset.pixels
    device = next(encoder.parameters()).device

    def encode(images: list[np.ndarray]) -> np.ndarray:
        normalised = pixels.normalise(torch.from_numpy(np.stack(images)).to(device))
        with torch.autocast(device.type, precision, enabled=precision != torch.float32):
            states = encoder(pixel_values=normalised).last_hidden_state
        return states.to(torch.float16).cpu().numpy()

    shape = (len(dataset), *encode([dataset.image(0, variant)]).shape[1:])
    size = 2 * int(np.prod(shape, dtype=np.int64))
    part, progress = path.with_suffix(".part"), path.with_suffix(".done")
    free = shutil.disk_usage(folder).free + (part.stat().st_size if part.exists() else 0)
    if size > free:
        raise InputError(
            f"--cache_features needs {size / 1e9:.1f} GB in '{folder}' for {split}, and {free / 1e9:.1f} GB are free; "
            "make room or leave the flag out"
        )
    # Counted only after the features are on disk: `done` images are always whole.
    done = int(progress.read_text()) if part.exists() and progress.exists() else 0
    say(f"features: {split}, {size / 1e6:,.0f} MB, to {path}" + (f" (going on from image {done:,})" if done else ""))
    features = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float16, None if done else shape)
    with tqdm(total=len(dataset), initial=done, unit="image", desc=f"{split} features", file=sys.stderr) as bar:
        for number, start in enumerate(range(done, len(dataset), batch_size), 1):
            stop = min(start + batch_size, len(dataset))
            features[start:stop] = encode([dataset.image(index, variant) for index in range(start, stop)])
            bar.update(stop - start)
            if number % SAVE_EVERY == 0:
                features.flush()
                write_whole(progress, str(stop))
    features.flush()
    del features
    part.replace(path)
    progress.unlink(missing_ok=True)
