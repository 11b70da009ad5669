"""Stage 3: caption images with a trained model.

    python inference.py photo.jpg                                    # the caption alone on stdout
    python inference.py --image_path https://example.com/photo.jpg
    python inference.py --image_path photos/ 'more/*.png'            # path<TAB>caption lines
    python inference.py --image_path photos/ --output captions.json  # [{"path", "caption"}]
    python inference.py --image_path photos/ --json                  # JSON Lines: tokens, log-probabilities, timing
    python inference.py --image_path photo.jpg --alternatives 5      # the five best captions with their scores
    python inference.py --image_path photo.jpg --explain out.png     # where the model looked, word by word
    python inference.py photo.jpg --case sentence --max_characters 125 --without man   # a caption as you ask for it
    python inference.py photo.jpg --store ./processed_data           # with what people wrote of images that look alike
    python inference.py --serve                                      # a page in the browser, and POST /caption
    python inference.py --data_path ./processed_data --split test    # score a run folder on a split
    python inference.py --predictions results.json --data_path ./processed_data   # score anybody's captions
    python inference.py --compare run-a run-b --data_path ./processed_data        # is the difference chance?
    python inference.py --export onnx --output exported              # for onnxruntime and the browser
    python inference.py --model_path exported photo.jpg              # captions with it, without PyTorch

Exit code 0: all done; 1: some images of several failed, listed on stderr; 2: bad input.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from captioning import InputError, cli
from captioning.data.sources import Picture, Source, expand, part_of, pictures
from captioning.files import json_text, write_whole
from captioning.model.caption import caption_all, in_batches
from captioning.show import entries, outputs
from captioning.show.arguments import Arguments

if TYPE_CHECKING:
    import torch

    from captioning.data.folder import Split
    from captioning.data.predictions import References
    from captioning.model.captioner import Bundle
    from captioning.model.explain import Caption
    from captioning.model.onnx_captioner import OnnxBundle
    from captioning.scores.confidence import Calibration, Judged
    from captioning.show.clip_scores import ClipScores
    from captioning.show.store import Store

ENOUGH_TO_WARN = 10_000  # captions: whether they are all the same is seen by then


def main(argv: list[str] | None = None) -> int:
    args = cli.parse(Arguments, argv, "Caption images, or score captions.", positional="image_path")
    if args.export:
        return export(args)
    if args.serve:
        return serve(args)
    if args.compare:
        return compare(args)
    return caption_images(args) if args.image_path else score(args)


def export(args: Arguments) -> int:
    """Write `--model_path` as ONNX files into `--output`."""
    from captioning.model import onnx_export
    from captioning.scores import confidence

    assert args.output is not None
    calibration = load_calibration(args)
    with_it = functools.partial(confidence.write, calibration=calibration) if calibration else None
    onnx_export.export(args.model_path, args.output, with_it)
    print(args.output)
    return 0


def serve(args: Arguments) -> int:
    """Serve a page until Ctrl-C."""
    if args.in_browser:
        from captioning.show import in_browser

        in_browser.serve(Path(args.model_path), args.host, args.port, args.int8)
        return 0
    from captioning.show import http, serve

    serve.check_gradio()
    token = args.token or os.environ.get("CAPTIONING_TOKEN") or None
    access = http.Access(args.host, token)  # refused before the model is loaded
    bundle = load_exported(args) if args.exported else load_model(args)
    alternatives = args.alternatives if args.alternatives > 1 else 0
    calibration = load_calibration(args)
    serve.serve(bundle, access, args.port, alternatives, args.explain_layers, calibration)
    return 0


def load_calibration(args: Arguments) -> Calibration | None:
    """How sure captions of the model are; None where its folder does not say.

    Raises:
        InputError: a flag needs it, and it is not there.
    """
    from captioning.scores import confidence

    folder = Path(args.model_path)
    if not folder.is_dir():
        if folder.is_absolute():
            return None  # there is no such model, as loading it will say
        from captioning.model import parts

        folder = parts.resolve(args.model_path, "--model_path")
    calibration = confidence.read(folder)
    if calibration is None and args.min_confidence is not None:
        raise confidence.missing("--min_confidence", args.model_path, args.exported)
    return calibration


def load_exported(args: Arguments) -> OnnxBundle:
    """The captioner of an exported folder, with the decoding settings of the command line."""
    from captioning.model import onnx_captioner

    bundle = onnx_captioner.load(args.model_path, int8=args.int8)
    given = {name: getattr(args, name) for name in ("num_beams", "max_new_tokens") if getattr(args, name)}
    bundle.decoding = dataclasses.replace(bundle.decoding, **given)
    refuse_too_long(bundle.decoding.max_new_tokens, bundle.positions)
    return bundle


def load_model(args: Arguments) -> Bundle:
    """The bundle on its device, with the decoding settings of the command line."""
    names = [args.model_path, *(args.ensemble or [])]
    with cli.importing():
        from captioning.model import captioner, ensemble, parts

        parts.quiet_transformers()
        bundles = [captioner.load(name, "--ensemble" if n else "--model_path") for n, name in enumerate(names)]
    bundle = ensemble.join(bundles, names) if args.ensemble else bundles[0]
    bundle.to(device_of(args))
    for name in ("num_beams", "max_new_tokens"):
        if getattr(args, name):
            setattr(bundle.model.generation_config, name, getattr(args, name))
    positions = bundle.model.decoder.config.max_position_embeddings
    if args.wishes:
        from captioning.model import constrain

        bundle.wishes = args.wishes
        if not args.max_new_tokens:
            constrain.make_room(bundle)
        constrain.rules_for(bundle, args.wishes, bundle.model.generation_config.max_new_tokens)
    refuse_too_long(bundle.model.generation_config.max_new_tokens or 0, positions)
    return bundle


def open_store(args: Arguments, bundle: Bundle) -> Store | None:
    """The captions and images of `--store`; None without it. Features are those of a training, or kept as it would.

    Raises:
        InputError: a folder is not whole, has no training images, or has stored them too small for the model.
    """
    if not args.store:
        return None
    import numpy as np
    import torch

    from captioning.data.folder import load_prepared
    from captioning.model import fast, neighbours, parts
    from captioning.show.store import WEIGHT, Store
    from captioning.training.batches import CaptionDataset
    from captioning.training.features import FeatureCache

    precision = torch.bfloat16 if fast.bfloat16_pays(bundle.model.device.type) else torch.float32
    captions: list[list[str]] = []
    vectors = []
    for folder in args.store_folders:
        train = load_prepared(folder)[0]["train"]
        if not len(train):
            raise InputError(f"--store '{folder}' has no training images; name another folder of dataloader.py")
        of_data = parts.load_image_processor(folder, "--store")
        parts.refuse_small_images(of_data, bundle.image_processor, str(folder), args.model_path, args.model_path)
        cache = FeatureCache(bundle, folder / ".features", args.batch_size, cli.note, precision)
        features = cache.features(CaptionDataset(train, bundle.pixels), "train")
        vectors += [neighbours.vectors_of(block.whole(), bundle.model.encoder) for block in features.parts]
        captions += train.captions
    cli.note(f"store: {len(captions):,} images with {sum(map(len, captions)):,} captions")
    weight = WEIGHT if args.store_weight is None else args.store_weight
    return Store(captions, np.concatenate(vectors), weight)


def refuse_too_long(longest: int, positions: int) -> None:
    """Refuse captions of more tokens than the decoder has positions for."""
    if longest >= positions:
        raise InputError(f"--max_new_tokens {longest} is too long; the decoder has {positions} positions")


def captioning_functions(args: Arguments, store: Store | None = None) -> tuple[Callable, Callable]:
    """`generate` and `best_captions` for the kind of `--model_path`, or with a store."""
    if store:
        return store.generate, store.best_captions
    if args.exported:
        from captioning.model import onnx_captioner

        return onnx_captioner.generate, onnx_captioner.best_captions
    from captioning.model import explain, generate

    return generate.generate, explain.best_captions


def device_of(args: Arguments) -> torch.device:
    """`--device`, or the best there is.

    Raises:
        InputError: it cannot be used.
    """
    import torch

    try:
        device = torch.device(args.device or _best_device(torch))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device '{args.device}' cannot be used: {str(error).splitlines()[0]}") from None
    return device


def _best_device(torch) -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


# ---- captions of images


def caption_images(args: Arguments) -> int:
    """Caption `--image_path`; returns the exit code."""
    every = expand(args.image_path or [], args.recursive)
    if not every:
        raise InputError(f"--image_path {' '.join(args.image_path or [])} names no image; name a file or a folder")
    sources = part_of(every, args.part)
    if not sources:
        cli.note(f"part {args.shard} is empty: there are {len(every):,} images")
    if args.explain and len(sources) > 1:
        raise InputError(f"--explain draws one image, and --image_path names {len(sources):,}; give one of them")
    if sources and not any(source.is_there() for source in sources):
        sources[0].read()  # nothing to caption at all: say so before the model is loaded
    calibration = load_calibration(args)
    with open_outputs(args, every, calibration is not None) as out:
        left = [source for source in sources if not out.has(source)]
        if len(left) < len(sources):
            cli.note(f"{len(sources) - len(left):,} of {len(sources):,} images are in {out} already, and are skipped")
        done, failures = write_captions(args, left, out, calibration) if left else (0, [])
    if len(sources) == 1 and failures:
        raise InputError(failures[0])
    if failures:
        cli.note(f"{len(failures):,} of {len(left):,} images could not be captioned:")
        for failure in failures:
            cli.note(f"  {failure}")
        return 1 if done or len(left) < len(sources) else 2
    return 0


def open_outputs(args: Arguments, sources: Sequence[Source], sure: bool) -> outputs.Outputs:
    """Where the captions go; none, if they go to stdout.

    Args:
        sources: all that `--image_path` names, whichever part of them is captioned.
        sure: each has a confidence.
    """
    mode: outputs.Mode = "overwrite" if args.overwrite else "append" if args.append else "continue"
    out = outputs.Outputs()
    if args.output:
        file = outputs.of_shard(args.output, args.part)
        out.output = outputs.Captions(
            file, args.made_with(), mode, entries.columns(args.alternatives, sure, args.min_confidence is not None)
        )
    if args.metadata:
        file = Path(sources[0].root, "metadata.jsonl")
        out.metadata = outputs.Captions(file, args.made_with(), mode, key="file_name")
    if args.sidecar:
        out.sidecars = outputs.Sidecars(args.sidecar, sources, args.overwrite)
    return out


def write_captions(
    args: Arguments, sources: Sequence[Source], out: outputs.Outputs, calibration: Calibration | None
) -> tuple[int, list[str]]:
    """Caption images, each written or printed as soon as it is made; how many, and why others have no caption."""
    failures: list[str] = []
    captions: list[str] = []
    unsure: list[str] = []
    done = 0

    def failed(source: Source, reason: str) -> None:
        failures.append(reason)
        out.fail(source, reason)

    bundle = load_exported(args) if args.exported else load_model(args)
    store = None
    if not args.exported:
        store = open_store(args, cast("Bundle", bundle))
        make_faster(cast("Bundle", bundle), args.dtype)
    try:
        for source, entry in make_entries(sources, bundle, args, failed, out.flush, calibration, store):
            done += 1
            if entry.get("needs_review"):
                unsure.append(f"{entry['path']}: confidence {entry['confidence']:.2f}")
            if out:
                out.write(source, entry)
            elif args.json or not entry.get("needs_review"):
                print(entries.shown(entry, args.json, args.alternatives > 1, named=len(sources) > 1), flush=True)
            if len(captions) < ENOUGH_TO_WARN and entry["caption"]:
                captions.append(entry["caption"])
    except KeyboardInterrupt:
        kept = f"; {done:,} captions were written to {out}, and the same command goes on from there" if out else ""
        raise KeyboardInterrupt(f"stopped{kept}") from None
    if out and (written := done - len(unsure)):
        cli.note(f"{written:,} captions written to {out}")
    warn_of_monotony(captions)
    if unsure:
        limit = f"below --min_confidence {args.min_confidence:g}"
        cli.note(f"{len(unsure):,} of {len(sources):,} images are left to a person, {limit}:")
        for line in unsure:
            cli.note(f"  {cli.printable(line)}")
    return done, failures


def make_faster(bundle: Bundle, dtype: str) -> None:
    """Let a model on a CPU multiply in the fastest way that there is for captions which nobody scores."""
    from captioning.model import fast

    if bundle.model.device.type == "cpu":
        fast.prepare(bundle.model, dtype)
        if dtype == "bfloat16" and not fast.multiplies_in_bfloat16():
            cli.note("this processor does not multiply in bfloat16: --dtype float32 is faster")


def warn_of_monotony(captions: list[str], references: Sequence[Sequence[str]] = ()) -> None:
    """One line on stderr where the model says the same of every image, or one word over and over."""
    from captioning.scores import monotony

    if warning := monotony.warning(captions, references):
        cli.note(f"warning: {cli.printable(warning)}")


def make_entries(
    sources: Sequence[Source],
    bundle: Bundle | OnnxBundle,
    args: Arguments,
    failed: Callable[[Source, str], None],
    after_batch: Callable[[], None],
    calibration: Calibration | None,
    store: Store | None,
) -> Iterator[tuple[Source, entries.Entry]]:
    """What is said of each image that can be read; `failed` is told why others cannot."""
    generate, best_captions = captioning_functions(args, store)
    # Twice what is needed: the decoder may skip detail that nobody will see, the resize stays the one of training.
    side = 2 * bundle.pixels.resized_side
    prepare = bundle.pixels if args.explain is None else None
    read = pictures(sources, side, prepare, max(2 * args.batch_size, 16), failed)
    with_pixels = ((picture, picture.content) for picture in read)
    made: Iterator[tuple[Picture, Any, float]]
    if args.explain:
        made = explained(cast("Bundle", bundle), read, args, calibration)
    else:
        make: Callable[..., Sequence[Any]] = generate
        # How probable a caption is takes a few per cent of the time more: only where it is told.
        sure = calibration is not None and (bool(args.output) or args.metadata or args.min_confidence is not None)
        if args.json or args.alternatives > 1 or sure:
            make = functools.partial(best_captions, count=args.alternatives)
        if not args.exported:
            from captioning.model import fast

            make = fast.in_dtype(make, cast("Bundle", bundle).model.device, args.dtype)
        made = in_batches(bundle, with_pixels, args.batch_size, make, len(sources), after_batch=after_batch)
    for picture, found, seconds in made:
        entry = entries.entry(picture.source.name, found, args.json or args.alternatives > 1)
        if not isinstance(found, str):
            if calibration:
                from captioning.show import certainty

                entry |= certainty.of_entry(entry, found, calibration, args.min_confidence)
            if args.json:
                entry["tokens"] = entries.token_list(bundle, found[0])
                if calibration:
                    entry["words"] = certainty.words(bundle, found[0], calibration)
                entry["seconds"] = {"read": round(picture.seconds, 4), "generate": round(seconds, 4)}
        yield picture.source, entry


def explained(
    bundle: Bundle, read: Iterable[Picture], args: Arguments, calibration: Calibration | None
) -> Iterator[tuple[Picture, list[Caption], float]]:
    """Caption each picture, and draw where the model looked."""
    from captioning.model import explain
    from captioning.show import certainty, pages

    assert args.explain is not None
    for picture in read:
        began = time.perf_counter()
        explanation = explain.explain(bundle, picture.content, args.alternatives, args.explain_layers)
        seconds = time.perf_counter() - began
        words = certainty.explained(explanation.words, calibration)
        text, region = explanation.caption.text, explanation.region
        pages.draw_explanation(picture.content, text, words, args.explain, region=region)
        cli.note(f"explanation written to {args.explain}")
        yield picture, explanation.alternatives, seconds


# ---- scores


def score(args: Arguments) -> int:
    """Score a run folder on a split of `--data_path`, or anybody's captions on that or on an annotation file."""
    from captioning.data.facts import more_scores
    from captioning.data.predictions import read_predictions, read_references
    from captioning.scores import bootstrap, confidence, metrics
    from captioning.show import tables

    split = None
    if args.annotations:
        references = read_references(args.annotations, args.split)
    else:
        split, references = prepared_split(args)
    settings: dict[str, Any] = {}
    judged: dict[int, Judged] = {}
    # Names of their own: the run folder's results.json and predictions_test.json stay what train.py wrote.
    if args.predictions:
        predictions = read_predictions(args.predictions, references, args.subset).captions
        target = args.predictions[0].with_name(f"{args.predictions[0].stem}_scores_per_image.json")
    else:
        assert split is not None
        predictions, settings, judged = caption_split(split, args)
        folder = Path(args.model_path) if Path(args.model_path).is_dir() else Path()
        file = args.output or folder / f"scored_{args.split}_predictions.json"
        write_predictions(file, split.results(predictions), args)
        cli.note(f"captions written to {file}")
        stem = file.stem.removesuffix("_predictions")
        target, table = file.with_name(f"{stem}_per_image.json"), file.with_name(f"{stem}_results.json")
    captions = {image_id: references.captions[image_id] for image_id in predictions}
    found = metrics.evaluate(predictions, captions, more=more_scores(references.source))
    if split is None:
        results = [{"image_id": image_id, "caption": caption} for image_id, caption in predictions.items()]
    else:
        if len(predictions) < len(split):
            split = split.select(row for row, image_id in enumerate(split.image_id) if image_id in predictions)
        results = split.results(predictions)
        if clip := clip_scores(args, split):
            found = clip(found, predictions)
    per_image = found.per_image()
    each: list[dict[str, Any]] = [{**entry, **per_image[entry["image_id"]]} for entry in results]
    if args.calibrate:
        learnt = confidence.calibrate(judged, captions, f"{references.source}, {args.split} split")
        confidence.write(Path(args.model_path), learnt)
        cli.note(f"how sure captions are, learnt from {learnt.images:,} of them, written to {confidence.FILE}")
    reliability: dict[str, Any] = {}
    if judged and (calibration := load_calibration(args)):
        sure = {image_id: calibration.caption(caption) for image_id, caption in judged.items()}
        each = [row | {"confidence": sure[row["image_id"]]} for row in each]
        reliability = confidence.reliability_of(sure, {key: row["cider_d"] for key, row in per_image.items()})
    write_json(target, sorted(each, key=lambda row: row["cider_d"]))
    cli.note(f"scores of each image, the worst first, written to {target}")
    scores = tables.scores_of(found) | {"diversity": tables.diversity_of(predictions, captions)}
    protocol = found.protocol
    if len(captions) < len(references.captions):
        protocol += f"; a subset: {len(captions):,} of {len(references.captions):,} images"
    if not args.predictions:
        told: dict[str, Any] = {"protocol": protocol, "interval": bootstrap.PROTOCOL, "split": args.split}
        told |= {"data": references.source, "decoding": settings}
        told |= scores | ({"confidence": reliability} if reliability else {})
        write_json(table, told)
    where = "" if args.annotations else f"{args.split} split, "
    cli.note(f"{where}{len(captions):,} images, {references.source}{references.parts}; {protocol}")
    cli.note(f"in brackets: {bootstrap.PROTOCOL}; signature: {found.signature}")
    warn_of_monotony(list(predictions.values()), list(captions.values()))
    if reliability:
        cli.note(confidence.told(reliability))
    print(tables.scores({"references" if args.annotations else args.split: scores}))
    print(f"\n{tables.diversity(**scores['diversity'])}")
    return 0


def compare(args: Arguments) -> int:
    """Compare the captioners of `--compare` on a split of `--data_path`."""
    from captioning.data.facts import more_scores
    from captioning.scores import bootstrap
    from captioning.show import compare, wording

    assert args.data_path is not None and args.compare is not None
    split, references = prepared_split(args)
    names = compare.short_names(args.compare)
    captions = {
        name: captions_of(path, split, references, args) for name, path in zip(names, args.compare, strict=True)
    }
    results = [compare.results_of(path, args.split) for path in args.compare]
    found = compare.compare(
        captions,
        references.captions,
        more_scores(references.source),
        compare.differ_in_seeds_alone(results),
        clip_scores(args, split),
    )
    for warning in compare.warnings(found, results, args.split):
        cli.note(f"warning: {warning}")
    row_of = {image_id: row for row, image_id in enumerate(split.image_id)}
    source = references.source
    target = args.output or Path(compare.file_name(names, args.split))
    write_whole(target.with_suffix(".csv"), compare.per_image_csv(found, references.names))
    page = compare.page(
        found,
        f"{source}, {args.split} split",
        wording.author(source),
        references.names,
        lambda i: split.image(row_of[i]),
    )
    write_whole(target, page)
    first = found.evaluations[found.first]
    cli.note(f"{args.split} split, {len(split):,} images, {source}; {first.protocol}")
    cli.note(f"in brackets: {bootstrap.PROTOCOL}; signature: {first.signature}")
    cli.note(f"page written to {target}, scores of each image to {target.with_suffix('.csv')}")
    print(compare.table(found))
    return 0


def clip_scores(args: Arguments, split: Split) -> ClipScores | None:
    """What adds the scores of `--clip`, if they are asked for."""
    if not args.clip:
        return None

    from captioning.model import parts
    from captioning.show.clip_scores import ClipScores

    assert args.data_path is not None
    parts.quiet_transformers()
    return ClipScores(args.clip, device_of(args), split, cli.prepared_folders(args.data_path)[0] / ".clip")


def captions_of(path: str, split: Split, references: References, args: Arguments) -> dict[int, str]:
    """The captions of a split by a run or a file: those that lie there, or else those that the run's model gives."""
    from captioning.data.predictions import read_predictions

    if Path(path).is_file():
        return read_predictions([Path(path)], references).captions
    of_run = replace(args, compare=None, output=None, model_path=path)
    trained, scored = Path(path, f"predictions_{args.split}.json"), Path(path, f"scored_{args.split}_predictions.json")
    for file in (trained, scored):
        # Of the first `train.py` takes care. The second may be of earlier weights, or of captions as somebody asked.
        if file.is_file() and (file == trained or outputs.was_made_with(file, of_run.scored_with())):
            try:
                captions = read_predictions([file], references).captions
            except InputError:
                continue  # captions of other data: the model was trained elsewhere
            cli.note(f"{path}: captions of {file.name}")
            return captions
    why = f"{scored.name} was made otherwise" if scored.is_file() else "has no captions of this split"
    cli.note(f"{path}: {why}; its model writes them")
    captions, *_ = caption_split(split, of_run)
    try:
        write_predictions(scored, split.results(captions), of_run)
    except OSError as error:
        cli.note(f"{path}: its captions cannot be kept there ({error.strerror}); the next time they are made again")
    return captions


def prepared_split(args: Arguments) -> tuple[Split, References]:
    """`--split` of `--data_path`, and what people wrote about its images."""
    from captioning.data.folder import in_parts, load_prepared
    from captioning.data.predictions import References

    assert args.data_path is not None
    splits, description = load_prepared(cli.prepared_folders(args.data_path))
    split = splits[args.split]
    names = dict(zip(split.image_id, split.names, strict=True))
    return split, References(split.references, names, description["source"], in_parts(description))


def caption_split(split: Split, args: Arguments) -> tuple[dict[int, str], dict[str, Any], dict[int, Judged]]:
    """The model's caption of each image of a split, by id, and the settings that it was generated with.

    The last is how probable the model finds each.
    """
    from captioning.show import certainty

    assert args.data_path is not None
    folder = cli.prepared_folders(args.data_path)[0]  # parts have one image processor
    pictures = ((image_id, split.image(row)) for row, image_id in enumerate(split.image_id))
    _, best_captions = captioning_functions(args)
    bundle: Any
    if args.exported:
        from captioning.model import onnx_captioner

        bundle = load_exported(args)
        onnx_captioner.refuse_small_images(bundle, folder, args.model_path)
        settings = {"int8": bundle.int8, **dataclasses.asdict(bundle.decoding)}
    else:
        from captioning.model import parts

        bundle = load_model(args)
        of_data = parts.load_image_processor(folder, "--data_path")
        for processor in bundle.image_processors:
            parts.refuse_small_images(of_data, processor, str(folder), args.model_path, args.model_path)
        settings = bundle.model.generation_config.to_diff_dict() | (args.wishes.settings() if args.wishes else {})
        settings |= {"ensemble": args.ensemble} if args.ensemble else {}
        if store := open_store(args, bundle):
            best_captions = store.best_captions
            settings |= {"store": args.store_names, "store_weight": store.weight}
    made = caption_all(bundle, pictures, len(split), args.split, best_captions, args.batch_size)
    judged = {image_id: certainty.judged(bundle, best) for image_id, (best, *_) in made.items()}
    return {image_id: caption.text for image_id, caption in judged.items()}, settings, judged


def write_predictions(file: Path, entries: list[dict[str, Any]], args: Arguments) -> None:
    """Captions of a split, and beside them what made them."""
    outputs.write_made_with(file, json_text(entries, indent=1) + "\n", args.scored_with())


def write_json(file: Path, content: Any) -> None:
    write_whole(file, json_text(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
