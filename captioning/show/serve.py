"""A page in the browser: drop an image or paste its address, get a caption and where the model looked.

    serve(bundle, host="127.0.0.1", port=7860)

Needs Gradio, which nothing else here does. What a visitor gives is read as on the command line, with the same limits
and the same messages; one request is answered at a time.
"""

from __future__ import annotations

import base64
import html
import io
import ipaddress
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from captioning import InputError, cli
from captioning.data import images
from captioning.model import explain
from captioning.model.captioner import Bundle
from captioning.model.parts import resized_side
from captioning.show import pages

CSS = """
.message { border-left: 4px solid #c2410c; padding: .4rem .8rem; }
.words { overflow-x: auto; }
.words img { width: 100%; min-width: 700px; max-width: 1040px; border-radius: 6px; background: #fff; }
.alternatives, .alternatives * { border: none !important; }
.alternatives td, .alternatives th { padding: .2rem 1.2rem .2rem 0 !important; text-align: left; }
"""


LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Guard:
    """Answers requests to this page alone, and from it alone: ASGI middleware.

    A site that the user visits may send requests to the page (another origin), or may let its own name lead to this
    machine (DNS rebinding), and then read what the page answers. The browser tells both.

    Args:
        app: what answers the others.
        host: what the page listens on.
    """

    def __init__(self, app, host: str):
        self.app = app
        self.open = host not in LOOPBACK
        self.names = {"localhost", host.lower()}
        if self.open:
            own = socket.gethostname().lower()
            self.names |= {own, f"{own.partition('.')[0]}.local", socket.getfqdn().lower()}

    async def __call__(self, scope, receive, send):
        if scope["type"] not in ("http", "websocket") or self.allows(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": b"This page answers to its own address only."})

    def allows(self, headers: Sequence[tuple[bytes, bytes]]) -> bool:
        """Whether a request names this page, and comes from it or from no page."""
        told = [(name.lower(), value.decode("latin-1").strip().lower()) for name, value in headers]

        def values(wanted: bytes) -> list[str]:
            return [value for name, value in told if name == wanted]

        hosts = values(b"host")
        if len(hosts) != 1 or not self._is_own(hosts[0]):
            return False
        if any(origin.partition("://")[2] != hosts[0] for origin in values(b"origin")):
            return False
        # Somebody else's page may link to this one, and do no more.
        linked = values(b"sec-fetch-mode") == ["navigate"]
        return linked or all(site in ("same-origin", "none") for site in values(b"sec-fetch-site"))

    def _is_own(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
            if name in self.names:
                return True
            # A number is nobody's name. Any other name may be somebody's, and lead here.
            return ipaddress.ip_address(name).is_loopback or self.open
        except ValueError:
            return False


@dataclass
class Answer:
    """What the page shows: text, and HTML with every caption escaped."""

    caption: str = ""
    alternatives: str = ""
    explanation: str = ""
    message: str = ""  # what is wrong, if anything is


class Captioner:
    """Answers one request at a time; whoever comes second waits.

    Args:
        bundle: its model stands on its device.
        alternatives: how many of the best captions to show; 0: as many as the model's beams.
        layers: as in `explain.explain`.
        public: fetch from the internet only, for visitors who need not be the user of this machine.
    """

    def __init__(
        self, bundle: Bundle, alternatives: int = 0, layers: Sequence[int] | None = None, public: bool = False
    ):
        self.bundle = bundle
        self.public = public
        # As many as its beams cost nothing, and leave the caption what it is without them.
        self.alternatives = alternatives or bundle.model.generation_config.num_beams or 1
        self.layers = layers
        self.turn = threading.Lock()

    def file(self, path: str | None) -> Answer:
        """Caption an uploaded file, named by its path on this machine."""
        if not path:
            return Answer()
        return self._answer(Path(path), Path(path).name)

    def address(self, url: str | None) -> Answer:
        """Caption the image at an http(s) address; anything else, such as a path on this machine, is refused."""
        url = (url or "").strip()
        if not re.match(r"https?://", url, re.IGNORECASE):
            return Answer(message="Paste the address of an image: it begins with http:// or https://.")
        return self._answer(url, url)

    def _answer(self, source: str | Path, name: str) -> Answer:
        try:
            side = 2 * resized_side(self.bundle.image_processor)
            image = images.to_rgb(
                images.decode(images.read_bytes(source, public=self.public), name, min_side=side), name
            )
            with self.turn:
                explanation = explain.explain(self.bundle, image, self.alternatives, self.layers)
        except InputError as error:
            message = cli.printable(str(error))
            return Answer(message=f"{message[:1].upper()}{message[1:]}.")
        return Answer(
            explanation.caption.text, _alternatives(explanation.alternatives), _explanation(image, explanation)
        )


def _alternatives(captions: Sequence[explain.Caption]) -> str:
    rows = "".join(
        f'<tr><td>{caption.score:.3f}</td><td dir="auto">{html.escape(cli.printable(caption.text))}</td></tr>'
        for caption in captions
    )
    return (
        '<h2>Alternatives</h2><table class="alternatives">'
        '<thead><tr><th scope="col">score</th><th scope="col">caption</th></tr></thead>'
        f"<tbody>{rows}</tbody></table><p>The score is the mean log-probability of a caption's tokens.</p>"
    )


def _explanation(image: Image.Image, explanation: explain.Explanation) -> str:
    words = [vars(word) for word in explanation.words]
    page = pages.explanation_page(image, explanation.caption.text, words, region=explanation.region)
    data = io.BytesIO()
    page.save(data, "JPEG", quality=88)
    said = ", ".join(f"{word.text} {100 * word.probability:.0f} %" for word in explanation.words)
    alt = html.escape(cli.printable(f"Where the model looked, and how probable it found each word: {said}"))
    uri = base64.b64encode(data.getvalue()).decode()
    return f'<h2>Word by word</h2><div class="words"><img alt="{alt}" src="data:image/jpeg;base64,{uri}"></div>'


def make_page(captioner: Captioner):
    """The Gradio page, not yet served."""
    import gradio  # type: ignore[import-not-found]

    def shown(answer: Answer):
        message = f'<p class="message" role="alert">{html.escape(answer.message)}</p>' if answer.message else ""
        return (
            gradio.update(value=message, visible=bool(message)),
            answer.caption,
            answer.alternatives,
            answer.explanation,
        )

    with gradio.Blocks(title="Image captioner", analytics_enabled=False) as page:
        gradio.Markdown("# Image captioner")
        with gradio.Row():
            with gradio.Column():
                upload = gradio.File(label="An image: drop it here", file_types=["image"])
                url = gradio.Textbox(label="Or its address", placeholder="https://...", elem_id="url")
                button = gradio.Button("Caption the address", variant="primary")
            with gradio.Column():
                message = gradio.HTML(visible=False, elem_id="message")
                caption = gradio.Textbox(
                    label="Caption, to copy as alt text",
                    lines=2,
                    interactive=False,
                    buttons=["copy"],
                    elem_id="caption",
                )
                alternatives = gradio.HTML(elem_id="alternatives")
        explanation = gradio.HTML(elem_id="explanation")

        # One limit for all three: the model does one thing at a time, and the queue shows who waits.
        rules = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        shows = [message, caption, alternatives, explanation]
        # The other input is emptied: the page shows one image's caption.
        upload.upload(lambda path: (*shown(captioner.file(path)), ""), upload, [*shows, url], **rules)
        for event in (button.click, url.submit):
            event(lambda address: (*shown(captioner.address(address)), None), url, [*shows, upload], **rules)
    return page


def check_gradio() -> None:
    """Raise InputError where Gradio is not installed; at once, before a model is loaded."""
    try:
        import gradio  # noqa: F401 (is it there?)
    except ImportError:
        raise InputError("--serve needs Gradio, which is not installed: pip install gradio") from None


def serve(bundle: Bundle, host: str, port: int, alternatives: int = 0, layers: Sequence[int] | None = None) -> None:
    """Serve the page until Ctrl-C.

    Raises:
        InputError: Gradio is missing, or the address cannot be listened on.
    """
    with tempfile.TemporaryDirectory(prefix="captioning-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads; gone when the page is
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        check_gradio()
        import gradio  # type: ignore[import-not-found]
        from starlette.middleware import Middleware  # type: ignore[import-not-found]  # Gradio brings it

        page = make_page(Captioner(bundle, alternatives, layers, public=host not in LOOPBACK))
        # Fonts of the system: the default theme fetches its own from the network.
        theme = gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=images.MAX_BYTES,
                footer_links=[],
                ssr_mode=False,
                theme=theme,
                css=CSS,
                app_kwargs={"middleware": [Middleware(Guard, host=host)]},
            )
        except OSError as error:
            raise InputError(f"--port {port} on --host {host} cannot be listened on; name another ({error})") from None
        try:
            if host not in LOOPBACK:
                cli.note(
                    "everybody who reaches this machine can use the page; for them it fetches from the internet only, "
                    "not from this machine or local networks"
                )
            cli.note(f"listening on http://{host}:{port}; Ctrl-C ends it")
            while True:
                time.sleep(3600)
        finally:
            page.close(verbose=False)
