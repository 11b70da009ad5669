"""The page in the browser: its answers, its limits, and the page itself in a real one."""

import http.client
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, free_port, hears_ctrl_c, run, script
from httpserver import Server, body, status
from PIL import Image

from captioning import InputError
from captioning.data import images
from captioning.model import explain
from captioning.model.captioner import load
from captioning.show import serve


@pytest.fixture(scope="module")
def bundle(trained):
    return load(trained)


@pytest.fixture(scope="module")
def photo(prepared):
    return next((prepared / "sample" / "test2014").glob("*.jpg"))


@pytest.fixture
def captioner(bundle):
    return serve.Captioner(bundle)


def test_a_file_and_its_address_get_the_caption_of_the_command_line(captioner, trained, photo, monkeypatch, capsys):
    answer = captioner.file(str(photo))
    capsys.readouterr()
    assert run("inference", [f"--model_path={trained}", "--image_path", photo, "--device=cpu"], monkeypatch) == 0
    assert answer.caption == capsys.readouterr().out.strip() != "" and answer.message == ""
    assert answer.alternatives.count("<li>") == 3 - 1  # as many as the model has beams, the caption aside
    assert "likely" in answer.alternatives and not re.search(r"-?\d\.\d", answer.alternatives), "in words"
    assert answer.explanation.count('alt="Where the model looked for') == len(answer.caption.split())
    for part in (answer.explanation, answer.picture):
        assert "data:image/jpeg;base64," in part
    with Server({"/photo.jpg": body(photo.read_bytes())}) as server:
        assert captioner.address(f"  {server.url('/photo.jpg')} ").caption == answer.caption


def test_what_cannot_be_captioned_is_said_in_a_sentence(captioner, tmp_path):
    (tmp_path / "notes.jpg").write_text("hello")
    answer = captioner.file(str(tmp_path / "notes.jpg"))
    assert "notes.jpg" in answer.message and str(tmp_path) not in answer.message
    assert (answer.caption, answer.alternatives, answer.explanation) == ("", "", "")
    assert captioner.file(None) == serve.Answer()
    with Server({"/gone.jpg": status(404)}) as server:
        assert "404" in captioner.address(server.url("/gone.jpg")).message


@pytest.mark.parametrize("address", ["", None, "/etc/passwd", "file:///etc/passwd", "ftp://x/y.jpg", "x http://a/b"])
def test_only_addresses_of_the_web_are_fetched(captioner, address, monkeypatch):
    monkeypatch.setattr(images, "read_bytes", lambda *_, **__: pytest.fail("read"))
    assert "begins with http://" in captioner.address(address).message


def test_the_limits_are_those_of_the_command_line(captioner, tmp_path, monkeypatch):
    Image.new("RGB", (300, 300)).save(tmp_path / "large.png")
    monkeypatch.setitem(images.MAX_PIXELS, "PNG", 1000)
    assert "too large for a PNG image" in captioner.file(str(tmp_path / "large.png")).message
    with Server({"/big": body(bytes(5000))}) as server:
        monkeypatch.setattr(images.read_bytes, "__kwdefaults__", {"max_bytes": 1000, "timeout": 5, "deadline": 5})
        assert "more than 1,000 bytes" in captioner.address(server.url("/big")).message


def test_a_visitor_asks_for_captions_of_its_own_kind(captioner, photo):
    nothing = {**dict.fromkeys(serve.ASKED), "case": "as-is", "must": "", "without": " ,", "max_words": 0, "seed": 0}
    plain = captioner.file(str(photo))
    assert captioner.file(str(photo), nothing) == plain and plain.caption
    first = plain.caption.split()[0]
    asked = {"prefix": "A photo of", "case": "sentence", "max_words": 6.0, "without": f"zebra, {first}"}
    answer = captioner.file(str(photo), nothing | asked)
    assert answer.message == "" and re.fullmatch(r"A photo of [^A-Z]+\.", answer.caption)
    assert len(answer.caption.split()) <= 6 and first not in answer.caption.lower().split()[3:]
    refused = captioner.file(str(photo), nothing | {"must": "dog", "without": "dog"}).message
    assert "dog" in refused and "--" not in refused


def test_captions_are_escaped(captioner, photo, monkeypatch):
    odd = '<script>"\x1b'
    found = explain.explain(captioner.bundle, images.open_image(photo), 2)
    for caption in found.alternatives:
        caption.text = odd
    for word in found.words:
        word.text = odd
    monkeypatch.setattr(explain, "explain", lambda *_: found)
    answer = captioner.file(str(photo))
    assert answer.caption == odd  # Gradio's text box shows text
    for part in (answer.alternatives, answer.explanation):
        assert "<script" not in part and "\x1b" not in part and "&lt;script&gt;&quot;" in part


def test_a_second_request_waits_its_turn(captioner, photo, monkeypatch):
    running, most = [], []
    real = explain.explain

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        try:
            return real(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr(explain, "explain", watched)
    threads = [threading.Thread(target=captioner.file, args=(str(photo),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_without_gradio_it_says_what_to_install(trained, monkeypatch):
    import inference

    monkeypatch.setitem(sys.modules, "gradio", None)  # what an import of a missing package ends in
    with pytest.raises(InputError, match=r"^--serve needs Gradio, which is not installed: pip install gradio$"):
        inference.main([f"--model_path={trained}", "--serve"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--serve", "--image_path", "x.jpg"], "--image_path has no use with --serve"),
        (["--serve", "--json"], "--json has no use with --serve"),
        (["--serve", "--port", "70000"], "--port 70000 is not between"),
        (["--image_path", "x.jpg", "--port", "8000"], "--port needs --serve"),
        (["--image_path", "x.jpg", "--host", "0.0.0.0"], "--host needs --serve"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    import inference

    with pytest.raises(SystemExit):
        inference.main(arguments)
    assert message in capsys.readouterr().err


# ---- in a browser


@pytest.fixture(scope="module")
def page_address(trained):
    """The page, served by the script as a user would."""
    for package in ("gradio", "playwright"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install gradio playwright")
    if chromium() is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    port = free_port()
    command = [sys.executable, ROOT / "inference.py", f"--model_path={trained}", "--serve", f"--port={port}"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    for line in process.stderr:
        if "listening on" in line:
            break
    else:
        pytest.fail(f"it ended with {process.wait()}")
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "") and "Traceback" not in err


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def page(page_address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 1000})
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(30_000)
        page.goto(page_address)
        page.locator("#url textarea, #url input").first.wait_for()
        yield page
        if folder := os.environ.get("SCREENSHOTS"):
            page.screenshot(path=f"{folder}/{os.environ['PYTEST_CURRENT_TEST'].split('::')[1].split(' ')[0]}.png")
        browser.close()


@pytest.mark.slow
def test_upload_caption_explanation_copy(page, trained, photo):
    page.locator("input[type=file]").set_input_files(str(photo))
    caption = page.locator("#caption textarea")
    page.wait_for_function("document.querySelector('#caption textarea').value")
    expected = script("inference.py", f"--model_path={trained}", "--image_path", photo).stdout.strip()
    assert caption.input_value() == expected
    page.locator("#explanation img").first.wait_for()
    assert page.evaluate("document.querySelector('#picture img').naturalWidth") > 0, "what was dropped is shown"
    assert expected.split()[0] in page.locator("#explanation img").first.get_attribute("alt")
    assert page.locator("#alternatives li").count() == 2
    page.locator("#caption button").first.click()
    page.wait_for_timeout(300)
    assert page.evaluate("navigator.clipboard.readText()") == expected


@pytest.mark.slow
def test_a_bad_file_and_a_bad_address_show_a_readable_message(page, tmp_path, photo):
    (tmp_path / "notes.jpg").write_text("hello")
    page.locator("input[type=file]").set_input_files(str(tmp_path / "notes.jpg"))
    message = page.locator("#message [role=alert]")
    message.wait_for()
    assert (
        "notes.jpg" in message.inner_text()
        and "not a JPEG, PNG, WEBP, GIF, BMP, TIFF, AVIF or JPEG 2000 image" in message.inner_text()
    )
    box = page.locator("#url textarea, #url input").first
    box.fill("/etc/passwd")
    box.press("Enter")
    page.get_by_text("it begins with http://").wait_for()
    # And a good one after that clears it.
    with Server({"/photo.jpg": body(photo.read_bytes())}) as server:
        box.fill(server.url("/photo.jpg"))
        box.press("Enter")
        page.locator("#explanation img").first.wait_for()
    assert page.locator("#caption textarea").input_value()
    assert page.locator("#message [role=alert]").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_scrolls_sideways(page, photo, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("input[type=file]").set_input_files(str(photo))
    page.locator("#explanation img").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


@pytest.mark.slow
def test_one_button_takes_the_address_or_says_what_is_missing(page, photo):
    button = page.get_by_role("button", name="Write a caption")
    button.click()
    page.get_by_text("Drop an image first").wait_for()
    with Server({"/photo.jpg": body(photo.read_bytes())}) as server:
        page.locator("#url textarea, #url input").first.fill(server.url("/photo.jpg"))
        button.click()
        page.locator("#explanation img").first.wait_for()
    assert page.locator("#caption textarea").input_value()


@pytest.mark.slow
def test_a_caption_as_it_is_asked_for(page, photo):
    caption, button = page.locator("#caption textarea"), page.get_by_role("button", name="Write a caption")
    page.locator("input[type=file]").set_input_files(str(photo))
    page.wait_for_function("document.querySelector('#caption textarea').value")
    plain = caption.input_value()
    page.get_by_text("As you ask for it").click()
    assert page.locator("input:invalid").count() == 0
    most = page.get_by_label("Words at most")
    most.fill("5")
    page.get_by_label("Begins with").fill("A photo of")
    button.click()
    page.wait_for_function("document.querySelector('#caption textarea').value.startsWith('A photo of')")
    assert 3 < len(caption.input_value().split()) <= 5
    most.fill("0")
    page.get_by_label("Begins with").fill("")
    button.click()
    page.wait_for_function("!document.querySelector('#caption textarea').value.startsWith('A photo of')")
    assert caption.input_value() == plain


@pytest.mark.slow
def test_nothing_but_the_page_itself_is_served_to_this_machine(page_address, page):
    host, port = page_address.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    for path in ("/file=/etc/passwd", "/gradio_api/file=/etc/passwd", f"/gradio_api/file={ROOT / 'README.md'}"):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status in (403, 404), path
    with pytest.raises(OSError):  # not on the machine's other addresses
        socket.create_connection((socket.gethostbyname(socket.gethostname()), int(port)), timeout=2).close()
        if socket.gethostbyname(socket.gethostname()).startswith("127."):
            raise OSError("this machine has no other address")


# ---- in a container


def test_the_dockerfile_copies_and_runs_what_is_there(tmp_path, monkeypatch):
    import inference

    text = (ROOT / "captioning" / "show" / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (\S+) ", text, re.MULTILINE)
    assert copied and all((ROOT / name).exists() for name in copied)
    pinned = dict(re.findall(r"([\w-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text()))
    installed = dict(re.findall(r"([\w-]+)==([\w.]+)", text))
    assert {"onnxruntime", "gradio", "numpy", "pillow"} <= installed.keys() and "torch" not in installed
    assert {name: pinned.get(name, version) for name, version in installed.items()} == installed
    command = json.loads(re.search(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[1])
    assert command[:2] == ["python", "inference.py"] and command[-2:] == ["--model_path", "/model"]
    monkeypatch.delenv("CAPTIONING_TOKEN", raising=False)
    monkeypatch.setattr(serve, "check_gradio", lambda: None)
    with pytest.raises(InputError, match="choose a password"):  # its flags are known, and others need a token
        inference.main([*command[2:-1], str(tmp_path)])
