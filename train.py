"""Stage 2: fine-tune a vision encoder and a GPT-2 decoder into an image captioner.

    python train.py --data_path ./processed_data --epochs 10                    # one GPU, or the CPU
    accelerate launch --multi_gpu train.py --data_path ./processed_data         # every GPU of the machine
    accelerate launch --num_processes 2 --cpu train.py --data_path ./processed_data
    python train.py --epochs 12 --per_device_train_batch_size 8                 # on drawn scenes, for a try
    python train.py --data_path part-*                                          # the parts of dataloader.py --shard

Writes the run folder: model, tokenizer, image processor, checkpoints, results.json, predictions_test.json,
report.html, training_curves.png, gallery.png, README.md. The table of test scores goes to stdout.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError, cli
from captioning.files import lock, write_whole
from captioning.training import arguments, flags, precision, resilience

if TYPE_CHECKING:
    from transformers import Seq2SeqTrainingArguments, VisionEncoderDecoderModel

    from captioning.data.folder import Split
    from captioning.model.captioner import Bundle
    from captioning.scores.confidence import Calibration, Judged
    from captioning.scores.metrics import Evaluation
    from captioning.training.batches import CaptionDataset
    from captioning.training.trainer import CaptionTrainer

Say = Callable[[str], None]
DEFAULT_MAX_LENGTH = 64  # of captions in folders that do not say


def main(argv: list[str] | None = None) -> int:
    args, rest = arguments.read(argv)
    flags.refuse_sharding(os.environ)
    arguments.forget_what_nobody_asked()
    if os.environ.get("RANK", "0") == "0":
        cli.note(f"{args.data} -> {args.output_dir}; starting PyTorch")
    arguments.start_missing_processes(__file__, argv)
    with cli.importing():
        training = arguments.training_arguments(args, rest)
    computed_in = precision.settle(training, precision.asked(arguments.values(rest), os.environ), args.checkpoint())
    with resilience.explained(training), resilience.stoppable(training), only_run_in(args.output_dir, training):
        code = train(args, training, computed_in, sys.argv[1:] if argv is None else argv)
    if training.world_size > 1:
        resilience.leave(code)
    return code


def train(args: arguments.Arguments, training: Seq2SeqTrainingArguments, computed_in: str, words: Sequence[str]) -> int:
    """Everything between the arguments and the run folder.

    Args:
        computed_in: the precision of matrix products, and its reason, for the log.
        words: the command line.
    """
    with cli.importing():
        from transformers import set_seed

        from captioning.data.fingerprint import fingerprint
        from captioning.data.folder import in_parts, load_prepared
        from captioning.model import captioner, lora, parts
        from captioning.model import weights as stored_weights
        from captioning.scores import bootstrap, monotony
        from captioning.show import run_folder, tables, trackers
        from captioning.training import config, record
        from captioning.training.batches import CaptionDataset

    parts.quiet_transformers()
    notes = record.Record(words)
    say: Say = cli.note if training.process_index == 0 else lambda _: None

    precision.refuse_others(training)
    say(f"precision: {computed_in}; final scores in float32")

    # Data
    folders = args.folders()
    splits, description = load_prepared(folders)
    counts = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    say(f"data: {args.data}, {counts} images; {description['source']}{in_parts(description)}")
    if len(folders) > 1:
        say(
            "copies of a picture were looked for in each part, not among the parts; "
            "dataloader.py --data PART PART ... looks among all"
        )

    # Model
    set_seed(training.seed)
    bundle, new, names = open_captioner(args, description)
    if args.model_path:
        splits = in_tokens_of(bundle.tokenizer, splits, description, say)
    length = arguments.length(training, len(splits["train"]))
    frozen = length.updates(max(args.freeze_encoder, args.cross_attention_epochs)) >= length.total
    configure(bundle.model, args, training, frozen)
    weights = stored_weights.fingerprint(bundle.model.state_dict())
    if args.lora:
        new |= lora.add(bundle.model, args.lora)
    limit_length(bundle, splits, training.generation_max_length, args.data, names["decoder"], say)
    if not new and training.learning_rate != arguments.DEFAULTS["learning_rate"]:
        raise InputError(
            "--learning_rate is for parts that start from random weights, and here none does; give --encoder_lr, "
            "--decoder_lr and --cross_attention_lr"
        )
    rates = learning_rates(args, training.learning_rate, bundle.model, new)
    every, trained = captioner.count_parameters(bundle.model)
    of = " -> ".join(" + ".join(cli.encoders(name)) for name in names.values())
    say(f"model: {of}, {every / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained")
    used = {part: rate for part, rate in rates.items() if not (part == "encoder" and frozen)}
    say("learning rates: " + ", ".join(f"{part} {rate:g}" for part, rate in used.items()))
    say(when(args, length))

    # Batches
    datasets = {
        name: CaptionDataset(split, bundle.pixels, name == "train" and args.augment > 0, training.seed, args.mirror)
        for name, split in splits.items()
    }
    if args.cache_features:
        with notes.phase("features"):
            cache_features(bundle, datasets, args.augment, training, say)

    # Training
    with hub_explained("--push_to_hub: there can be no repository"):
        trainer = make_trainer(bundle, datasets, rates, args, training, description["source"], say)
    checkpoint = args.checkpoint()
    if checkpoint:
        say(f"going on from {checkpoint}")
    elif args.resume_from_checkpoint:
        say(f"no whole checkpoint in '{args.output_dir}': starting anew")
    file = args.output_dir / "config.yaml"
    told = config.dump(args, training, arguments.trainer_defaults(), file)
    if checkpoint and file.exists():
        if changed := config.differences(file.read_text(encoding="utf-8", errors="replace"), told):
            say(f"goes on otherwise than it began: {', '.join(changed)}")
    elif trainer.is_world_process_zero():
        write_whole(file, told)
    with notes.phase("training"), contextlib.redirect_stdout(sys.stderr):  # trackers speak: stdout is for results
        seconds = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint)).metrics["train_runtime"]
    notes.move("training", "evaluations", trainer.throughput.evaluated)
    if trainer.throughput.images:
        say(trainer.throughput.line(seconds, training.world_size, training.device))
    lora.merge(bundle.model)
    if trainer.is_world_process_zero():
        if checkpoint:  # the run may have gone on otherwise than it began
            write_whole(file, told)
        captioner.save(bundle, args.output_dir)  # before any evaluation in half precision rounds the weights

    # Scores of the weights that are kept, as inference.py computes them. The test split is seen here, once.
    best = training.load_best_model_at_end and trainer.state.best_model_checkpoint
    kept = trainer.state.best_global_step if best else None
    with notes.phase("scoring"):
        losses = {name: trainer.losses_of(datasets[name]) for name in ("validation", "test")}

    # Run folder
    if trainer.is_world_process_zero():
        kept_bundle = captioner.load(args.output_dir)
        kept_bundle.to(training.device)
        source = description["source"]
        with notes.phase("scoring"):
            validation, judged = score(kept_bundle, splits["validation"], "validation", losses["validation"], source)
            calibration = calibrate(judged, splits["validation"], source, args.output_dir, say)
            test, judged = score(kept_bundle, splits["test"], "test", losses["test"], source)
            predictions = {image_id: caption.text for image_id, caption in judged.items()}
        # Epochs, or true for all of them: infinity is no JSON.
        run = run_folder.Run(
            predictions=predictions,
            judged=judged,
            calibration=calibration,
            validation=validation,
            test=test,
            log_history=trainer.state.log_history,
            steps=trainer.state.global_step,
            kept=kept,
            names={**names, "freeze_encoder": frozen or args.freeze_encoder},
            recipe=args.recipe(),
            learning_rates=used,
            settings=training.to_dict(),
            decoding=bundle.model.generation_config.to_diff_dict(),
            description=description,
            evaluations=record.evaluations(trainer.state.log_history),
            notes=notes.result(
                training.device,
                **trainer.throughput.rates(seconds, training.world_size),
                fingerprints={
                    "data": {name: fingerprint(split) for name, split in splits.items()},
                    "weights_before": weights,
                    "weights_after": stored_weights.fingerprint(kept_bundle.model.state_dict()),
                },
            ),
            versions=record.versions(),
        )
        results = run_folder.write(args.output_dir, run, splits["test"])
        trackers.log_run(trainer.callback_handler.callbacks, args.output_dir, results, trainer.state.global_step)
        print(tables.scores({name: results[name] for name in ("validation", "test")}))
        print(f"\n{tables.diversity(**results['diversity'])}")
        say(f"in brackets: {bootstrap.PROTOCOL}; signature: {test.signature}")
        said = [predictions[image_id] for image_id in splits["test"].image_id]
        if warning := monotony.warning(said, splits["test"].captions):
            say(f"warning: {cli.printable(warning)}")
        folder = shlex.quote(str(args.output_dir))
        say(f"written to {args.output_dir}; next: python inference.py --model_path {folder} --image_path ...")
    if training.push_to_hub:
        with hub_explained(f"'{args.output_dir}' is whole, but it cannot be uploaded"):
            trainer.push_to_hub()
    trainer.accelerator.end_training()
    return 0


@contextlib.contextmanager
def hub_explained(what: str) -> Iterator[None]:
    """An error of the hub's library, or of the network below it, as one sentence that begins with `what`."""
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in (
            "huggingface_hub",
            "httpx",
            "httpx2",
            "httpcore",
            "requests",
        ):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{what} ({reason}); look at the network and at the token, and try again") from error


@contextlib.contextmanager
def only_run_in(folder: Path, training: Seq2SeqTrainingArguments) -> Iterator[None]:
    """The run folder for this run alone."""
    if training.process_index:  # the first process holds it for all
        yield
        return
    told = folder / "config.yaml"
    there = told.exists()
    try:
        with lock(folder / ".lock", wait=False) as alone:
            if not alone:
                raise InputError(f"--output_dir '{folder}' belongs to a training that is running; name another folder")
            yield
    finally:
        with contextlib.suppress(OSError):  # there is something in it, as a rule
            if not there and list(folder.iterdir()) == [told]:
                told.unlink()  # the run ended before it made anything
            folder.rmdir()


def open_captioner(
    args: arguments.Arguments, description: Mapping[str, Any]
) -> tuple[Bundle, set[str], dict[str, Any]]:
    """The captioner to train, which of its parameters have random values, and the names of its encoder and decoder."""
    from captioning.model import captioner, parts

    folder = args.folders()[0]  # the parts of a data set have one image processor, and one tokenizer
    of_data = parts.load_image_processor(folder, "--data_path")
    if args.model_path:
        bundle = captioner.load(args.model_path)
        parts.refuse_small_images(of_data, bundle.image_processor, args.data, args.model_path, args.model_path)
        return bundle, set(), captioner.names_of(args.model_path)
    encoder = cli.one_or_two(args.encoder) if args.encoder else description["encoder"]
    names: dict[str, Any] = {"encoder": encoder, "decoder": args.decoder or description["decoder"]}
    if args.lora and names["decoder"] in parts.DECODER_PRESETS:
        raise InputError(
            f"--lora adapts a decoder that has learnt already, and --decoder '{names['decoder']}' starts from random "
            "weights; name a pretrained one, or leave --lora out"
        )
    tokenizer = parts.load_tokenizer(folder, "--data_path")
    image_processor = of_data
    if encoder != description["encoder"]:
        first = cli.encoders(encoder)[0]
        image_processor = parts.load_image_processor(first, whole=not description.get("center_crop"))
        parts.refuse_small_images(of_data, image_processor, args.data, encoder, names["decoder"])
    if names["decoder"] not in (*parts.DECODER_PRESETS, description["decoder"]):
        # A pretrained decoder only understands its own token ids.
        theirs = parts.load_tokenizer(names["decoder"])
        if theirs.get_vocab() != tokenizer.get_vocab():
            raise InputError(
                f"--decoder '{names['decoder']}' has another tokenizer than the data in '{args.data}', which was "
                f"made for '{description['decoder']}'; run dataloader.py with --decoder '{names['decoder']}'"
            )
    model, new = captioner.assemble(encoder, names["decoder"], tokenizer)
    captioner.refuse_misfit(model.encoder, image_processor, parts.quoted(encoder))
    random = [name in parts.ENCODER_PRESETS for name in cli.encoders(encoder)]
    if any(random) and not all(random) and not args.encoder_lr and args.freeze_encoder != math.inf:
        raise InputError(
            f"{parts.quoted(encoder)}: one starts from random weights and the other has learnt already, and both move "
            "at one rate; give it as --encoder_lr, or name two of a kind"
        )
    return captioner.Bundle(model, tokenizer, image_processor), new, names


def in_tokens_of(tokenizer, splits: Mapping[str, Split], description: Mapping[str, Any], say: Say) -> dict[str, Split]:
    """The splits with captions in the ids of a captioner's own tokenizer, which need not be that of the data."""
    from captioning.data.folder import encode_captions

    most = description.get("max_length", DEFAULT_MAX_LENGTH)
    some = splits["train"].select(range(min(100, len(splits["train"]))))
    flat = [caption for captions in some.captions for caption in captions]
    if encode_captions(tokenizer, flat, most)[0] == [ids for row in range(len(some)) for ids in some.labels(row)]:
        return dict(splits)
    say("captions: tokenised anew, because --model_path has another tokenizer than the data")
    return {name: split.retokenised(tokenizer, most) for name, split in splits.items()}


def configure(
    model: VisionEncoderDecoderModel, args: arguments.Arguments, training: Seq2SeqTrainingArguments, frozen: bool
) -> None:
    """What the flags change of the model itself."""
    from captioning.model import captioner

    if args.dropout is not None:
        captioner.set_dropout(model, args.dropout)
    if frozen:
        model.encoder.requires_grad_(False)
    # What captions are scored with is what the model is saved with.
    if training.generation_num_beams:
        model.generation_config.num_beams = training.generation_num_beams
    if training.device.type == "cpu" and training.bf16:
        # There torch's fused attention is two to five times slower than plain matrix products.
        model.set_attn_implementation("eager")


def limit_length(
    bundle: Bundle, splits: Mapping[str, Split], asked: int | None, data_path: str, decoder: str, say: Say
) -> None:
    """Let captions be as long as those of the training images are, all but one in a thousand, or as long as asked.

    Raises:
        InputError: the decoder has no place for such captions, or the labels are not its tokenizer's.
    """
    lengths, _ = splits["train"].caption_lengths()
    lengths.sort()
    limit = asked or int(lengths[math.ceil(0.999 * len(lengths)) - 1])
    longest = max(int(split.caption_lengths()[0].max(initial=0)) for split in splits.values())
    highest = max(split.highest_token() for split in splits.values())
    if highest >= len(bundle.tokenizer):
        raise InputError(
            f"--data_path '{data_path}' was made for another tokenizer than lies in it: its labels hold token "
            f"{highest}, and the tokenizer has {len(bundle.tokenizer)} tokens; run dataloader.py again"
        )
    positions = bundle.model.decoder.config.max_position_embeddings
    if max(longest, limit + 1) > positions:
        raise InputError(
            f"--decoder '{decoder}' has {positions} positions, and the longest caption {longest} tokens "
            f"({limit} are generated at most); run dataloader.py with a smaller --max_length"
        )
    # What captions are scored with is what the model is saved with.
    bundle.model.generation_config.max_length = None
    bundle.model.generation_config.max_new_tokens = limit
    within = bisect.bisect_right(lengths, limit) / len(lengths)
    say(f"captions: {limit} tokens at most are generated; {within:.1%} of the training captions are that short")


def learning_rates(
    args: arguments.Arguments, base: float, model: VisionEncoderDecoderModel, new: set[str]
) -> dict[str, float]:
    """By part: its own flag, else the base rate where it starts from random weights, else a gentle one."""
    from captioning.model.captioner import PARTS, part_of

    # Adapters start from random weights too.
    gentle = {"encoder": 2e-5, "decoder": 1e-4, "cross_attention": 1e-4}
    fresh = {part_of(name) for name, _ in model.named_parameters() if name in new}
    return {part: getattr(args, f"{part}_lr") or (base if part in fresh else gentle[part]) for part in PARTS}


def when(args: arguments.Arguments, length: arguments.Length) -> str:
    """One line on which updates train what."""
    line = f"updates: {length.total:,}, {length.per_epoch:,} an epoch"
    waits = {"encoder": max(args.freeze_encoder, args.cross_attention_epochs), "decoder": args.cross_attention_epochs}
    for part, epochs in waits.items():
        begin = length.updates(epochs)
        if begin:
            line += f"; the {part} " + ("stays as it is" if begin == length.total else f"moves after update {begin:,}")
    if args.self_critical_epochs:
        line += f"; self-critical after update {length.total - length.updates(args.self_critical_epochs):,}"
    return line


def cache_features(
    bundle: Bundle,
    datasets: Mapping[str, CaptionDataset],
    variants: int,
    training: Seq2SeqTrainingArguments,
    say: Say,
) -> None:
    """Give every data set the frozen encoder's output, computed now or earlier, in the place of pixels.

    It is kept with the images, so that each part of a data set has its own. Several processes share the work, see
    `FeatureCache`.

    Args:
        variants: of each training image.
    """
    from captioning.training.features import FeatureCache, Joined

    bundle.to(training.device)
    say("features: comparing images and encoder with what lies in .features beside the data")
    for name, dataset in datasets.items():
        asked = range(variants if variants and dataset.augment else 1)
        of_parts = []
        for folder, part in dataset.parts():
            cache = FeatureCache(
                bundle,
                folder / ".features",
                training.per_device_eval_batch_size,
                say,
                precision.of(training),
                max(1, training.dataloader_num_workers),
                training.process_index == 0,
            )
            of_parts.append([cache.features(part, name, variant) for variant in asked])
        dataset.features = [Joined(own) for own in zip(*of_parts, strict=True)]


def make_trainer(
    bundle: Bundle,
    datasets: Mapping[str, CaptionDataset],
    rates: Mapping[str, float],
    args: arguments.Arguments,
    training: Seq2SeqTrainingArguments,
    source: str,
    say: Say,
) -> CaptionTrainer:
    """The trainer, and a line on each thing that was decided for it."""
    from captioning.data.facts import more_scores
    from captioning.model.packing import can_pack
    from captioning.scores.reward import CiderReward
    from captioning.training.batches import Collator, LengthSampler
    from captioning.training.self_critical import SelfCritical
    from captioning.training.trainer import CaptionTrainer, Patience

    @functools.cache
    def names() -> dict[int, str]:
        splits = [dataset.split for dataset in datasets.values()]
        return {image_id: name for split in splits for image_id, name in zip(split.image_id, split.names, strict=True)}

    packed = args.packing and can_pack(bundle.model)
    if args.packing and not packed:
        if args.self_critical_epochs:
            raise InputError("--self_critical_epochs needs packing, which this decoder cannot do; name another one")
        say("packing: off, because the decoder does not keep packed captions apart")
    say(
        f"device: {training.device}, {training.world_size} process(es), "
        f"{arguments.images_per_update(training)} images per update, "
        f"{training.dataloader_num_workers} data worker(s) each; "
        f"captions {'packed per image' if packed else 'one per row'}"
    )
    if packed and training.train_sampling_strategy == "group_by_length":
        sampler = LengthSampler(
            datasets["train"].lengths(),
            training.train_batch_size * training.world_size,
            training.seed,
            accumulation=training.gradient_accumulation_steps,
        )
        say(f"padding: {sampler.padding():.1%} of the decoder's positions, sorting within {sampler.window} updates")
    self_critical = None
    if args.self_critical_epochs:
        reward = CiderReward(datasets["train"].split.references)
        self_critical = SelfCritical(
            args.self_critical_epochs,
            reward,
            args.self_critical_lr,
            max_new_tokens=bundle.model.generation_config.max_new_tokens,
        )
    trainer = CaptionTrainer(
        bundle,
        datasets["validation"].split.references | datasets["test"].split.references,
        rates,
        {"encoder": max(args.freeze_encoder, args.cross_attention_epochs), "decoder": args.cross_attention_epochs},
        self_critical,
        more_scores(source),
        lambda image_id: names()[image_id],
        args=training,
        data_collator=Collator(bundle.model.config.decoder_start_token_id, bundle.tokenizer.pad_token_id, packed),
        train_dataset=datasets["train"],
        eval_dataset=datasets["validation"],
    )
    if args.patience:
        trainer.add_callback(Patience(args.patience, trainer))
    return trainer


def score(
    bundle: Bundle, split: Split, name: str, losses: tuple[dict[int, float], dict[int, float]], source: str
) -> tuple[Evaluation, dict[int, Judged]]:
    """The scores of a split, and its captions by image id: those that inference.py gives, and how probable they are.

    Args:
        losses: of each image, nats and tokens.
    """
    from captioning.data.facts import more_scores
    from captioning.model.caption import caption_all
    from captioning.model.explain import best_captions
    from captioning.scores.metrics import evaluate
    from captioning.show import certainty

    pictures = ((image_id, split.image(row)) for row, image_id in enumerate(split.image_id))
    made = caption_all(bundle, pictures, len(split), f"captions of {name}", make=best_captions)
    judged = {image_id: certainty.judged(bundle, best) for image_id, (best, *_) in made.items()}
    predictions = {image_id: caption.text for image_id, caption in judged.items()}
    references = split.references
    found = evaluate(predictions, references, more=more_scores(source)).with_ratio("loss", *losses)
    return found, judged


def calibrate(judged: Mapping[int, Judged], split: Split, source: str, folder: Path, say: Say) -> Calibration | None:
    """Learn on the validation split how sure captions are, and keep it in the run folder."""
    from captioning.scores import confidence

    references = split.references
    try:
        calibration = confidence.calibrate(judged, references, f"{source}, validation split")
    except InputError as error:
        say(str(error))
        return None
    confidence.write(folder, calibration)
    say(f"confidence: learnt from {calibration.images:,} captions, {calibration.right:,} of them right")
    return calibration


if __name__ == "__main__":
    cli.run(main)
