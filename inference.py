"""Stage 3: caption images with a trained model.

    python inference.py --image_path photo.jpg                       # the caption alone on stdout
    python inference.py --image_path https://example.com/photo.jpg
    python inference.py --image_path photos/ 'more/*.png'            # path<TAB>caption lines
    python inference.py --image_path photos/ --output captions.json  # [{"path", "caption"}]
    python inference.py --image_path photos/ --json                  # JSON Lines: tokens, log-probabilities, timing
    python inference.py --image_path photo.jpg --alternatives 5      # the five best captions with their scores
    python inference.py --image_path photo.jpg --explain out.png     # where the model looked, word by word
    python inference.py --serve                                      # a page in the browser (pip install gradio)
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
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from captioning import InputError, cli
from captioning.files import write_whole

MOST_ALTERNATIVES = 100  # each is a beam, which takes memory
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Caption images, or score captions.", allow_abbrev=False)
    what = parser.add_argument_group("what to caption")
    what.add_argument("--image_path", nargs="+", metavar="PATH", help="URLs, files, folders or globs")
    what.add_argument("--model_path", default="vit-gpt2-coco", help="a run folder (default: ./vit-gpt2-coco)")

    form = parser.add_argument_group("what to say")
    form.add_argument("--output", type=Path, metavar="FILE", help="write a JSON list of {path, caption}")
    form.add_argument(
        "--json",
        action="store_true",
        help="a line of JSON for each image: caption, score, tokens with log-probabilities, alternatives, seconds",
    )
    form.add_argument(
        "--alternatives",
        type=int,
        default=1,
        metavar="K",
        help="the K best captions, each after its score, the mean log-probability of its tokens; searches with K "
        "beams at least (default: 1)",
    )
    form.add_argument(
        "--explain", type=Path, metavar="PNG", help="also draw one image and, for each word, where the model looked"
    )
    form.add_argument(
        "--explain_layers",
        type=int,
        nargs="+",
        metavar="N",
        help="decoder layers whose attention is averaged, 0 is the first and -1 the last (default: all)",
    )

    how = parser.add_argument_group("how (default: what the model was saved with)")
    how.add_argument("--num_beams", type=int, help="captions considered side by side; 1 is greedy")
    how.add_argument("--max_new_tokens", type=int, help="longest caption, in tokens")
    how.add_argument("--batch_size", type=int, default=16, help="images at a time (default: 16)")
    how.add_argument("--device", help="cpu, cuda, cuda:1, mps (default: the best there is)")

    page = parser.add_argument_group("a page in the browser instead (pip install gradio)")
    page.add_argument("--serve", action="store_true", help="drop an image or paste its address, see where it looked")
    page.add_argument("--port", type=int, default=7860, help="(default: 7860)")
    page.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine only)")

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
    parser.add_argument("--debug", action="store_true", help="show the traceback of every error")
    args = parser.parse_args(argv)

    for name in ("num_beams", "max_new_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value} is below 1")
    if not 1 <= args.alternatives <= MOST_ALTERNATIVES:
        parser.error(f"--alternatives {args.alternatives} is not between 1 and {MOST_ALTERNATIVES}")
    for name in ("json", "explain", "alternatives"):
        if args.data_path and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} is for --image_path, not for scoring a split")
    if args.explain_layers and not (args.explain or args.serve):
        parser.error("--explain_layers needs --explain or --serve")
    for name in ("image_path", "data_path", "output", "json", "explain"):
        if args.serve and getattr(args, name):
            parser.error(f"--{name} has no use with --serve")
    for name in ("port", "host"):
        if not args.serve and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name} needs --serve")
    if not 1 <= args.port <= 65535:
        parser.error(f"--port {args.port} is not between 1 and 65535")
    if args.predictions and not args.data_path:
        parser.error("--predictions needs --data_path, which holds the references")
    if not args.serve and bool(args.image_path) == bool(args.data_path):
        parser.error("give --image_path to caption images, or --data_path to score a split")
    for name in ("output", "explain"):
        file = getattr(args, name)
        if file and not file.parent.is_dir():
            parser.error(f"--{name} '{file}': there is no folder '{file.parent}'")
        if file and file.is_dir():
            parser.error(f"--{name} '{file}' is a folder; name a file")
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

    from captioning.model import captioner, parts

    parts.quiet_transformers()
    bundle = captioner.load(args.model_path)
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


def captions(
    bundle,
    pictures: Iterator[tuple[Any, Any]],
    batch_size: int,
    total: int,
    generate: Callable[[Any, Any], list[Any]],
) -> Iterator[tuple[Any, Any, float]]:
    """(key, uint8 pixels) pairs -> (key, what `generate` makes of them, its share of the seconds), a batch at a time.

    `generate` takes the bundle and normalised pixels, (batch, channels, height, width).
    """
    import numpy as np
    import torch
    from tqdm import tqdm

    from captioning.model import parts

    pixels = parts.Pixels(bundle.image_processor)
    waiting: list[tuple[Any, Any]] = []
    bar = tqdm(total=total, unit="image", file=sys.stderr, disable=total <= batch_size)

    def flush() -> Iterator[tuple[Any, Any, float]]:
        if not waiting:
            return
        keys, images = zip(*waiting, strict=True)
        waiting.clear()
        began = time.perf_counter()
        stacked = torch.from_numpy(np.stack(images)).to(bundle.model.device)
        made = generate(bundle, pixels.normalise(stacked))
        seconds = (time.perf_counter() - began) / len(keys)
        yield from ((key, one, seconds) for key, one in zip(keys, made, strict=True))
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
    if args.explain and len(paths) > 1:
        raise InputError(f"--explain draws one image, and --image_path names {len(paths):,}; give one of them")
    if not any("://" in path or os.path.isfile(path) for path in paths):
        # Nothing to caption at all: say so before the model is loaded.
        from captioning.data import images

        images.read_bytes(paths[0])
    bundle = load_model(args)

    from concurrent.futures import ThreadPoolExecutor

    from captioning.data import images
    from captioning.model import explain, generate, parts
    from captioning.show import pages

    pixels = parts.Pixels(bundle.image_processor)
    # Twice what is needed: the decoder may skip detail that nobody will see, the resize stays the one of training.
    side = 2 * parts.resized_side(bundle.image_processor)
    failures: list[str] = []
    read_seconds: dict[str, float] = {}

    def read(path: str):
        began = time.perf_counter()
        try:
            image = images.open_image(path, min_side=side)
            result = image if args.explain else pixels(image)
        except InputError as error:
            return error
        read_seconds[path] = time.perf_counter() - began
        return result

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

    def explained() -> Iterator[tuple[str, Any, float]]:
        for path, image in pictures():
            began = time.perf_counter()
            explanation = explain.explain(bundle, image, args.alternatives, args.explain_layers)
            seconds = time.perf_counter() - began
            words = [vars(word) for word in explanation.words]
            pages.draw_explanation(image, explanation.caption.text, words, args.explain, region=explanation.region)
            cli.note(f"explanation written to {args.explain}")
            yield path, explanation.alternatives, seconds

    if args.explain:
        made = explained()
    elif args.json or args.alternatives > 1:
        made = captions(
            bundle,
            pictures(),
            args.batch_size,
            len(paths),
            lambda bundle, values: explain.best_captions(bundle, values, args.alternatives),
        )
    else:
        made = captions(bundle, pictures(), args.batch_size, len(paths), generate.generate)

    results = []
    for path, found, seconds in made:
        # A file name need not be UTF-8; JSON has to be.
        entry: dict[str, Any] = {"path": os.fsencode(path).decode("utf-8", "replace")}
        if isinstance(found, str):
            entry["caption"] = found
        else:
            entry |= {"caption": found[0].text, "score": round(found[0].score, 6)}
            if args.json:
                entry["tokens"] = token_list(bundle.tokenizer, found[0])
            entry["alternatives"] = [{"caption": one.text, "score": round(one.score, 6)} for one in found]
            if args.json:
                entry["seconds"] = {"read": round(read_seconds[path], 4), "generate": round(seconds, 4)}
        results.append(entry)
        if args.output:
            continue
        if args.json:
            print(json_line(entry), flush=True)
        else:
            first = [] if len(paths) == 1 else [cli.printable(path)]
            rows = [[entry["caption"]]]
            if args.alternatives > 1:
                rows = [[f"{one['score']:.4f}", one["caption"]] for one in entry["alternatives"]]
            print("\n".join("\t".join([*first, *map(cli.printable, row)]) for row in rows), flush=True)
    if len(paths) == 1 and failures:
        raise InputError(failures[0])
    if args.output:
        if args.json:
            text = "".join(json_line(entry) + "\n" for entry in results)
        else:
            text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
        write_whole(args.output, text)
        cli.note(f"{len(results):,} captions written to {args.output}")
    if failures:
        cli.note(f"{len(failures):,} of {len(paths):,} images could not be captioned:")
        for failure in failures:
            cli.note(f"  {failure}")
        return 1 if results else 2
    return 0


def token_list(tokenizer, caption) -> list[dict[str, Any]]:
    """A caption's tokens as they are written to JSON; one that is half a letter reads as a replacement character."""
    texts = tokenizer.batch_decode([[token] for token in caption.tokens], clean_up_tokenization_spaces=False)
    return [
        {"id": token, "text": text, "log_probability": round(value, 6)}
        for token, text, value in zip(caption.tokens, texts, caption.log_probabilities, strict=True)
    ]


def json_line(entry: dict[str, Any]) -> str:
    """One line of JSON that reads as it is meant in a terminal: letters as they are, control characters escaped."""
    text = json.dumps(entry, ensure_ascii=False)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def score(args: argparse.Namespace) -> int:
    """Score a run folder, or a results file, on a split of `--data_path`."""
    from captioning.data import folder
    from captioning.model import parts
    from captioning.scores import metrics
    from captioning.training import batches

    splits, description = folder.load_prepared(args.data_path)
    rows = splits[args.split]
    references = dict(zip(rows["image_id"], rows["captions"], strict=True))
    if args.predictions:
        predictions = read_predictions(args.predictions, references)
        target = args.predictions.with_name(f"{args.predictions.stem}_scores_per_image.json")
    else:
        from captioning.model import generate, parts

        bundle = load_model(args)
        dataset = batches.CaptionDataset(rows, parts.Pixels(bundle.image_processor))
        pictures = ((row["image_id"], row["pixels"]) for row in (dataset[i] for i in range(len(dataset))))
        made = captions(bundle, pictures, args.batch_size, len(dataset), generate.generate)
        predictions = {image_id: caption for image_id, caption, _ in made}
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
        for image_id, caption in predictions.items():
            if type(image_id) is not int or not isinstance(caption, str):
                raise TypeError(f"image_id {image_id!r}, caption {caption!r}")
    except OSError as error:
        raise InputError(f"cannot read --predictions '{file}': {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(
            f"--predictions '{file}' is not in COCO's results format, a list of "
            f'{{"image_id": int, "caption": str}} ({type(error).__name__}: {error})'
        ) from None
    if len(predictions) != len(content):
        raise InputError(f"--predictions '{file}' captions an image twice; keep one caption per image")
    for ids, problem in (
        (references.keys() - predictions.keys(), "of the split have no prediction"),
        (predictions.keys() - references.keys(), "are captioned and not in the split"),
    ):
        if ids:
            raise InputError(
                f"--predictions '{file}': {len(ids):,} images {problem}, such as {min(ids)}; "
                "it has to caption each image of the --split once"
            )
    return predictions


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.serve:
        from captioning.show import serve

        serve.check_gradio()
        alternatives = args.alternatives if args.alternatives > 1 else 0
        serve.serve(load_model(args), args.host, args.port, alternatives, args.explain_layers)
        return 0
    return score(args) if args.data_path else caption_images(args)


if __name__ == "__main__":
    cli.run(main)
