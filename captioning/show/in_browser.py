"""Serves the page that captions images in the browser itself: the page, the exported folder and the runtime.

    serve(Path("exported"), host="127.0.0.1", port=7860)

The captions are made by the visitor's browser. The server only hands out files, those that are named here.
"""

from __future__ import annotations

import http.server
import shutil
from http import HTTPStatus
from pathlib import Path

from captioning import InputError, cli
from captioning.show.guard import Guard

PAGE = Path(__file__).parent / "web" / "index.html"
RUNTIME = Path(__file__).parent / "web" / "node_modules"
INSTALL = "npm install --prefix captioning/show/web --ignore-scripts"
RUNTIME_FILES = {
    "transformers.min.js": "@huggingface/transformers/dist/transformers.min.js",
    "ort-wasm-simd-threaded.asyncify.mjs": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm": "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript",
    ".mjs": "text/javascript",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
HEADERS = {
    # The page loads from nowhere else, and may use several threads.
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline' 'wasm-unsafe-eval' blob:; "
    "worker-src 'self' blob:; style-src 'unsafe-inline'; img-src blob: data:; connect-src 'self' blob: data:",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def files(exported: Path, runtime: Path = RUNTIME) -> dict[str, Path]:
    """Every path that is served, and its file.

    Raises:
        InputError: the runtime was not installed.
    """
    served = {"/": PAGE, "/index.html": PAGE}
    for name, place in RUNTIME_FILES.items():
        if not (runtime / place).is_file():
            raise InputError(f"--in_browser needs the runtime of the page, which is not installed: {INSTALL}")
        served[f"/runtime/{name}"] = runtime / place
    for file in [*exported.glob("*.json"), *exported.glob("onnx/*.onnx")]:
        served[f"/model/{file.relative_to(exported).as_posix()}"] = file
    return served


def make_server(exported: Path, host: str, port: int, runtime: Path = RUNTIME) -> http.server.ThreadingHTTPServer:
    """A server that listens, and hands out nothing but `files`.

    Raises:
        InputError: the runtime was not installed, or the address cannot be listened on.
    """
    served, guard = files(exported, runtime), Guard(None, host)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        timeout = 30  # seconds for a request line and its headers

        def do_GET(self) -> None:
            name = self.path.split("?")[0]
            if not guard.allows(
                [(name.lower().encode(), value.encode("latin-1")) for name, value in self.headers.items()]
            ):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            file = served.get(name)
            if file is None or not file.is_file():
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            with file.open("rb") as content:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", TYPES.get(file.suffix, "application/octet-stream"))
                self.send_header("Content-Length", str(file.stat().st_size))
                for header, value in HEADERS.items():
                    self.send_header(header, value)
                self.end_headers()
                shutil.copyfileobj(content, self.wfile)

        def log_message(self, *_) -> None:
            """Say nothing of each file."""

    try:
        return http.server.ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise InputError(f"--port {port} on --host {host} cannot be listened on; name another ({error})") from None


def serve(exported: Path, host: str, port: int, int8: bool) -> None:
    """Serve the page until Ctrl-C."""
    with make_server(exported, host, port) as server:
        cli.note(f"listening on http://{host}:{port}/?dtype={'q8' if int8 else 'fp32'}; Ctrl-C ends it")
        server.serve_forever()
