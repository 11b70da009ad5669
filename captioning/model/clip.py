"""Images and texts as vectors of a CLIP, each computed once and kept.

clip = Clip("openai/clip-vit-base-patch32", device, Path("processed_data/.clip"))
clip.images([(encoded, image), ...])    ->  (images, dimensions)
clip.texts(["a dog", ...])              ->  (texts, dimensions)
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import AutoTokenizer, CLIPModel

from captioning import InputError, cli
from captioning.files import replacing
from captioning.model import parts
from captioning.model.weights import fingerprint, load_weights

BATCH = 64  # images or texts at a time


class Clip:
    """A CLIP with a folder of vectors that it has computed before.

    Args:
        name: a folder or a hub id.
        device: where it runs.
        cache: the folder, created where it is needed. A vector is found again by the content of its image or text, the
            weights and the preprocessing, and by nothing else.

    Raises:
        InputError: it is no CLIP, or not whole.
    """

    def __init__(self, name: str, device: torch.device, cache: Path):
        what = f"--clip '{name}'"
        folder = parts.resolve(name, "--clip")
        config = parts.read_config(folder, "--clip")
        if config.model_type != "clip":
            raise InputError(f"{what} is a {config.model_type}; name a CLIP, such as openai/clip-vit-base-patch32")
        self.model, _ = load_weights(CLIPModel, folder, config, what, absent=lambda weight: False)
        self.model.eval().to(device)
        self.pixels = parts.Pixels(parts.load_image_processor(name, "--clip"))
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{what} has no usable tokenizer ({str(error).splitlines()[0]})") from None
        self.longest = config.text_config.max_position_embeddings
        self.device = device
        self.dimensions = config.projection_dim
        digest = hashlib.sha256(fingerprint(self.model.state_dict()).encode())
        digest.update(repr(sorted(self.pixels.image_processor.to_dict().items(), key=str)).encode())
        digest.update(repr(self.tokenizer("A photo depicts a dog.")["input_ids"]).encode())
        self.file = cache / f"{digest.hexdigest()[:20]}.npz"
        self.known = self._read()

    def images(self, images: Iterable[tuple[bytes, Callable[[], PIL.Image.Image]]]) -> np.ndarray:
        """The vectors of images, float32 (images, dimensions).

        Args:
            images: of each the bytes that tell it from others, and what gives it, an RGB image.
        """

        def vectors(chosen: Sequence[Callable[[], PIL.Image.Image]]) -> torch.Tensor:
            pixels = np.stack([self.pixels(give()) for give in chosen])
            return self.model.get_image_features(self.pixels.normalise(torch.from_numpy(pixels).to(self.device)))

        return self._vectors(((b"image " + content, give) for content, give in images), vectors, "images")

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        """The vectors of texts, float32 (texts, dimensions); what is longer than CLIP's texts may be is cut off."""

        def vectors(chosen: Sequence[str]) -> torch.Tensor:
            tokens = self.tokenizer(
                list(chosen), padding=True, truncation=True, max_length=self.longest, return_tensors="pt"
            ).to(self.device)
            return self.model.get_text_features(tokens["input_ids"], tokens["attention_mask"])

        encoded = [text.encode("utf-8", "replace") for text in texts]  # half a letter is none to a tokenizer
        return self._vectors(((b"text " + text, text.decode()) for text in encoded), vectors, "texts")

    @torch.inference_mode()
    def _vectors(self, items: Iterable[tuple[bytes, object]], compute: Callable, what: str) -> np.ndarray:
        keys, new = [], {}
        for content, item in items:
            keys.append(hashlib.sha256(content).digest())
            if keys[-1] not in self.known:
                new[keys[-1]] = item
        batches = [list(new)[start : start + BATCH] for start in range(0, len(new), BATCH)]
        with cli.bar(total=len(new), unit="item", desc=f"CLIP: {what}", leave=False, disable=not new) as bar:
            for batch in batches:
                made = compute([new[key] for key in batch])
                made = getattr(made, "pooler_output", made)  # transformers 5 returns the vectors among others
                self.known.update(zip(batch, made.float().cpu().numpy(), strict=True))
                bar.update(len(batch))
        if new:
            self._write()
        return np.array([self.known[key] for key in keys], np.float32).reshape(len(keys), self.dimensions)

    def _read(self) -> dict[bytes, np.ndarray]:
        if not self.file.is_file():
            return {}
        try:
            with np.load(self.file, allow_pickle=False) as kept:
                keys, vectors = kept["keys"], kept["vectors"]
        except (OSError, ValueError, KeyError, EOFError, MemoryError, zipfile.BadZipFile):
            return {}  # damaged: computed again
        if vectors.ndim != 2 or vectors.shape[1] != self.dimensions or len(keys) != len(vectors):
            return {}
        return {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}

    def _write(self) -> None:
        keys = np.frombuffer(b"".join(self.known), np.uint8).reshape(len(self.known), -1)
        try:
            with replacing(self.file) as part, part.open("wb") as file:
                np.savez(file, keys=keys, vectors=np.array(list(self.known.values()), np.float32))
        except OSError as error:
            cli.note(f"CLIP: the vectors are not kept in '{self.file.parent}' ({error.strerror})")
