"""Stage 3: caption images with a trained model.

    python inference.py --image_path photo.jpg                       # the caption alone on stdout
    python inference.py --image_path https://example.com/photo.jpg
    python inference.py --image_path photos/ 'more/*.png'            # path<TAB>caption lines
    python inference.py --image_path photos/ --output captions.json  # [{"path", "caption"}]
    python inference.py --data_path ./processed_data --split test    # score a run folder on a split
    python inference.py --predictions results.json --data_path ./processed_data   # score anybody's captions

Exit code 0: all done; 1: some images of several failed, listed on stderr; 2: bad input.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.files import write_whole

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Caption images, or score captions.", allow_abbrev=False)
    what = parser.add_argument_group("what to caption")
    what.add_argument("--image_path", nargs="+", metavar="PATH", help="URLs, files, folders or globs")
    what.add_argument("--model_path", default="vit-gpt2-coco", help="a run folder (default: ./vit-gpt2-coco)")
    what.add_argument("--output", type=Path, metavar="FILE", help="write a JSON list of {path, caption}")

    how = parser.add_argument_group("how (default: what the model was saved with)")
    how.add_argument("--num_beams", type=int, help="captions considered side by side; 1 is greedy")
    how.add_argument("--max_new_tokens", type=int, help="longest caption, in tokens")
    how.add_argument("--batch_size", type=int, default=16, help="images at a time (default: 16)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")

    score = parser.add_argument_group("scoring instead")
    score.add_argument(
        "--data_path", type=Path, help="a folder of dataloader.py: caption one of its splits and score it"
    )
    score.add_argument("--split", default="test", choices=("train", "validation", "test"), help="(default: test)")
    score.add_argument(
        "--predictions",
        type=Path,
        metavar="FILE",
        help="score these captions (COCO results format), without a model",
    )
    parser.add_argument("--debug", action="store_true", help=cli.DEBUG_HELP)
    args = parser.parse_args(argv)

    for name in ("num_beams", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is below 1")
    if args.predictions and not args.data_path:
        parser.error("--predictions needs --data_path, which holds the references")
    if bool(args.image_path) == bool(args.data_path):
        parser.error("give --image_path to caption images, or --data_path to score a split")
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output '{args.output}': there is no folder '{args.output.parent}'")
    if args.output and args.output.is_dir():
        parser.error(f"--output '{args.output}' is a folder; name a file")
    if args.predictions and args.output:
        parser.error("--output has no use with --predictions: the scores are written beside that file")
    if not args.predictions and "/" not in args.model_path and not Path(args.model_path).is_dir():
        parser.error(f"--model_path '{args.model_path}' is not a folder; did you run train.py?")
    if args.data_path and not (args.data_path / "dataset.json").is_file():
        parser.error(f"--data_path '{args.data_path}' is not a folder of dataloader.py; did you run it?")
    return args


def expand(paths: list[str]) -> list[str]:
    """URLs and files as they are, folders and globs as the image files in them, in order and each once."""
    found: dict[str, None] = {}
    for path in paths:
        if "://" in path or os.path.isfile(path):
            matches = [path]
        elif os.path.isdir(path):
            matches = sorted(str(file) for file in Path(path).rglob("*") if _is_image(file))
            if not matches:
                raise InputError(f"folder '{path}' holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        elif glob.has_magic(path):
            matches = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
            if not matches:
                raise InputError(f"nothing matches '{path}'; check the pattern")
        else:
            matches = [path]  # reading it will say what is wrong with it
        found.update(dict.fromkeys(matches))
    return list(found)


def _is_image(file: Path) -> bool:
    return file.is_file() and file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")


def load_model(args: argparse.Namespace):
    """The bundle on its device, with the decoding settings of the command line."""
    import torch

    from captioning import model

    model.quiet_transformers()
    bundle = model.load(args.model_path)
    try:
        device = torch.device(args.device or _best_device(torch))
        bundle.model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device '{args.device}' cannot be used: {str(error).splitlines()[0]}") from None
    for name in ("num_beams", "max_new_tokens"):
        if getattr(args, name):
            setattr(bundle.model.generation_config, name, getattr(args, name))
    positions = bundle.model.decoder.config.max_position_embeddings
    longest = bundle.model.generation_config.max_new_tokens or 0
    if longest >= positions:
        raise InputError(f"--max_new_tokens {longest} is too long; the decoder has {positions} positions")
    return bundle


def _best_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def captions(bundle, pictures: Iterator[tuple[Any, Any]], batch_size: int, total: int) -> Iterator[tuple[Any, str]]:
    """(key, uint8 pixels) pairs -> (key, caption) pairs, a batch at a time."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from captioning import batch, model

    pixels = batch.Pixels(bundle.image_processor)
    waiting: list[tuple[Any, Any]] = []
    bar = tqdm(total=total, unit="image", file=sys.stderr, disable=total <= batch_size)

    def flush() -> Iterator[tuple[Any, str]]:
        if not waiting:
            return
        keys, images = zip(*waiting, strict=True)
        waiting.clear()
        stacked = torch.from_numpy(np.stack(images)).to(bundle.model.device)
        yield from zip(keys, model.generate(bundle, pixels.normalise(stacked)), strict=True)
        bar.update(len(keys))

    with bar:
        for picture in pictures:
            waiting.append(picture)
            if len(waiting) == batch_size:
                yield from flush()
        yield from flush()


def caption_images(args: argparse.Namespace) -> int:
    """Caption `--image_path`; returns the exit code."""
    paths = expand(args.image_path)
    if not any("://" in path or os.path.isfile(path) for path in paths):
        # Nothing to caption at all: say so before the model is loaded.
        from captioning import images

        images.read_bytes(paths[0])
    bundle = load_model(args)

    from concurrent.futures import ThreadPoolExecutor

    from captioning import batch, images, model

    pixels = batch.Pixels(bundle.image_processor)
    # Twice what is needed: the decoder may skip detail that nobody will see, the resize stays the one of training.
    side = 2 * model.resized_side(bundle.image_processor)
    failures: list[str] = []

    def read(path: str):
        try:
            return pixels(images.open_image(path, min_side=side))
        except InputError as error:
            return error

    def pictures() -> Iterator[tuple[str, Any]]:
        # Decoded in the background while the model works, a few batches ahead and no more.
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            ahead = max(2 * args.batch_size, 16)
            futures = {}
            for position, path in enumerate(paths):
                for later in paths[max(position, len(futures)) : position + ahead]:
                    futures[later] = pool.submit(read, later)
                result = futures[path].result()
                futures[path] = None
                if isinstance(result, InputError):
                    failures.append(str(result))
                else:
                    yield path, result

    results = []
    for path, caption in captions(bundle, pictures(), args.batch_size, len(paths)):
        # A file name need not be UTF-8; JSON has to be.
        results.append({"path": os.fsencode(path).decode("utf-8", "replace"), "caption": caption})
        if not args.output:
            print(caption if len(paths) == 1 else f"{cli.printable(path)}\t{caption}", flush=True)
    if len(paths) == 1 and failures:
        raise InputError(failures[0])
    if args.output:
        text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        write_whole(args.output, text)
        cli.note(f"{len(results):,} captions written to {args.output}")
    if failures:
        cli.note(f"{len(failures):,} of {len(paths):,} images could not be captioned:")
        for failure in failures:
            cli.note(f"  {failure}")
        return 1 if results else 2
    return 0


def score(args: argparse.Namespace) -> int:
    """Score a run folder, or a results file, on a split of `--data_path`."""
    from captioning import batch, metrics

    splits, description = batch.load_prepared(args.data_path)
    rows = splits[args.split]
    references = dict(zip(rows["image_id"], rows["captions"], strict=True))
    if args.predictions:
        predictions = read_predictions(args.predictions, references)
        target = args.predictions.with_name(f"{args.predictions.stem}_scores_per_image.json")
    else:
        bundle = load_model(args)
        dataset = batch.CaptionDataset(rows, batch.Pixels(bundle.image_processor))
        pictures = ((row["image_id"], row["pixels"]) for row in (dataset[i] for i in range(len(dataset))))
        predictions = dict(captions(bundle, pictures, args.batch_size, len(dataset)))
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in predictions.items()]
        folder = Path(args.model_path) if Path(args.model_path).is_dir() else Path()
        file = args.output or folder / f"predictions_{args.split}.json"
        write_whole(file, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        cli.note(f"captions written to {file}")
        target = file.with_name(f"scores_per_image_{args.split}.json")
    scores, per_image = metrics.coco_scores(predictions, references, per_image=True)
    content = [
        {"image_id": image_id, "caption": predictions[image_id], **values} for image_id, values in per_image.items()
    ]
    write_whole(target, json.dumps(sorted(content, key=lambda row: row["cider_d"]), indent=1) + "\n")
    cli.note(f"scores of each image, the worst first, written to {target}")
    cli.note(f"{args.split} split, {len(rows):,} images, {description['source']}; {metrics.PROTOCOL}")
    print("\n".join(f"{name:<12}{value:>10.4f}" for name, value in scores.items()))
    return 0


def read_predictions(file: Path, references: dict[int, list[str]]) -> dict[int, str]:
    """Captions by image id from a file in COCO's results format."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        predictions = {entry["image_id"]: entry["caption"] for entry in content}
    except OSError as error:
        raise InputError(f"cannot read --predictions '{file}': {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"--predictions '{file}' is not in COCO's results format, a list of "
            f'{{"image_id": int, "caption": str}} ({type(error).__name__}: {error})'
        ) from None
    if len(predictions) != len(content):
        raise InputError(f"--predictions '{file}' captions an image twice; keep one caption per image")
    return predictions


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    return score(args) if args.data_path else caption_images(args)


if __name__ == "__main__":
    cli.run(main)
