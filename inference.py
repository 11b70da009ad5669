"""Stage 3: caption images with a trained model.

    python inference.py photo.jpg                                    # the caption alone on stdout
    python inference.py --image_path https://example.com/photo.jpg
    python inference.py --image_path photos/ 'more/*.png'            # path<TAB>caption lines
    python inference.py --image_path photos/ --output captions.json  # [{"path", "caption"}]
    python inference.py --image_path photos/ --json                  # JSON Lines: tokens, log-probabilities, timing
    python inference.py --image_path photo.jpg --alternatives 5      # the five best captions with their scores
    python inference.py --image_path photo.jpg --explain out.png     # where the model looked, word by word
    python inference.py photo.jpg --case sentence --max_characters 125 --without man   # a caption as you ask for it
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from captioning import InputError, cli
from captioning.cli import flag
from captioning.data.sources import Picture, Source, expand, part_of, pictures
from captioning.files import check_target, fingerprint, json_text, write_whole
from captioning.show import entries, outputs

if TYPE_CHECKING:
    import torch

    from captioning.data.folder import Split
    from captioning.data.predictions import References
    from captioning.model.captioner import Bundle
    from captioning.model.explain import Caption
    from captioning.model.onnx_captioner import OnnxBundle
    from captioning.model.wishes import Wishes
    from captioning.scores.confidence import Calibration, Judged
    from captioning.show.clip_scores import ClipScores

MOST_ALTERNATIVES = 100  # each is a beam, which takes memory

ENOUGH_TO_WARN = 10_000  # captions: whether they are all the same is seen by then

WHAT, FORM = "what to caption", "what to say"
KEEP = "where to keep it (default: stdout); each caption is on disk as soon as it is made"
HOW = "how (default: what the model was saved with)"
ASKED = "captions as you ask for them (default: as the model writes them)"
NO_MATTER = ("explain", "explain_layers", "batch_size", "device", "debug")  # to the captions
PAGE, SCORE = "a page in the browser instead (pip install gradio)", "scoring instead"
EXPORT = "files for onnxruntime and the browser instead (pip install onnxruntime onnx onnxscript)"
ELSEWHERE = (WHAT, KEEP, PAGE, SCORE, EXPORT)  # flags that do not decide the captions


@dataclass(frozen=True)
class Arguments:
    """The flags.

    Raises:
        InputError: a value cannot be, or two flags exclude each other.
    """

    image_path: list[str] | None = flag(
        None,
        WHAT,
        "URLs, files, folders, globs, archives (.zip, .tar), lists of paths (.txt, or - for stdin)",
        metavar="PATH",
    )
    model_path: str = flag("vit-gpt2-coco", WHAT, "a run folder (default: ./vit-gpt2-coco)")

    recursive: bool = flag(True, WHAT, "also the images in the folders inside a folder")
    shard: str | None = flag(
        None,
        WHAT,
        "caption one of N equal parts, as many machines may do at a time: 1/4 is the first of four; each writes an "
        "--output of its own, such as captions.1-of-4.json",
        metavar="I/N",
    )

    output: Path | None = flag(
        None,
        KEEP,
        "a file of captions, and of the reasons why images have none: .json, .jsonl, .csv or .tsv; the same command "
        "goes on where it stopped",
        metavar="FILE",
    )
    sidecar: str | None = flag(
        None, KEEP, "a text beside each image: photo.txt beside photo.jpg", choices=(".txt", ".caption")
    )
    metadata: bool = flag(False, KEEP, "metadata.jsonl in the folder of images, which makes it an ImageFolder")
    append: bool = flag(False, KEEP, "write more into a file that another model, other settings or somebody else made")
    overwrite: bool = flag(False, KEEP, "replace the captions that are there")

    json: bool = flag(
        False,
        FORM,
        "a line of JSON for each image: caption, score, tokens with log-probabilities, alternatives, seconds",
    )
    alternatives: int = flag(
        1,
        FORM,
        "the K best captions, each after its score, the mean log-probability of its tokens; searches with K beams at "
        "least",
        metavar="K",
    )
    explain: Path | None = flag(
        None, FORM, "also draw one image and, for each word, where the model looked", metavar="PNG"
    )
    explain_layers: list[int] | None = flag(
        None,
        FORM,
        "decoder layers whose attention is averaged, 0 is the first and -1 the last (default: all)",
        metavar="N",
    )

    min_confidence: float | None = flag(
        None,
        FORM,
        "leave images whose caption is less sure than this (0 to 1) to a person: no caption, but a line on stderr and "
        "a draft in JSON and tables",
        metavar="P",
    )

    num_beams: int | None = flag(None, HOW, "captions considered side by side; 1 is greedy")
    max_new_tokens: int | None = flag(None, HOW, "longest caption, in tokens")
    batch_size: int = flag(16, HOW, "images at a time")
    dtype: str = flag(
        "float32",
        HOW,
        "of the products; bfloat16 is faster where the processor or the GPU multiplies in it, and one caption in nine "
        "or so comes out otherwise",
        choices=("float32", "bfloat16"),
    )
    device: str | None = flag(None, HOW, "cpu, cuda, cuda:1, mps (default: the best there is)")
    int8: bool = flag(
        False, HOW, "of an exported folder, take the weights of 8 bits: smaller and faster, nearly as good"
    )

    prefix: str = flag(
        "", ASKED, "how each caption begins, in whole words; the model goes on from there", metavar="TEXT"
    )
    min_words: int = flag(0, ASKED, "words of a caption at least (default: no limit)", metavar="N")
    max_words: int | None = flag(None, ASKED, "words of a caption at most (default: no limit)", metavar="N")
    max_characters: int | None = flag(
        None,
        ASKED,
        "characters of a caption at most; it ends where a sentence may end (default: no limit)",
        metavar="N",
    )
    must: list[str] | None = flag(
        None, ASKED, "words that each caption has, in any letter case; a plural is another word", metavar="WORD"
    )
    without: list[str] | None = flag(None, ASKED, "words that no caption has, likewise", metavar="WORD")
    no_repeat_ngram_size: int = flag(
        0, ASKED, "so many words in a row do not occur twice, and so many tokens neither; 0: they may", metavar="N"
    )
    repetition_penalty: float = flag(1.0, ASKED, "above 1: what is there already becomes less likely")
    length_penalty: float | None = flag(
        None, ASKED, "above 1: longer captions, by beam search (default: what the model was saved with, or 1)"
    )
    temperature: float | None = flag(
        None, ASKED, "draw captions instead of searching the best: below 1 likelier ones, above 1 more varied ones"
    )
    top_p: float | None = flag(
        None, ASKED, "draw captions, from the likeliest tokens that have this probability together; 0 to 1"
    )
    seed: int = flag(0, ASKED, "another number draws other captions")
    case: str = flag(
        "as-is",
        ASKED,
        "letter case; sentence: a capital letter begins each sentence, a full stop ends the caption",
        choices=("as-is", "lower", "sentence"),
    )
    full_stop: bool | None = flag(None, ASKED, "end with a full stop (default: with --case sentence)")

    serve: bool = flag(False, PAGE, "drop an image or paste its address, see where it looked")
    port: int = flag(7860, PAGE, "where to listen")
    host: str = flag(
        "127.0.0.1", PAGE, "where to listen (default: 127.0.0.1, this machine only); another needs --token"
    )
    token: str | None = flag(
        None,
        PAGE,
        "password of the page and of POST /caption; better in the environment variable CAPTIONING_TOKEN, where other "
        "users of the machine do not see it",
    )
    in_browser: bool = flag(
        False, PAGE, "a page that captions in the visitor's own browser, with an exported --model_path"
    )

    data_path: list[Path] | None = flag(
        None,
        SCORE,
        "a folder of dataloader.py, or all parts of --shard: caption one of its splits and score it",
        metavar="DIR",
    )
    split: str = flag("test", SCORE, "which of them", choices=("train", "validation", "test"))
    calibrate: bool = flag(
        False,
        SCORE,
        "with --split validation: learn from it how sure captions are, and keep that in the run folder, as train.py "
        "does at its end",
    )
    predictions: list[Path] | None = flag(
        None,
        SCORE,
        "score these captions, without a model: COCO's results format, or what --output writes",
        metavar="FILE",
    )
    clip: str | None = flag(
        None, SCORE, "also CLIPScore and RefCLIPScore, by this CLIP: a folder or hub id", metavar="NAME"
    )
    compare: list[str] | None = flag(
        None,
        SCORE,
        "two run folders or files of captions, or more: scores side by side, how the others differ from the first, and "
        "whether that may be chance; writes a page (--output) and the scores of each image as CSV",
        metavar="RUN",
    )
    references: Path | None = flag(
        None,
        SCORE,
        "an annotation file such as captions_val2014.json, in the place of --data_path",
        metavar="FILE",
    )
    subset: bool = flag(False, SCORE, "score the images that have both a prediction and references, and say how many")

    export: str | None = flag(
        None, EXPORT, "write the model into the folder --output, with float32 and with int8 weights", choices=("onnx",)
    )
    debug: bool = cli.debug_flag()

    def __post_init__(self):
        for name in ("num_beams", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name} {value} is below 1")
        if not 1 <= self.alternatives <= MOST_ALTERNATIVES:
            raise InputError(f"--alternatives {self.alternatives} is not between 1 and {MOST_ALTERNATIVES}")
        if not 1 <= self.port <= 65535:
            raise InputError(f"--port {self.port} is not between 1 and 65535")
        if self.min_confidence is not None and not 0 <= self.min_confidence <= 1:
            raise InputError(f"--min_confidence {self.min_confidence} is not between 0 and 1")
        self._check_combinations()
        self._check_wishes()
        self._check_paths()

    def _check_combinations(self) -> None:
        if self.compare:
            self._check_comparison()
        if self.clip and (not self.data_path or self.annotations):
            raise InputError("--clip needs --data_path, a folder which holds the images")
        if self.clip and self.subset:
            raise InputError("--clip scores whole splits, and --subset parts of them; leave one of them out")
        if self.data_path and (self.json or self.explain or self.alternatives > 1):
            wrong = "json" if self.json else "explain" if self.explain else "alternatives"
            raise InputError(f"--{wrong} is for --image_path, not for scoring a split")
        if self.shard is not None and self.part is None:
            raise InputError(f"--shard {self.shard} is not a part such as 1/4, the first of four")
        self._check_outputs()
        if self.min_confidence is not None and not self.image_path:
            raise InputError("--min_confidence is for --image_path")
        if self.calibrate and not (self.data_path and self.split == "validation"):
            raise InputError(
                "--calibrate needs --data_path and --split validation: the other splits are for other uses"
            )
        if self.calibrate and (self.predictions or self.compare or self.exported or not Path(self.model_path).is_dir()):
            raise InputError("--calibrate needs the folder of a run, --model_path, and writes into it")
        if self.explain_layers and not (self.explain or self.serve):
            raise InputError("--explain_layers needs --explain or --serve")
        for name in ("image_path", "data_path", "output", "json", "explain"):
            if self.serve and getattr(self, name):
                raise InputError(f"--{name} has no use with --serve")
        for name, default in (("port", 7860), ("host", "127.0.0.1"), ("token", None), ("in_browser", False)):
            if not self.serve and getattr(self, name) != default:
                raise InputError(f"--{name} needs --serve")
        if self.predictions and not (self.data_path or self.references):
            raise InputError("--predictions needs --data_path, which holds the references, or --references")
        for name in ("references", "subset"):
            if getattr(self, name) and not self.predictions:
                raise InputError(f"--{name} needs --predictions, the captions to score")
        if self.references and self.data_path:
            raise InputError("--references and --data_path both hold references; give one of them")
        if self.export:
            self._check_export()
        elif not self.serve and bool(self.image_path) == bool(self.data_path or self.references):
            raise InputError("give --image_path to caption images, or --data_path to score a split")
        if self.predictions and self.output:
            raise InputError("--output has no use with --predictions: the scores are written beside that file")

    def _check_comparison(self) -> None:
        assert self.compare is not None
        if len(self.compare) < 2:
            raise InputError(f"--compare '{self.compare[0]}' names one run; name two or more")
        if not self.data_path:
            raise InputError("--compare needs --data_path, which holds the references")
        if self.predictions:
            raise InputError("--predictions has no use with --compare, which takes such files itself")
        if self.model_path != "vit-gpt2-coco":
            raise InputError("--model_path has no use with --compare, which names the runs itself")
        for name in ("num_beams", "max_new_tokens"):
            if getattr(self, name):
                raise InputError(
                    f"--{name} has no use with --compare; score the runs with it first, and name the files"
                )
        if self.wishes is not None:
            raise InputError(
                "--compare takes captions as they are, without wishes; score the runs first, and name files"
            )
        if self.output and self.output.suffix.lower() not in (".html", ".htm"):
            raise InputError(f"--output '{self.output}' is to be a page; give it a name that ends in .html")
        for path in self.compare:
            if not Path(path).exists():
                raise InputError(f"--compare '{path}' does not exist; name run folders, or files of captions")

    @functools.cached_property
    def wishes(self) -> Wishes | None:
        """What captions are asked to be; None: as the model writes them."""
        from captioning.model.wishes import Wishes

        names = (field.name for field in dataclasses.fields(Wishes))
        asked = Wishes(**{name: value for name in names if (value := getattr(self, name)) is not None})
        return None if asked == Wishes() else asked

    def _check_wishes(self) -> None:
        if self.wishes is None:
            return
        if self.predictions:
            raise InputError(f"--{next(iter(self.wishes.settings()))} has no use with --predictions: they are written")
        if self.calibrate:
            name = next(iter(self.wishes.settings()))
            raise InputError(
                f"--{name} has no use with --calibrate, which learns from captions as the model writes them"
            )
        if self.seed and not self.wishes.drawn:
            raise InputError("--seed is for captions that are drawn; add --temperature or --top_p")
        if self.wishes.drawn and (self.num_beams or 1) > 1:
            raise InputError(
                f"--num_beams {self.num_beams} is for a search, and with --temperature or --top_p captions are drawn; "
                "leave one of them out"
            )

    def _check_outputs(self) -> None:
        keeping = [name for name in ("output", "sidecar", "metadata") if getattr(self, name)]
        for name in ("sidecar", "metadata", "append", "overwrite", "shard"):
            if getattr(self, name) and not self.image_path:
                raise InputError(f"--{name} is for --image_path")
        if self.dtype != "float32" and not self.image_path:
            raise InputError(f"--dtype {self.dtype} is for --image_path; scores are told of captions in float32")
        if self.append and self.overwrite:
            raise InputError("--append keeps the captions that are there, and --overwrite does not; give one of them")
        if self.overwrite and not keeping:
            raise InputError("--overwrite needs --output, --sidecar or --metadata")
        if self.append and not (self.output or self.metadata):
            raise InputError("--append is for --output and --metadata; a text beside an image stays as it is")
        if self.json and self.output and self.output.suffix.lower() in (".csv", ".tsv"):
            raise InputError(
                f"--json has tokens, for which '{self.output}' has no cells; name a .json or a .jsonl file"
            )
        if self.metadata and (len(self.image_path or []) != 1 or not Path((self.image_path or [""])[0]).is_dir()):
            raise InputError("--metadata describes one folder of images; give --image_path that folder alone")
        if self.metadata and self.shard:
            raise InputError("--metadata is one file, which no two machines can write; use --output with --shard")

    def _check_export(self) -> None:
        if not self.output:
            raise InputError("--export needs --output, the folder to write, such as exported")
        for name in ("image_path", "data_path", "json", "explain", "serve", "int8", "compare", "predictions"):
            if getattr(self, name):
                raise InputError(f"--{name} has no use with --export")

    @property
    def exported(self) -> bool:
        """Whether `model_path` is a folder in ONNX."""
        return any(Path(self.model_path, "onnx").glob("encoder_model*.onnx"))

    def _check_exported(self) -> None:
        if self.in_browser and self.token:
            raise InputError("--token has no use with --in_browser, which hands out files only")
        if not self.exported:
            for name in ("int8", "in_browser"):
                if getattr(self, name):
                    raise InputError(
                        f"--{name} needs an exported folder, which --model_path '{self.model_path}' is not; write one "
                        "with --export onnx"
                    )
            return
        asked = [name for name in ("explain", "export") if getattr(self, name)]
        asked += self.wishes.settings() if self.wishes else []
        if asked:
            raise InputError(
                f"--{asked[0]} needs PyTorch's weights; name the run folder, not the exported one ('{self.model_path}')"
            )
        if self.device not in (None, "cpu"):
            raise InputError(f"--device {self.device}: exported folders run on the CPU only; leave --device out")
        if self.dtype != "float32":
            raise InputError(f"--dtype {self.dtype}: exported folders have --int8 instead; leave --dtype out")

    def _check_paths(self) -> None:
        self._check_exported()
        for name in () if self.export else ("output", "explain"):
            file = getattr(self, name)
            if file and not file.parent.is_dir():
                raise InputError(f"--{name} '{file}': there is no folder '{file.parent}'")
            if file:
                check_target(file, f"--{name}")
        if self.image_path and self.output and self.output.suffix.lower() not in outputs.ENDINGS:
            raise InputError(f"--output '{self.output}' ends in none of {', '.join(outputs.ENDINGS)}; name such a file")
        if not (self.predictions or self.compare) and "/" not in self.model_path and not Path(self.model_path).is_dir():
            raise InputError(f"--model_path '{self.model_path}' is not a folder; did you run train.py?")
        if self.annotations and not self.annotations.is_file():
            raise InputError(
                f"--references '{self.annotations}' is not a file; name captions_val2014.json, for example"
            )
        if not (self.image_path or self.compare or self.export):  # before hours of captioning: where the scores go
            beside = (self.predictions[0] if self.predictions else self.output or Path(self.model_path, "any")).parent
            for pattern in ("scored_*.json", "*_per_image.json"):
                for file in beside.glob(pattern):
                    check_target(file)
        if self.data_path and not self.annotations:
            cli.prepared_folders(self.data_path)

    @property
    def part(self) -> tuple[int, int] | None:
        """`--shard` as two numbers."""
        number, _, parts = (self.shard or "").partition("/")
        if number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts):
            return int(number), int(parts)
        return None

    def made_with(self) -> dict[str, Any]:
        """What decides the captions: the model, and each flag that is not as it is by default."""
        folder = Path(self.model_path)
        made: dict[str, Any] = {"model": self.model_path}
        if folder.is_dir():
            made = {"model": folder.resolve().name, "weights": fingerprint(folder)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata["group"] not in ELSEWHERE and field.name not in NO_MATTER and value != field.default:
                made[field.name] = value
        return made

    @property
    def annotations(self) -> Path | None:
        """The file that holds the references, where no prepared folder does."""
        if self.predictions and self.data_path and self.data_path[0].is_file():
            return self.data_path[0]
        return self.references


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

    assert args.output is not None
    onnx_export.export(args.model_path, args.output)
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
    http.Access(args.host, token)  # refused before the model is loaded
    bundle = load_exported(args) if args.exported else load_model(args)
    alternatives = args.alternatives if args.alternatives > 1 else 0
    calibration = load_calibration(args)
    serve.serve(bundle, args.host, args.port, alternatives, args.explain_layers, token, calibration)
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
    calibration = None if args.exported else confidence.read(folder)
    if calibration is None and args.min_confidence is not None:
        raise confidence.missing("--min_confidence", args.model_path)
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

    from captioning.model import captioner, parts

    parts.quiet_transformers()
    bundle = captioner.load(args.model_path)
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


def refuse_too_long(longest: int, positions: int) -> None:
    """Refuse captions of more tokens than the decoder has positions for."""
    if longest >= positions:
        raise InputError(f"--max_new_tokens {longest} is too long; the decoder has {positions} positions")


def captioning_functions(args: Arguments) -> tuple[Callable, Callable, Callable]:
    """`in_batches`, `generate` and `best_captions` for the kind of `--model_path`."""
    if args.exported:
        from captioning.model import onnx_captioner

        return onnx_captioner.in_batches, onnx_captioner.generate, onnx_captioner.best_captions
    from captioning.model import explain, generate

    return generate.in_batches, generate.generate, explain.best_captions


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
    sources = part_of(expand(args.image_path or [], args.recursive), args.part)
    if args.explain and len(sources) > 1:
        raise InputError(f"--explain draws one image, and --image_path names {len(sources):,}; give one of them")
    if not any(source.is_there() for source in sources):
        sources[0].read()  # nothing to caption at all: say so before the model is loaded
    calibration = load_calibration(args)
    with open_outputs(args, sources, calibration is not None) as out:
        left = [source for source in sources if not out.has(source)]
        if len(left) < len(sources):
            cli.note(f"{len(sources) - len(left):,} of {len(sources):,} images are in {out} already, and are skipped")
        done, failures = write_captions(args, left, out, calibration) if left else (0, [])
    if len(sources) == 1 and failures:
        raise InputError(failures[0])
    if out and done:
        cli.note(f"{done:,} captions written to {out}")
    if failures:
        cli.note(f"{len(failures):,} of {len(left):,} images could not be captioned:")
        for failure in failures:
            cli.note(f"  {failure}")
        return 1 if done or len(left) < len(sources) else 2
    return 0


def open_outputs(args: Arguments, sources: Sequence[Source], sure: bool) -> outputs.Outputs:
    """Where the captions go; none, if they go to stdout.

    Args:
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
    if not args.exported:
        make_faster(cast("Bundle", bundle), args.dtype)
    try:
        for source, entry in make_entries(sources, bundle, args, failed, out.flush, calibration):
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
    from captioning.training.arguments import multiplies_in_bfloat16

    if bundle.model.device.type == "cpu":
        fast.prepare(bundle.model, dtype)
        if dtype == "bfloat16" and not multiplies_in_bfloat16():
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
) -> Iterator[tuple[Source, entries.Entry]]:
    """What is said of each image that can be read; `failed` is told why others cannot."""
    in_batches, generate, best_captions = captioning_functions(args)
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
        sure = calibration is not None and (args.output is not None or args.min_confidence is not None)
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
                    entry["words"] = certainty.words(bundle.tokenizer, found[0], calibration)
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
    from captioning.show.run_folder import diversity_of, scores_of

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
        write_json(file, split.results(predictions))
        cli.note(f"captions written to {file}")
        target = file.with_name(f"scored_{args.split}_per_image.json")
    captions = {image_id: references.captions[image_id] for image_id in predictions}
    found = metrics.evaluate(predictions, captions, more=more_scores(references.source))
    results = [{"image_id": image_id, "caption": caption} for image_id, caption in predictions.items()]
    if split is not None:
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
    scores, protocol = scores_of(found) | {"diversity": diversity_of(predictions, captions)}, found.protocol
    if len(captions) < len(references.captions):
        protocol += f"; a subset: {len(captions):,} of {len(references.captions):,} images"
    if not args.predictions:
        told: dict[str, Any] = {"protocol": protocol, "interval": bootstrap.PROTOCOL, "split": args.split}
        told |= {"data": references.source, "decoding": settings}
        told |= scores | ({"confidence": reliability} if reliability else {})
        write_json(target.with_name(f"scored_{args.split}_results.json"), told)
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
    file_names = dict(zip(split.image_id, split.names, strict=True))
    source = references.source
    target = args.output or Path(compare.file_name(names, args.split))
    write_whole(target.with_suffix(".csv"), compare.per_image_csv(found, file_names))
    page = compare.page(
        found, f"{source}, {args.split} split", wording.author(source), file_names, lambda i: split.image(row_of[i])
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
    for name in (f"predictions_{args.split}.json", f"scored_{args.split}_predictions.json"):
        file = Path(path) / name
        if file.is_file():
            try:
                captions = read_predictions([file], references).captions
            except InputError:
                continue  # captions of other data: the model was trained elsewhere
            cli.note(f"{path}: captions of {name}")
            return captions
    cli.note(f"{path}: has no captions of this split; its model writes them")
    captions, *_ = caption_split(split, replace(args, compare=None, output=None, model_path=path))
    write_json(Path(path) / f"scored_{args.split}_predictions.json", split.results(captions))
    return captions


def prepared_split(args: Arguments) -> tuple[Split, References]:
    """`--split` of `--data_path`, and what people wrote about its images."""
    from captioning.data.folder import in_parts, load_prepared
    from captioning.data.predictions import References

    assert args.data_path is not None
    splits, description = load_prepared(cli.prepared_folders(args.data_path))
    split = splits[args.split]
    names = dict(zip(split.image_id, split.names, strict=True))
    captions = dict(zip(split.image_id, split.captions, strict=True))
    return split, References(captions, names, description["source"], in_parts(description))


def caption_split(split: Split, args: Arguments) -> tuple[dict[int, str], dict[str, Any], dict[int, Judged]]:
    """The model's caption of each image of a split, by id, and the settings that it was generated with.

    The last is how probable the model finds each; empty for an exported folder.
    """
    assert args.data_path is not None
    folder = cli.prepared_folders(args.data_path)[0]  # parts have one image processor
    pictures = ((image_id, split.image(row)) for row, image_id in enumerate(split.image_id))
    if args.exported:
        from captioning.model import onnx_captioner

        exported = load_exported(args)
        onnx_captioner.refuse_small_images(exported, folder, args.model_path)
        predictions = onnx_captioner.caption_all(exported, pictures, len(split), args.split, args.batch_size)
        return predictions, {"int8": exported.int8, **dataclasses.asdict(exported.decoding)}, {}
    from captioning.model import explain, parts
    from captioning.model.generate import caption_all
    from captioning.show import certainty

    bundle = load_model(args)
    of_data = parts.load_image_processor(folder, "--data_path")
    parts.refuse_small_images(of_data, bundle.image_processor, str(folder), args.model_path, args.model_path)
    made = caption_all(bundle, pictures, len(split), args.split, args.batch_size, explain.best_captions)
    judged = {image_id: certainty.judged(bundle.tokenizer, best) for image_id, (best, *_) in made.items()}
    predictions = {image_id: caption.text for image_id, caption in judged.items()}
    asked = args.wishes.settings() if args.wishes else {}
    return predictions, {**bundle.model.generation_config.to_diff_dict(), **asked}, judged


def write_json(file: Path, content: Any) -> None:
    write_whole(file, json_text(content, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
