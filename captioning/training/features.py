"""A frozen encoder's output, computed once for every image of a split and kept on disk in float16.

    cache = FeatureCache(bundle, data_path / ".features", batch_size=32, say=print)
    dataset.features = [cache.features(dataset, "train", variant) for variant in range(3)]

The file's name holds a hash of the encoder's weights and settings, of the image processor and of the images, so that
a stale file is never used. An interrupted computation goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from captioning import InputError, cli
from captioning.files import lock, write_whole
from captioning.model.captioner import Bundle
from captioning.training.batches import AUGMENTATION, CaptionDataset

SAVE_EVERY = 16  # batches; what an interruption loses at most


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
        if path.is_file():
            self.say(f"features: {split} from {path}")
            return np.load(path, mmap_mode="r")
        self.folder.mkdir(parents=True, exist_ok=True)
        with lock(path.with_suffix(".lock"), wait=True):
            if not path.is_file():  # another run may have finished it while this one waited
                self._compute(dataset, path, split, variant)
        return np.load(path, mmap_mode="r")

    def fingerprint(self, dataset: CaptionDataset, variant: int = 0) -> str:
        """Twenty hexadecimal digits that change whenever the features would."""
        digest = hashlib.sha256()
        if self.precision != torch.float32:
            digest.update(str(self.precision).encode())
        if variant:
            captions = list(dataset.split.captions)  # a caption that says "left" forbids to mirror its image
            digest.update(json.dumps([AUGMENTATION, variant, dataset.seed, captions]).encode())
        encoder = self.bundle.model.encoder
        digest.update(encoder.config.to_json_string().encode())
        digest.update(json.dumps(self.bundle.image_processor.to_dict(), sort_keys=True, default=str).encode())
        for name, tensor in sorted(encoder.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for image in dataset.split.encoded_images():
            digest.update(hashlib.sha256(image).digest())
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

    def _compute(self, dataset: CaptionDataset, path: Path, split: str, variant: int) -> None:
        """Write the features of `dataset` to `path`, going on where an earlier call was interrupted."""
        shape = (len(dataset), *self.encode([dataset.image(0, variant)]).shape[1:])
        size = 2 * int(np.prod(shape, dtype=np.int64))
        part, progress = path.with_suffix(".part"), path.with_suffix(".done")
        free = shutil.disk_usage(self.folder).free + (part.stat().st_size if part.exists() else 0)
        if size > free:
            raise InputError(
                f"--cache_features needs {size / 1e9:.1f} GB in '{self.folder}' for {split}, and {free / 1e9:.1f} GB "
                "are free; make room or leave the flag out"
            )
        # Counted only after the features are on disk: `done` images are always whole.
        done = int(progress.read_text()) if part.exists() and progress.exists() else 0
        going_on = f" (going on from image {done:,})" if done else ""
        self.say(f"features: {split}, {size / 1e6:,.0f} MB, to {path}{going_on}")
        features = np.lib.format.open_memmap(part, "r+" if done else "w+", np.float16, None if done else shape)
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
