"""The flags of inference.py, and which of them exclude each other."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from captioning import InputError, cli
from captioning.cli import flag
from captioning.files import check_target, fingerprint
from captioning.show import outputs

if TYPE_CHECKING:
    from captioning.model.wishes import Wishes

MOST_ALTERNATIVES = 100  # each is a beam, which takes memory
WHAT, FORM = "what to caption", "what to say"
KEEP = "where to keep it (default: stdout); each caption is on disk as soon as it is made"
HOW = "how (default: what the model was saved with)"
ASKED = "captions as you ask for them (default: as the model writes them)"
NO_MATTER = ("explain", "explain_layers", "batch_size", "device", "debug")  # to the captions
PAGE, SCORE = "a page in the browser instead (pip install gradio)", "scoring instead"
EXPORT = "files for onnxruntime and the browser instead (pip install onnxruntime onnx onnxscript)"
# Which flags have an effect, by what is done; `--debug` has one everywhere.
SEARCH = ("num_beams", "max_new_tokens")
OF_MODEL = ("model_path", *SEARCH, "device", "int8")
USED = {
    "export": ("model_path", "output"),
    "in_browser": ("serve", "model_path", "int8", "host", "port"),
    "serve": (*OF_MODEL, ASKED, "alternatives", "explain_layers", "host", "port", "token"),
    "compare": ("data_path", "split", "clip", "output", "device", "batch_size", "int8"),
    "predictions": ("data_path", "references", "split", "subset", "clip", "device"),
    "image_path": (*OF_MODEL, WHAT, KEEP, FORM, HOW, ASKED),
    "data_path": (*OF_MODEL, HOW, ASKED, "split", "calibrate", "clip", "output"),
}
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
        "URLs, files, folders, globs, archives (.zip, .tar, .tar.gz), lists of paths (.txt, or - for stdin)",
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

    ensemble: list[str] | None = flag(
        None,
        HOW,
        "more run folders, trained on the same prepared data: the models write each caption together, by the mean of "
        "their probabilities (default: --model_path alone)",
        metavar="RUN",
    )

    store: list[Path] | None = flag(
        None,
        HOW,
        "folders of dataloader.py: of several captions the one is chosen that agrees with what people wrote of the "
        "training images there that look alike (default: the model alone)",
        metavar="DIR",
    )
    store_weight: float | None = flag(
        None,
        HOW,
        "how much that counts: 0.5 where the model was trained on such images, 8 where it was not (default: 0.5)",
        metavar="W",
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
        "127.0.0.1",
        PAGE,
        "where to listen (default: 127.0.0.1, this machine only); another needs --token, but not with --in_browser",
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
        self._check_ensemble()
        self._check_store()
        self._check_wishes()
        self._check_use()
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
        if self.shard is not None:
            cli.parse_shard(self.shard)
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

    def _check_use(self) -> None:
        """Refuse a flag that would do nothing."""
        what = next(name for name in USED if getattr(self, name))
        for field in dataclasses.fields(self):
            used = {"debug", what, *USED[what]} & {field.name, field.metadata["group"]}
            if not used and getattr(self, field.name) != field.default:
                name = f"no-{field.name}" if field.default is True else field.name
                raise InputError(f"--{name} has no use with --{what}; leave it out")

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

    def _check_ensemble(self) -> None:
        for name in self.ensemble or []:
            if "/" not in name and not Path(name).is_dir():
                raise InputError(f"--ensemble '{name}' is not a folder; did you run train.py?")
            if is_exported(name):
                raise InputError(f"--ensemble '{name}' is an exported folder; name the run folder that it was made of")
        if self.ensemble and self.explain:
            raise InputError(
                "--explain shows where one model looked, and --ensemble has several; leave one of them out"
            )
        if self.ensemble and self.calibrate:
            raise InputError("--ensemble has no use with --calibrate")

    def _check_store(self) -> None:
        if self.store_weight is not None and not self.store:
            raise InputError("--store_weight needs --store")
        if self.store_weight is not None and not 0 <= self.store_weight <= 1000:
            raise InputError(f"--store_weight {self.store_weight:g} is not between 0 and 1000")
        if not self.store:
            return
        for flag_name in ("ensemble", "explain", "calibrate"):
            if getattr(self, flag_name):
                raise InputError(f"--store has no use with --{flag_name}; leave one of them out")
        if self.wishes is not None:
            raise InputError(f"--store has no use with --{next(iter(self.wishes.settings()))}; leave one of them out")
        _ = self.store_folders  # a wrong one is refused now

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

    @property
    def exported(self) -> bool:
        """Whether `model_path` is a folder in ONNX."""
        return is_exported(self.model_path)

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
        asked = [name for name in ("explain", "export", "ensemble", "store") if getattr(self, name)]
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
        if not (self.image_path or self.export or self.serve):
            self._check_places_of_scores()
        if self.data_path and not self.annotations:
            cli.prepared_folders(self.data_path)

    def _check_places_of_scores(self) -> None:
        """Refuse, before hours of captioning, places where the scores cannot go."""
        run = Path(self.model_path)
        beside = (self.predictions[0] if self.predictions else self.output or run / "any").parent
        if self.compare:
            beside = self.output.parent if self.output else Path()
            csv = self.output and self.output.with_suffix(".csv")
            if (
                self.output
                and csv
                and csv.exists()
                and (not self.output.exists() or any(map(csv.samefile, self.compare)))
            ):
                raise InputError(f"--output '{self.output}' comes with '{csv}', which is there; name another page")
        elif self.output:
            if self.output.suffix.lower() != ".json":
                raise InputError(f"--output '{self.output}' is a list in JSON; give it a name that ends in .json")
            if self.output.exists() and not outputs.says_what_made_it(self.output):
                raise InputError(f"'{self.output}' is there, and nothing says what made it; name another file")
        if beside.is_dir() and not os.access(beside, os.W_OK):
            raise InputError(f"the scores are written into '{beside}', which is read-only; {self._elsewhere()}")
        for pattern in ("scored_*.json", "*_per_image.json", "*_results.json"):
            for file in beside.glob(pattern):
                check_target(file)

    def _elsewhere(self) -> str:
        """How scores are written to another folder."""
        if self.predictions:
            return "copy the file of captions elsewhere"
        return f"name a {'page' if self.compare else 'file'} in another with --output"

    @property
    def part(self) -> tuple[int, int] | None:
        """`--shard` as two numbers."""
        return None if self.shard is None else cli.parse_shard(self.shard)

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
        if self.ensemble:
            made["ensemble"] = [fingerprint(Path(name)) if Path(name).is_dir() else name for name in self.ensemble]
        if self.store:
            made["store"] = self.store_names
        return made

    @functools.cached_property
    def store_folders(self) -> list[Path]:
        """The folders that `--store` names.

        Raises:
            InputError: one is no such folder.
        """
        return cli.prepared_folders(self.store or (), "--store")

    @property
    def store_names(self) -> list[str]:
        """What tells the folders of `--store` from others."""
        return _names(self.store_folders)

    def scored_with(self) -> dict[str, Any]:
        """What decides the captions of a split: `made_with`, and the data."""
        return self.made_with() | {"data": _names(cli.prepared_folders(self.data_path or ())), "split": self.split}

    @property
    def annotations(self) -> Path | None:
        """The file that holds the references, where no prepared folder does."""
        if self.predictions and self.data_path and self.data_path[0].is_file():
            return self.data_path[0]
        return self.references


def _names(folders: list[Path]) -> list[str]:
    """The name of each prepared folder, and a digest of what its dataset.json says."""
    return [
        f"{folder.resolve().name} {hashlib.sha256((folder / 'dataset.json').read_bytes()).hexdigest()[:16]}"
        for folder in folders
    ]


def is_exported(folder: str) -> bool:
    """Whether a folder holds a captioner in ONNX."""
    return any(Path(folder, "onnx").glob("encoder_model*.onnx"))
