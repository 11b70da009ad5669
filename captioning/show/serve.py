"""A page in the browser: drop an image or paste its address, get a caption and where the model looked.

    serve(bundle, host="127.0.0.1", port=7860)

Needs Gradio, which nothing else here does. What a visitor gives is read as on the command line, with the same limits
and the same messages; one request is answered at a time. The same server answers `POST /caption`, see `http.py`.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import html
import importlib.util
import io
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from PIL import Image

from captioning import InputError, cli
from captioning.data import images
from captioning.model.caption import Caption
from captioning.model.wishes import CASES, Wishes
from captioning.show import entries, http, pages

if TYPE_CHECKING:
    from captioning.model.captioner import Bundle
    from captioning.model.explain import Explanation
    from captioning.model.onnx_captioner import OnnxBundle
    from captioning.scores.confidence import Calibration

CSS = """
.gradio-container { max-width: 1100px !important; margin: auto; }
.message { border-left: 4px solid #c2410c; padding: .4rem .8rem; }
.shown img { max-width: 100%; max-height: 60vh; border-radius: 6px; display: block; }
.words { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(44%, 170px), 1fr)); gap: .8rem; }
.words figure { margin: 0; min-width: 0; }
.words img { width: 100%; border-radius: 6px; display: block; }
.words b { overflow-wrap: anywhere; }
.words meter { width: 60%; }
.alternatives { padding-left: 1.4rem; }
.alternatives li { margin: .3rem 0; }
.alternatives small { opacity: .75; }
"""
SHOWN_SIDE, CELL_SIDE = 800, 240  # pixels of the pictures on the page
# How much less probable each token of a caption is, in the mean, than those of the best one; natural logarithm.
IN_WORDS = ((0.05, "about as likely"), (0.15, "a little less likely"), (0.4, "less likely"))


# What a visitor of the page can ask of a caption.
ASKED = ("prefix", "case", "min_words", "max_words", "max_characters", "must", "without", "temperature", "seed")


@dataclass
class Answer:
    """What the page shows: text, and HTML with every caption escaped."""

    caption: str = ""
    alternatives: str = ""
    explanation: str = ""
    message: str = ""  # what is wrong, if anything is
    picture: str = ""  # the image itself
    sure: str = ""  # how sure the caption is


class Captioner:
    """Answers one request at a time; whoever comes second waits.

    Args:
        bundle: its model stands on its device; or that of an exported folder, which does not tell where it looked.
        alternatives: how many of the best captions to show; 0: as many as the model's beams.
        layers: as in `explain.explain`.
        public: fetch from the internet only, for visitors who need not be the user of this machine.
        calibration: how sure captions are; None: nothing is said of it.
    """

    def __init__(
        self,
        bundle: Bundle | OnnxBundle,
        alternatives: int = 0,
        layers: Sequence[int] | None = None,
        public: bool = False,
        calibration: Calibration | None = None,
    ):
        self.exported = hasattr(bundle, "decoding")
        self.bundle = cast(Any, bundle)
        settings = self.bundle.decoding if self.exported else self.bundle.model.generation_config
        # As many as its beams cost nothing, and leave the caption what it is without them.
        self.alternatives = alternatives or settings.num_beams or 1
        self.layers, self.public, self.calibration = layers, public, calibration
        self.turn = threading.Lock()

    def file(self, path: str | None, asked: Mapping[str, Any] | None = None) -> Answer:
        """Caption an uploaded file, named by its path on this machine.

        Args:
            asked: what of `Wishes` is asked instead of what the command line says, by name; words of `must` and
                `without` are separated by commas.
        """
        if not path:
            return Answer()
        return self._answer(Path(path), Path(path).name, asked)

    def address(self, url: str | None, asked: Mapping[str, Any] | None = None) -> Answer:
        """Caption the image at an http(s) address; anything else, such as a path on this machine, is refused."""
        url = (url or "").strip()
        if not re.match(r"https?://", url, re.IGNORECASE):
            return Answer(message="Paste the address of an image: it begins with http:// or https://.")
        return self._answer(url, url, asked)

    def either(self, path: str | None, url: str | None, asked: Mapping[str, Any] | None = None) -> Answer:
        """Caption the uploaded file, or else the address."""
        if not path and not (url or "").strip():
            return Answer(message="Drop an image first, or paste its address.")
        return self.file(path, asked) if path else self.address(url, asked)

    def _asked(self, asked: Mapping[str, Any] | None) -> Any:
        """The bundle with other wishes.

        Raises:
            InputError: they contradict each other, or the model cannot write so.
        """
        if asked is None or self.exported:
            return self.bundle
        from captioning.model import constrain

        values = {name: value for name, value in asked.items() if value}  # 0, like nothing, asks for nothing
        for name in ("must", "without"):
            values[name] = tuple(word.strip() for word in values.get(name, "").split(",") if word.strip())
        numbers = ("min_words", "max_words", "max_characters", "seed")
        values |= {name: int(values[name]) for name in numbers if name in values}
        wishes = dataclasses.replace(
            self.bundle.wishes or Wishes(), **{name: getattr(Wishes(), name) for name in ASKED} | values
        )
        bundle = dataclasses.replace(self.bundle, wishes=None if wishes == Wishes() else wishes)
        if bundle.wishes is not None:
            constrain.rules_for(bundle, bundle.wishes, bundle.model.generation_config.max_new_tokens)
        return bundle

    def entry(self, data: bytes, name: str, options: http.Options) -> dict[str, Any]:
        """What `POST /caption` answers for the bytes of an image.

        Raises:
            InputError: they are no image that can be captioned, or an option is beyond what the model can do.
        """
        bundle = self.bundle
        positions = bundle.positions if self.exported else bundle.model.decoder.config.max_position_embeddings
        if (options.max_new_tokens or 0) >= positions:
            long = f"the option max_new_tokens is {options.max_new_tokens}, too long"
            raise InputError(f"{long}: the decoder has {positions} positions")
        began = time.perf_counter()
        image = self._opened(data, name)
        read = time.perf_counter()
        with self.turn:
            found = self._best(image, options)
        ended = time.perf_counter()
        answer = entries.entry(name, found)
        del answer["path"]
        answer["seconds"] = {"read": round(read - began, 4), "generate": round(ended - read, 4)}
        if self.calibration:
            from captioning.show import certainty

            answer |= certainty.of_entry(answer, found, self.calibration, None)
        return answer

    def _opened(self, data: bytes, name: str) -> Image.Image:
        side = 2 * self.bundle.pixels.resized_side
        return images.to_rgb(images.decode(data, name, min_side=side), name)

    def _best(self, image: Image.Image, options: http.Options) -> list[Caption]:
        pixels = self.bundle.pixels(image)[None]
        if self.exported:
            from captioning.model import onnx_captioner

            bundle = dataclasses.replace(
                self.bundle, decoding=dataclasses.replace(self.bundle.decoding, **_own(options))
            )
            return onnx_captioner.best_captions(bundle, bundle.pixels.normalise(pixels), options.alternatives)[0]
        import torch

        from captioning.model import explain

        values = self.bundle.pixels.normalise(torch.from_numpy(pixels).to(self.bundle.model.device))
        with _decoding(self.bundle.model.generation_config, _own(options)):
            return explain.best_captions(self.bundle, values, options.alternatives)[0]

    def _answer(self, source: str | Path, name: str, asked: Mapping[str, Any] | None) -> Answer:
        from captioning.show import certainty

        explanation = sure = ""
        try:
            bundle = self._asked(asked)
            image = self._opened(images.read_bytes(source, public=self.public), name)
            if self.exported:
                with self.turn:
                    found = self._best(image, http.Options(alternatives=self.alternatives))
            else:
                from captioning.model import explain

                with self.turn:
                    explained = explain.explain(bundle, image, self.alternatives, self.layers)
                words = certainty.explained(explained.words, self.calibration)
                found, explanation = explained.alternatives, _explanation(image, explained, words)
            if self.calibration:
                sure = f"Confidence: {100 * certainty.confidence(found[0], self.calibration):.0f} %"
                words = certainty.words(bundle, found[0], self.calibration)
                if doubtful := [word["text"] for word in words if word["doubtful"]]:
                    sure += f"; doubtful: {', '.join(doubtful)}"
        except InputError as error:
            message = cli.printable(str(error)).replace("--", "") if asked else cli.printable(str(error))
            return Answer(message=f"{message[:1].upper()}{message[1:]}.")
        picture = f'<div class="shown">{_picture(image, SHOWN_SIDE, "The image that is captioned")}</div>'
        return Answer(found[0].text, _alternatives(found), explanation, picture=picture, sure=cli.printable(sure))


def _own(options: http.Options) -> dict[str, int]:
    """The settings of the search that a request asks for."""
    return {name: value for name in ("num_beams", "max_new_tokens") if (value := getattr(options, name))}


@contextlib.contextmanager
def _decoding(config: Any, settings: dict[str, int]) -> Iterator[None]:
    """A model's generation settings with others for a while."""
    usual = {name: getattr(config, name) for name in settings}
    for name, value in settings.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in usual.items():
            setattr(config, name, value)


def _alternatives(captions: Sequence[Caption]) -> str:
    rows = "".join(
        f'<li><span dir="auto">{html.escape(cli.printable(caption.text))}</span> '
        f"<small>{in_words(captions[0].score - caption.score)}</small></li>"
        for caption in captions[1:]
    )
    return f'<h2>Other captions</h2><ol class="alternatives">{rows}</ol>' if rows else ""


def in_words(worse: float) -> str:
    """How likely a caption is beside the best one, whose score is higher by `worse`."""
    return next((words for most, words in IN_WORDS if worse <= most), "much less likely")


def _explanation(image: Image.Image, explanation: Explanation, words: Sequence[Mapping[str, Any]]) -> str:
    left, top, right, bottom = explanation.region
    width, height = image.size
    seen = image.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    seen.thumbnail((CELL_SIDE, CELL_SIDE))
    cells = []
    for word in words:
        percent = f"{100 * word['probability']:.0f} %"
        text = html.escape(cli.printable(word["text"]))
        picture = _picture(pages.highlight(seen, word["attention"]), CELL_SIDE, f"Where the model looked for {text}")
        meter = f'<meter min="0" max="1" value="{word["probability"]:.3f}">{percent}</meter>'
        doubt = "<br><em>doubtful</em>" if word["doubtful"] else ""
        cells.append(
            f'<figure>{picture}<figcaption><b dir="auto">{text}</b><br>{meter} {percent}{doubt}</figcaption></figure>'
        )
    return (
        "<h2>Word by word</h2><p>Orange: where the model looked more than elsewhere when it chose the word. "
        "Bar: how probable it found the word, given the words before it.</p>"
        f'<div class="words">{"".join(cells)}</div>'
    )


def _picture(image: Image.Image, side: int, alt: str) -> str:
    """An `img` that holds its picture, its longer side `side` pixels at most; `alt` is HTML already."""
    image = image.copy()
    image.thumbnail((side, side))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=85)
    return f'<img alt="{alt}" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _fields(gradio: Any, wishes: Wishes) -> dict[str, Any]:
    """What a visitor can ask for, by the name in `Wishes`; every name of ASKED."""
    with gradio.Row():
        prefix = gradio.Textbox(wishes.prefix, label="Begins with", placeholder="A photo of")
        case = gradio.Dropdown(list(CASES), value=wishes.case, label="Letter case")
    with gradio.Row():
        min_words, max_words, max_characters = (
            gradio.Number(value or 0, label=label, precision=0, minimum=0, info="0: no limit")
            for value, label in (
                (wishes.min_words, "Words at least"),
                (wishes.max_words, "Words at most"),
                (wishes.max_characters, "Characters at most"),
            )
        )
    with gradio.Row():
        must = gradio.Textbox(", ".join(wishes.must), label="With the words", placeholder="dog, red")
        without = gradio.Textbox(", ".join(wishes.without), label="Without the words", placeholder="man, woman")
    with gradio.Row():
        temperature = gradio.Slider(
            0, 2, value=wishes.temperature or 0, step=0.1, label="Temperature", info="0: the best caption"
        )
        seed = gradio.Number(wishes.seed, label="Seed", precision=0, minimum=0, info="with a temperature")
    fields = (prefix, case, min_words, max_words, max_characters, must, without, temperature, seed)
    return dict(zip(ASKED, fields, strict=True))


def make_page(captioner: Captioner):
    """The Gradio page, not yet served."""
    import gradio

    def shown(answer: Answer):
        message = f'<p class="message" role="alert">{html.escape(answer.message)}</p>' if answer.message else ""
        return (
            gradio.update(value=message, visible=bool(message)),
            gradio.update(value=answer.picture, visible=bool(answer.picture)),
            answer.caption,
            gradio.update(value=html.escape(answer.sure), visible=bool(answer.sure)),
            answer.alternatives,
            answer.explanation,
        )

    with gradio.Blocks(title="Image captioner", analytics_enabled=False) as page:
        gradio.Markdown("# Image captioner")
        with gradio.Row():
            with gradio.Column():
                upload = gradio.File(label="An image: drop it here", file_types=["image"], height=140)
                url = gradio.Textbox(label="Or its address", placeholder="https://...", elem_id="url")
                button = gradio.Button("Write a caption", variant="primary", elem_id="go")
                picture = gradio.HTML(visible=False, elem_id="picture")
            with gradio.Column():
                message = gradio.HTML(visible=False, elem_id="message")
                caption = gradio.Textbox(
                    label="Caption, to copy as alt text",
                    lines=2,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="caption",
                )
                sure = gradio.HTML(visible=False, elem_id="sure")
                wishes = None if captioner.exported else captioner.bundle.wishes
                # Exported folders write captions as they are.
                with gradio.Accordion("As you ask for it", open=bool(wishes), visible=not captioner.exported):
                    fields = _fields(gradio, wishes or Wishes())
                alternatives = gradio.HTML(elem_id="alternatives")
        explanation = gradio.HTML(elem_id="explanation")

        # One limit for all: the model does one thing at a time, and the queue shows who waits.
        rules: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        shows = [message, picture, caption, sure, alternatives, explanation]
        more = list(fields.values())

        def asked(values: Sequence[Any]) -> dict[str, Any]:
            return dict(zip(fields, values, strict=True))

        def of_file(path: str, *values: Any):
            return (*shown(captioner.file(path, asked(values))), "")

        def of_address(address: str, *values: Any):
            return (*shown(captioner.address(address, asked(values))), None)

        def of_either(path: str | None, address: str | None, *values: Any):
            return shown(captioner.either(path, address, asked(values)))

        # The other input is emptied: the page shows one image's caption.
        upload.upload(of_file, [upload, *more], [*shows, url], **rules)
        url.submit(of_address, [url, *more], [*shows, upload], **rules)
        button.click(of_either, [upload, url, *more], shows, **rules)
    return page.queue(max_size=http.Limits().waiting)


def check_gradio() -> None:
    """Raise InputError where Gradio is not installed; at once, before a model is loaded.

    It is not imported yet: that takes seconds, and reads settings that `serve` makes first.
    """
    if importlib.util.find_spec("gradio") is None:
        raise InputError("--serve needs Gradio, which is not installed: pip install gradio")


def make_app(captioner: Captioner, access: http.Access, port: int, limits: http.Limits | None = None) -> Any:
    """The page and `POST /caption` behind their guard, as an ASGI application."""
    import gradio

    app = http.make_app(captioner, limits, public=captioner.public)
    app = gradio.mount_gradio_app(
        app,
        make_page(captioner),
        path="/",
        server_name=access.host,
        server_port=port,
        footer_links=[],
        ssr_mode=False,
        max_file_size=(limits or http.Limits()).body_bytes,
        # Fonts of the system: the default theme fetches its own from the network.
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
    )
    return http.guarded(app, access, limits)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        InputError: the address cannot be listened on.
    """
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
        made.listen(2048)
    except OSError as error:
        raise InputError(f"--port {port} on --host {host} cannot be listened on; name another ({error})") from None
    return made


def serve(
    bundle: Bundle | OnnxBundle,
    access: http.Access,
    port: int,
    alternatives: int = 0,
    layers: Sequence[int] | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Serve the page and `POST /caption` until Ctrl-C.

    Raises:
        InputError: the address cannot be listened on.
    """
    with tempfile.TemporaryDirectory(prefix="captioning-") as folder:
        # Before Gradio is imported, which reads them.
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads; gone when the page is
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        captioner = Captioner(bundle, alternatives, layers, not access.local, calibration)
        with listen(access.host, port) as listening:
            server = http.make_server(make_app(captioner, access, port), timeout_graceful_shutdown=2)
            name = f"[{access.host}]" if ":" in access.host else access.host
            if not access.local:
                cli.note(
                    "whoever has the token can use the page; for them it fetches from the internet only, not from this "
                    "machine or local networks"
                )
            cli.note(f"listening on http://{name}:{port}, also for POST /caption (see /docs); Ctrl-C ends it")
            server.run(sockets=[listening])
