"""Encoders and decoders from the hub, in the layouts that they have there: fetched, read whole, trained, kept."""

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from coco import coco_folder, photographs
from conftest import ROOT
from forked import FORKS, Training
from httpserver import reply
from hub import (
    CAPTIONER,
    CLIP,
    DINOV2,
    DISTILGPT2,
    GPT2,
    MOVED,
    SWIN,
    TOKENIZER_FILES,
    VIT,
    WORDS,
    Hub,
    ask,
    gated,
    repositories,
)
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

from captioning.model import captioner, parts
from captioning.model.weights import is_cross_attention


@pytest.fixture(scope="module")
def hub():
    with Hub(repositories()) as server:
        yield server


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A COCO 2014 of 24 images."""
    root = tmp_path_factory.mktemp("coco2014")
    words = WORDS.split()
    captions = {i: [" ".join(words[i % 9 : i % 9 + 5]), " ".join(words[-i % 9 :])] for i in range(1, 25)}
    coco_folder(root, {i: captions[i] for i in range(1, 17)}, {i: captions[i] for i in range(17, 25)})
    photographs(root / "train2014", [f"COCO_train2014_{i:012d}.jpg" for i in range(1, 17)])
    photographs(root / "val2014", [f"COCO_val2014_{i:012d}.jpg" for i in range(17, 25)])
    return root


def fork(script: str, arguments: list, environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """Run a script that asks the hub of an environment; its exit code, and what it said."""
    log = folder / f"{script}.log"
    process = Training(arguments, log, functools.partial(ask, environment), script=script)
    return process.wait(), process.said()


def arrived(name: str) -> dict[str, torch.Tensor]:
    """What a captioner's file is to hold of a repository's weights, by the names there: all that is not of other tasks.

    CLIP's last layer is left out on purpose.
    """
    found = {}
    for stored, tensor in repositories()[name].tensors.items():
        if name in (GPT2, DISTILGPT2):
            if not re.search(r"\.attn\.(masked_)?bias$|^lm_head", stored):
                found["decoder.transformer." + stored.removeprefix("transformer.")] = tensor
        elif not re.search(r"^classifier|^text_|^visual_|^logit_|_index$|position_ids$|^vision.*layers\.2\.", stored):
            found["encoder." + stored.removeprefix("swin.")] = tensor
    return found


# ---- the README's three commands


def run(command: str, folder: Path, environment: dict[str, str], *more) -> subprocess.CompletedProcess:
    """Run one of the README's commands in a folder, with further flags."""
    name, *flags = command.partition("#")[0].split()[1:]
    words = [sys.executable, str(ROOT / name), *flags, *map(str, more)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=settings, timeout=240)


@pytest.fixture(scope="module")
def three_steps(hub, coco, tmp_path_factory):
    """The folder that the README's three commands ran in, what they said, and the requests made until each ended."""
    folder = tmp_path_factory.mktemp("user")
    readme = (ROOT / "README.md").read_text()
    commands = re.search(r"## Three steps\n+```\n(.*?)```", readme, re.DOTALL)[1].splitlines()
    Image.effect_noise((90, 70), 80).convert("RGB").save(folder / "photo.jpg")
    more = [["--coco_dir", coco, "--num_proc", 1], ["--epochs", 1, "--disable_tqdm", "true"], []]
    said, requests = [], [0]
    for command, flags in zip(commands, more, strict=True):
        assert "--encoder" not in command and "--decoder" not in command
        done = run(command, folder, hub.environment(folder / "home"), *flags)
        assert done.returncode == 0, done.stderr
        said.append(done)
        requests.append(len(hub.requests))
    return folder, said, requests


def test_the_three_commands_of_the_readme_run_with_the_default_encoder_and_decoder(three_steps):
    folder, (prepared, trained, captioned), _ = three_steps
    assert f"images are stored with a shorter side of 37 px at most, for {VIT}" in prepared.stderr
    assert re.search(r"tokenizer: \d+ tokens, gpt2", prepared.stderr)
    assert f"model: {VIT} -> gpt2" in trained.stderr
    assert len(captioned.stdout.splitlines()) == 1
    results = json.loads((folder / "vit-gpt2-coco" / "results.json").read_text())
    assert (results["model"]["encoder"], results["model"]["decoder"]) == (VIT, "gpt2")
    # What was fetched moves gently, and what is new does not.
    assert results["learning_rates"] == {"encoder": 2e-5, "decoder": 1e-4, "cross_attention": 1e-3}
    assert ModelCard.load(folder / "vit-gpt2-coco" / "README.md").data.base_model == [VIT, "gpt2"]
    # Neither its own settings for texts nor those of its configuration reach captions.
    assert not results["decoding"].get("do_sample") and results["decoding"]["max_new_tokens"] < 40


def test_after_a_short_training_the_weights_are_near_those_of_the_hub(three_steps):
    stored = load_file(three_steps[0] / "vit-gpt2-coco" / "model.safetensors")
    wanted = arrived(VIT) | arrived(GPT2)
    assert all(is_cross_attention(name) for name in stored.keys() - wanted.keys())
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, atol=2e-3, rtol=0)
    assert any(not torch.equal(stored[name], wanted[name]) for name in wanted if name.startswith("encoder."))


def test_only_what_is_needed_is_fetched(hub, three_steps):
    _, _, (start, prepared, trained, captioned) = three_steps
    assert hub.fetched(VIT, start, prepared) == {"config.json", "preprocessor_config.json"}
    texts = {name for name in hub.repositories[GPT2].files if name.endswith((".json", ".txt")) and "/" not in name}
    assert hub.fetched(GPT2, start, prepared) == texts and set(TOKENIZER_FILES) < texts
    for name in (VIT, GPT2):
        assert hub.fetched(name, prepared, trained) == {"model.safetensors"}
    assert captioned == trained, "a run folder needs no hub"


# ---- every weight


def build_and_train(encoder: str, decoder: str, folder: Path) -> dict:
    """Assemble a captioner and save it, train it for a step, save and load it again."""
    torch.manual_seed(0)
    tokenizer = parts.load_tokenizer(decoder)
    model, new = captioner.assemble(encoder, decoder, tokenizer)
    bundle = captioner.Bundle(model, tokenizer, parts.load_image_processor(encoder, whole=True))
    captioner.save(bundle, folder / "built")
    pictures = [Image.effect_noise((60, 50), 90).convert("RGB") for _ in range(3)]
    pixels = bundle.pixels.normalise(torch.from_numpy(np.stack([bundle.pixels(picture) for picture in pictures])))
    labels = torch.tensor([tokenizer("a small dog runs")["input_ids"] + [tokenizer.eos_token_id]] * 3)
    loss = model(pixel_values=pixels, labels=labels).loss
    loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    captioner.save(bundle, folder / "trained")
    loaded = captioner.load(folder / "trained").model.state_dict()
    return {
        "new": new,
        "loss": loss.item(),
        "idle": {name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()},
        "lost": {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, loaded[name])},
    }


@pytest.fixture(scope="module")
def with_hub(hub, tmp_path_factory):
    """A process that asks the stub."""
    environment = hub.environment(tmp_path_factory.mktemp("home"))
    with ProcessPoolExecutor(1, mp_context=FORKS, initializer=ask, initargs=(environment,)) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=120)


@pytest.mark.parametrize(
    ("encoder", "decoder"),
    [(VIT, "gpt2"), (SWIN, "distilgpt2"), (DINOV2, GPT2), (CLIP, "distilgpt2")],
    ids=["vit gpt2", "swin distilgpt2", "dinov2 gpt2", "clip distilgpt2"],
)
def test_every_weight_arrives(encoder, decoder, hub, with_hub, tmp_path):
    start = len(hub.requests)
    result = with_hub(build_and_train, encoder, decoder, tmp_path)
    stored = load_file(tmp_path / "built" / "model.safetensors")
    wanted = arrived(encoder) | arrived(MOVED.get(decoder, decoder))
    assert len(wanted) > 50
    assert stored.keys() - wanted.keys() == result["new"] and all(map(is_cross_attention, result["new"]))
    differing = [name for name, tensor in wanted.items() if not torch.equal(stored[name], tensor)]
    assert not differing
    assert np.isfinite(result["loss"]) and not result["lost"]
    # A key's bias shifts all scores of a query alike, which a softmax does not see.
    assert not [name for name in result["idle"] if not name.endswith("k_proj.bias")]
    fetched = hub.fetched(encoder, start)
    assert not any(name.endswith((".h5", ".msgpack")) for name in fetched)
    pickles = {name for name in fetched if name.endswith(".bin")}
    assert len(pickles) == (2 if encoder == SWIN else 0)


def test_a_captioner_of_the_hub_captions_and_is_trained_on(hub, three_steps, tmp_path):
    folder, start = three_steps[0], len(hub.requests)
    environment = hub.environment(tmp_path / "home")
    named = f"--model_path={CAPTIONER}"
    code, said = fork("inference", ["--image_path", folder / "photo.jpg", named], environment, tmp_path)
    assert code == 0, said
    flags = [f"--data_path={folder / 'processed_data'}", f"--output_dir={tmp_path / 'run'}", "--max_steps=1"]
    code, said = fork("train", [*flags, named, "--report_to=none"], environment, tmp_path)
    assert code == 0, said
    texts = {name for name in hub.repositories[CAPTIONER].files if name.endswith((".json", ".txt"))}
    assert hub.fetched(CAPTIONER, start) == texts | {"pytorch_model.bin"}
    stored = load_file(tmp_path / "run" / "model.safetensors")
    masks_and_copies = re.compile(r"\.(attn|crossattention)\.(masked_)?bias$|lm_head")
    wanted = {name: t for name, t in hub.repositories[CAPTIONER].tensors.items() if not masks_and_copies.search(name)}
    assert stored.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, atol=2e-3, rtol=0)


# ---- a hub that is not there, goes away, or refuses


def lines(said: str) -> list[str]:
    """What a terminal shows in the end: without progress bars."""
    return [line.rpartition("\r")[2] for line in said.splitlines() if "|" not in line]


def test_what_was_fetched_once_needs_no_hub_again(three_steps, coco, tmp_path):
    with Hub({}) as gone:
        environment = gone.environment(three_steps[0] / "home")
    data = ["--coco_dir", coco, "--num_proc=1", f"--save_path={tmp_path / 'data'}"]
    code, said = fork("dataloader", data, environment, tmp_path)
    assert code == 0, said
    made, again = (folder / "dataset.json" for folder in (three_steps[0] / "processed_data", tmp_path / "data"))
    assert json.loads(made.read_text()) == json.loads(again.read_text())
    flags = [f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}", "--max_steps=1"]
    code, said = fork("train", [*flags, "--report_to=none"], environment, tmp_path)
    assert code == 0, said
    # Of another encoder nothing is here.
    flags = [f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'other'}", f"--encoder={DINOV2}"]
    code, said = fork("train", flags, environment, tmp_path)
    reason = f"--encoder '{DINOV2}' is not here and the hub is not reachable (LocalEntryNotFoundError); name a local"
    assert code == 2 and lines(said)[-1].startswith(f"train.py: error: {reason}"), said


def test_a_hub_that_goes_away_in_the_middle_is_one_sentence(three_steps, tmp_path):
    with contextlib.ExitStack() as running:
        hub = running.enter_context(Hub(repositories()))
        content = hub.repositories[VIT].files["model.safetensors"]

        def leave(handler):
            reply(handler, content[:5_000], headers={"Content-Length": len(content)})
            threading.Thread(target=running.close).start()

        hub.routes[hub.large(VIT, "model.safetensors")] = leave
        flags = [f"--data_path={three_steps[0] / 'processed_data'}", f"--output_dir={tmp_path / 'run'}"]
        code, said = fork("train", flags, hub.environment(tmp_path / "home"), tmp_path)
    reason = f"--encoder '{VIT}' was not fetched in full: the Hugging Face hub does not answer ("
    assert code == 2 and lines(said)[-1].startswith(f"train.py: error: {reason}"), said
    assert lines(said)[-1].endswith("Error); run the same command again"), said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("encoder", "reason"),
    [
        ("google/vit-giant", "is not on the Hugging Face hub, or is private (RepositoryNotFoundError); name a local"),
        ("gated/encoder", "asks for its terms to be accepted (GatedRepoError); accept them on its page, then run"),
    ],
)
def test_an_id_that_is_unknown_or_gated_is_one_sentence(encoder, reason, coco, tmp_path):
    with Hub({"gated/encoder": repositories()[DINOV2], GPT2: repositories()[GPT2]}) as hub:
        for path in list(hub.routes):
            if path.startswith("/gated/encoder/resolve/"):
                hub.routes[path] = gated("gated/encoder")
        flags = ["--coco_dir", coco, "--encoder", encoder, "--num_proc=1", "--save_path", tmp_path / "data"]
        code, said = fork("dataloader", flags, hub.environment(tmp_path / "home"), tmp_path)
    assert code == 2
    assert lines(said)[-1].startswith(f"dataloader.py: error: --encoder '{encoder}' {reason}"), said
    assert not (tmp_path / "data").exists()


# ---- a tokenizer of old


@pytest.mark.parametrize("files", [TOKENIZER_FILES, TOKENIZER_FILES[:2]], ids=["all files", "the slow one's files"])
def test_gpt2s_own_tokenizer_gives_its_known_tokens(files, shared, tmp_path):
    for name in files:
        (tmp_path / name).write_bytes((shared / "weights" / "gpt2-tokenizer" / name).read_bytes())
    (tmp_path / "config.json").write_bytes(repositories()[GPT2].files["config.json"])
    tokenizer = parts.load_tokenizer(tmp_path)
    assert tokenizer("a dog runs.")["input_ids"] == [64, 3290, 4539, 13]
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (50_257, 50_256, 50_256)
