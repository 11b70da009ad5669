"""The page that captions in the browser: what is handed out, and in Chromium the captions of inference.py."""

import hashlib
import http.client
import importlib.util
import re
import shutil
import threading

import pytest
from conftest import ROOT, run, shared_folder
from PIL import Image, ImageDraw

from captioning import InputError
from captioning.data import images
from captioning.show import in_browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def folder(tmp_path):
    """An exported folder and a runtime, as far as a server looks at them."""
    (tmp_path / "exported" / "onnx").mkdir(parents=True)
    for name in ("config.json", "onnx/encoder_model.onnx", "secret.txt"):
        (tmp_path / "exported" / name).write_text(name)
    for name in in_browser.RUNTIME_FILES.values():
        (tmp_path / "runtime" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runtime" / name).write_text(name)
    return tmp_path


def test_only_the_page_the_model_and_the_runtime_are_handed_out(folder):
    server = in_browser.make_server(folder / "exported", "127.0.0.1", 0, folder / "runtime")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def get(path, host="127.0.0.1"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=5)
        connection.request("GET", path, headers={"Host": host})
        answer = connection.getresponse()
        content = answer.read().decode()
        connection.close()
        return answer.status, content, dict(answer.getheaders())

    try:
        code, content, headers = get("/?dtype=q8")
        assert code == 200 and content == in_browser.PAGE.read_text()
        assert headers["Content-Security-Policy"].startswith("default-src 'self'")
        assert not any(name.lower().startswith("access-control") for name in headers)
        assert get("/model/onnx/encoder_model.onnx")[:2] == (200, "onnx/encoder_model.onnx")
        assert get("/runtime/transformers.min.js")[2]["Content-Type"] == "text/javascript"
        for path in (
            "/secret.txt",
            "/model/secret.txt",
            "/model/../secret.txt",
            "/model/%2e%2e/x",
            "//etc/passwd",
            "/x",
        ):
            assert get(path)[0] == 404, path
        assert get("/", host="rebound.example.com")[0] == 403
    finally:
        server.shutdown()
        server.server_close()


def test_without_the_runtime_one_sentence_says_how_to_install_it(folder):
    with pytest.raises(InputError, match="npm install --prefix captioning/show/web"):
        in_browser.files(folder / "exported", folder / "nothing")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "--in_browser"], "--in_browser needs an exported folder"),
        (["photo.jpg", "--in_browser"], "--in_browser needs --serve"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, tmp_path, monkeypatch, capsys):
    assert run("inference", [f"--model_path={tmp_path}", *arguments], monkeypatch) == 2
    assert message in capsys.readouterr().err


def pictures(folder):
    """20 photographs, of COCO and Flickr8k where they are; drawn ones otherwise."""
    if shared := shared_folder():
        return [
            *sorted((shared / "flickr8k" / "images").glob("*.jpg"))[:5],
            *sorted((shared / "coco2014" / "val2014").glob("*.jpg"))[:15],
        ]
    for number in range(20):
        picture = Image.new("RGB", (300 + 11 * number, 200 + 7 * number), (12 * number, 90, 255 - 12 * number))
        for place in range(40):
            ink = tuple(hashlib.sha256(bytes([number, place])).digest()[:3])
            ImageDraw.Draw(picture).ellipse((9 * place, 5 * place % 199, 9 * place + 60, 5 * place % 199 + 40), ink)
        picture.save(folder / f"{number}.jpg", quality=90)
    return sorted(folder.glob("*.jpg"))


@pytest.mark.slow
def test_in_chromium_the_captions_are_those_of_inference(trained, tmp_path):
    missing = [
        name for name in ("playwright", "onnx", "onnxruntime", "onnxscript") if not importlib.util.find_spec(name)
    ]
    if missing or CHROMIUM is None:
        pytest.skip(f"needs pip install {' '.join(missing)}, and Chromium: apt-get install chromium")
    if not (in_browser.RUNTIME / in_browser.RUNTIME_FILES["transformers.min.js"]).is_file():
        pytest.skip(f"needs the runtime of the page: {in_browser.INSTALL}")
    from playwright.sync_api import sync_playwright

    from captioning.model import onnx_captioner, onnx_export

    onnx_export.export(trained, tmp_path / "exported")
    bundle = onnx_captioner.load(tmp_path / "exported")
    (tmp_path / "photos").mkdir()
    server = in_browser.make_server(tmp_path / "exported", "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    elsewhere = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_default_timeout(60_000)
        own = (f"http://127.0.0.1:{server.server_address[1]}/", "blob:", "data:")
        page.on("request", lambda request: None if request.url.startswith(own) else elsewhere.append(request.url))
        page.goto(f"{own[0]}?dtype=fp32")
        status = page.locator("#status")
        page.locator("#status", has_text="Ready").wait_for()
        for photo in pictures(tmp_path / "photos"):
            pixels = bundle.pixels(images.open_image(photo, min_side=2 * bundle.pixels.resized_side))
            expected = onnx_captioner.generate(bundle, bundle.pixels.normalise(pixels[None]))[0]
            page.locator("input").set_input_files(str(photo))
            page.locator("#status", has_text=re.compile("seconds|cannot")).wait_for()
            assert page.locator("#caption").inner_text() == expected, (photo, status.inner_text())
        (tmp_path / "notes.jpg").write_text("hello")
        page.locator("input").set_input_files(str(tmp_path / "notes.jpg"))
        page.locator("#status", has_text="cannot be captioned").wait_for()
        browser.close()
    server.shutdown()
    assert not elsewhere, "nothing is loaded from elsewhere"


def test_the_runtime_is_pinned_and_never_committed():
    assert re.search(
        r'"@huggingface/transformers": "\d+\.\d+\.\d+"', (in_browser.PAGE.parent / "package.json").read_text()
    )
    assert "node_modules/" in (ROOT / ".gitignore").read_text().splitlines()
