"""A score of captions without references: a small text encoder, trained onto the image embeddings of a frozen CLIP.

    python tests/benchmarks/text_tower.py --karpathy_json dataset_flickr8k.json --images images --onnx clip.onnx \\
        --embeddings embeddings.npz

The ONNX file maps `pixel_values` (batch, 3, 224, 224) to `image_embeds` (batch, dimensions). The text encoder is a bag
of words: the mean and the maximum of their vectors, and one layer. It learns from the training captions alone, with the
loss of CLIP (https://arxiv.org/abs/2103.00020). Each caption is to find its image among all training images. Each image
is to find its caption among those of a batch and copies of them with one noun exchanged
(https://arxiv.org/abs/2210.01936).

Prints for validation and test: how often a caption finds its image among all of the split (image R@1), how often an
image finds one of its captions (text R@1), how often a true caption is above itself with another noun; and what the
score gives where captions are taken from the nearest training images. Intervals are of 10,000 resamples of the images.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from captioning.data.images import open_image
from captioning.files import replacing
from captioning.model.neighbours import Gallery
from captioning.model.parts import Pixels
from captioning.scores import bootstrap
from captioning.scores.consensus import Agreement
from captioning.scores.diversity import nouns
from captioning.scores.metrics import evaluate
from captioning.scores.words import choose

BATCH = 512  # captions
RARE = 2  # a word that training captions have less often is unknown
PADDING, UNKNOWN = 0, 1
FORGOTTEN = 0.1  # of the words of a training caption
NEIGHBOURS = 10
WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # CIDEr-D that a cosine of 1 is worth


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--karpathy_json", type=Path, required=True, help="captions and splits")
    parser.add_argument("--images", type=Path, required=True, help="their folder")
    parser.add_argument("--onnx", type=Path, required=True, help="CLIP's vision encoder with its projection")
    parser.add_argument("--embeddings", type=Path, required=True, help="a .npz file: written once, then read")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    known = embeddings(args.images, args.onnx, args.embeddings)
    entries = [entry for entry in json.loads(args.karpathy_json.read_text())["images"] if entry["filename"] in known]
    parts = {
        name: [entry for entry in entries if entry["split"] == split]
        for name, split in (("train", "train"), ("validation", "val"), ("test", "test"))
    }
    mean = unit(np.stack([known[entry["filename"]] for entry in parts["train"]])).mean(0)
    splits = {name: Split(part, known, mean) for name, part in parts.items()}
    tower = Tower(splits["train"].captions, splits["train"].images.shape[1], args.width, args.dropout)
    train(tower, splits["train"], splits["validation"], args.epochs, rng)
    for name in ("validation", "test"):
        report(name, tower, splits[name])
    rerank(tower, splits)


class Split:
    """Images of a split with their captions.

    Args:
        mean: of the training images' unit vectors. What all images share tells none from another.

    Attributes:
        raw: of each image, as they were written.
        captions: tokenised, all of them.
        image_of: of each caption, as its place.
        vectors: (images, dimensions), as CLIP gives them.
        images: unit vectors around the mean.
    """

    def __init__(self, entries: Sequence[dict], known: dict[str, np.ndarray], mean: torch.Tensor):
        self.raw = [[sentence["raw"] for sentence in entry["sentences"]] for entry in entries]
        flat = [text for own in self.raw for text in own]
        self.captions = [text.split() for text in choose(flat).tokenize(flat)]
        self.image_of = torch.tensor([place for place, own in enumerate(self.raw) for _ in own])
        self.vectors = np.stack([known[entry["filename"]] for entry in entries]).astype(np.float32)
        self.images = functional.normalize(unit(self.vectors) - mean, dim=1)


def unit(vectors: np.ndarray) -> torch.Tensor:
    return functional.normalize(torch.from_numpy(vectors.astype(np.float32)), dim=1)


class Tower(nn.Module):
    """Tokenised captions -> unit vectors (captions, dimensions)."""

    def __init__(self, captions: Sequence[Sequence[str]], dimensions: int, width: int, dropout: float):
        super().__init__()
        times = Counter(word for caption in captions for word in caption)
        self.places = {word: place for place, word in enumerate((w for w, n in times.items() if n >= RARE), 2)}
        things = nouns(map(" ".join, captions))
        self.nouns = [word for word in self.places if word in things]
        self.things, self.times = set(self.nouns), [times[word] for word in self.nouns]
        self.words = nn.Embedding(len(self.places) + 2, width, padding_idx=PADDING)
        nn.init.normal_(self.words.weight, std=0.02)
        self.norm, self.drop = nn.LayerNorm(width), nn.Dropout(dropout)
        self.out = nn.Linear(2 * width, dimensions)
        self.log_scale = nn.Parameter(torch.tensor(20.0).log())

    def forward(self, captions: Sequence[Sequence[str]], forget: random.Random | None = None) -> torch.Tensor:
        """Words that `forget` draws are unknown; None: no word is."""
        rows = []
        for caption in captions:
            known = [self.places.get(word, UNKNOWN) for word in caption]
            if forget is not None:
                known = [UNKNOWN if forget.random() < FORGOTTEN else place for place in known]
            rows.append(torch.tensor(known or [UNKNOWN]))
        places = pad_sequence(rows, batch_first=True, padding_value=PADDING)
        there = (places != PADDING)[..., None]
        words = self.norm(self.drop(self.words(places)))
        mean = (words * there).sum(1) / there.sum(1)
        highest = words.masked_fill(~there, -torch.inf).amax(1)
        return functional.normalize(self.out(torch.cat([mean, highest], 1)), dim=1)

    def exchanged(self, caption: Sequence[str], rng: random.Random) -> list[str] | None:
        """The caption with another noun in the place of one; None where it has no noun."""
        own = [place for place, word in enumerate(caption) if word in self.things]
        if not own:
            return None
        place, found = rng.choice(own), list(caption)
        while found[place] == caption[place]:
            (found[place],) = rng.choices(self.nouns, self.times)
        return found


def embeddings(images: Path, onnx: Path, file: Path) -> dict[str, np.ndarray]:
    """The embedding of every image, by its file's name; from `file`, or computed and kept there."""
    if not file.exists():
        import onnxruntime
        from tqdm import tqdm
        from transformers import CLIPImageProcessorPil

        pixels = Pixels(CLIPImageProcessorPil())
        session = onnxruntime.InferenceSession(str(onnx), providers=["CPUExecutionProvider"])
        paths, found = sorted(images.glob("*.jpg")), []
        for start in tqdm(range(0, len(paths), 16), unit="batch", desc="embeddings"):
            batch = np.stack([pixels(open_image(path).convert("RGB")) for path in paths[start : start + 16]])
            values = pixels.normalise(torch.from_numpy(batch)).numpy()
            found.append(session.run(["image_embeds"], {"pixel_values": values})[0])
        with replacing(file) as part, part.open("wb") as written:
            np.savez(written, names=[path.name for path in paths], vectors=np.concatenate(found))
    kept = np.load(file)
    return dict(zip(kept["names"].tolist(), kept["vectors"], strict=True))


def train(tower: Tower, split: Split, validation: Split, epochs: int, rng: random.Random) -> None:
    updates = len(split.captions) // BATCH
    optimizer = torch.optim.AdamW(tower.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=epochs * updates, pct_start=0.1)
    began = time.perf_counter()
    for epoch in range(epochs):
        tower.train()
        order = rng.sample(range(len(split.captions)), len(split.captions))
        for update in range(updates):
            rows = order[update * BATCH : (update + 1) * BATCH]
            captions, own = [split.captions[row] for row in rows], split.image_of[rows]
            wrong = [found for caption in captions if (found := tower.exchanged(caption, rng)) is not None]
            scale = tower.log_scale.exp()
            texts = tower([*captions, *wrong], rng)
            loss = functional.cross_entropy(scale * texts[:BATCH] @ split.images.T, own)
            others = scale * split.images[own] @ texts.T
            same = own[:, None] == own
            others[:, :BATCH].masked_fill_(same.fill_diagonal_(False), -torch.inf)  # its other captions are not wrong
            loss = loss + functional.cross_entropy(others, torch.arange(BATCH))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        seconds = time.perf_counter() - began
        print(f"epoch {epoch + 1}, {seconds:.0f} s: {describe(measured(tower, validation))}", file=sys.stderr)


@torch.inference_mode()
def measured(tower: Tower, split: Split) -> dict[str, np.ndarray]:
    """Of each image the shares that `report` prints."""
    tower.eval()
    texts, rng = tower(split.captions), random.Random(0)
    cosines = texts @ split.images.T
    number = len(split.images)
    found = {"image R@1": of_images(cosines.argmax(1) == split.image_of, split.image_of, number)}
    found["text R@1"] = (split.image_of[cosines.argmax(0)] == torch.arange(number)).double().numpy()
    said: dict[int, set[str]] = {}
    for image, caption in zip(split.image_of.tolist(), split.captions, strict=True):
        said.setdefault(image, set()).update(caption)
    pairs = []
    for row, (image, caption) in enumerate(zip(split.image_of.tolist(), split.captions, strict=True)):
        wrong = tower.exchanged(caption, rng)
        if wrong is not None and not set(wrong) - set(caption) <= said[image]:  # what another person wrote is right
            pairs.append((row, image, wrong))
    rows, images, wrong_ones = zip(*pairs, strict=True)
    below = (tower(wrong_ones) * split.images[list(images)]).sum(1)
    found["noun"] = of_images(cosines[list(rows), list(images)] > below, torch.tensor(images), number)
    return found


def of_images(right: torch.Tensor, image_of: torch.Tensor, number: int) -> np.ndarray:
    """The share that is right of each image; NaN where it has none."""
    sums, counts = np.bincount(image_of, right, number), np.bincount(image_of, minlength=number)
    return np.divide(sums, counts, out=np.full(number, np.nan), where=counts > 0)


def describe(found: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {np.nanmean(values):.3f}" for name, values in found.items())


def report(name: str, tower: Tower, split: Split) -> None:
    rng = np.random.default_rng(0)
    for what, values in measured(tower, split).items():
        drawn = [np.nanmean(values[rng.integers(len(values), size=len(values))]) for _ in range(10_000)]
        low, high = np.percentile(drawn, (2.5, 97.5))
        print(f"{name}, {len(values):,} images: {what} {np.nanmean(values):.3f} [{low:.3f}, {high:.3f}]", flush=True)


@torch.inference_mode()
def rerank(tower: Tower, splits: dict[str, Split]) -> None:
    """Captions of the nearest training images that agree best with the others, with the tower's score and without."""
    train, best = splits["train"], 0.0
    agreement, gallery = Agreement(train.raw), Gallery(train.vectors)
    flat, captions = [text for own in train.raw for text in own], tower(train.captions)
    for name in ("validation", "test"):
        split, scores = splits[name], {}
        references = dict(enumerate(split.raw))
        candidates = []
        for image, rows in enumerate(gallery.nearest(split.vectors, NEIGHBOURS)):
            theirs = torch.cat([(train.image_of == row).nonzero()[:, 0] for row in rows])
            texts = [flat[place] for place in theirs]
            candidates.append(
                (texts, np.array(agreement(texts, rows)), (captions[theirs] @ split.images[image]).numpy())
            )
        for weight in WEIGHTS if name == "validation" else sorted({0.0, best}):
            chosen = [texts[int((agree + weight * cosine).argmax())] for texts, agree, cosine in candidates]
            scores[weight] = evaluate(dict(enumerate(chosen)), references)
            low, high = bootstrap.intervals(scores[weight])["cider_d"]
            less = bootstrap.differences(scores[weight], scores[0.0])["cider_d"]
            print(
                f"{name}, a cosine of 1 worth {weight:g}: CIDEr-D {scores[weight].scores['cider_d']:.3f} "
                f"[{low:.3f}, {high:.3f}], {less.value:+.3f} [{less.low:+.3f}, {less.high:+.3f}] to 0",
                flush=True,
            )
        best = max(scores, key=lambda weight: scores[weight].scores["cider_d"])


if __name__ == "__main__":
    main()
