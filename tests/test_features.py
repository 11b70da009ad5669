"""Cached features equal live ones, are never stale, and survive an interruption."""

import contextlib
import copy
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train
from captioning import InputError
from captioning.data.folder import load_prepared
from captioning.model import captioner, packing, parts
from captioning.training import batches, features
from captioning.training.arguments import read


@pytest.fixture
def bundle_and_data(prepared):
    tokenizer = parts.load_tokenizer(prepared)
    torch.manual_seed(0)
    bundle = captioner.Bundle(
        captioner.build("tiny", "tiny", tokenizer), tokenizer, parts.load_image_processor(prepared)
    )
    rows = load_prepared(prepared)[0]["validation"].select(range(21))
    return bundle, batches.CaptionDataset(rows, parts.Pixels(bundle.image_processor))


def compute(bundle, dataset, folder, said=None):
    return features.FeatureCache(bundle, folder, 4, ([] if said is None else said).append).features(
        dataset, "validation"
    )


def test_cached_features_are_the_live_ones_in_float16(bundle_and_data, tmp_path):
    bundle, dataset = bundle_and_data
    said = []
    cached = compute(bundle, dataset, tmp_path, said)
    assert cached[0].dtype == np.float16
    with torch.inference_mode():
        for index in (0, 7, 20):
            pixels = dataset.pixels.normalise(torch.from_numpy(dataset.image(index))[None])
            live = bundle.model.encoder.eval()(pixel_values=pixels).last_hidden_state[0]
            # One batch size computes sums in another order than the next: half a float16 step at most.
            np.testing.assert_allclose(cached[index].astype(np.float32), live.numpy(), atol=4e-3)
    assert "MB" in said[0], "the size is said before it is written"
    # The second time they are read.
    again = compute(bundle, dataset, tmp_path, said)
    assert np.array_equal(cached, again) and said[-1].startswith("features: validation from ")


def test_on_a_cpu_features_are_computed_a_few_at_a_time_whatever_batch_is_asked_for(
    bundle_and_data, tmp_path, monkeypatch
):
    """So machines with other batch sizes write the same bytes, as well."""
    bundle, dataset = bundle_and_data
    encode, sizes = features.FeatureCache.encode, []

    def counted(cache, images):
        sizes.append(len(images))
        return encode(cache, images)

    monkeypatch.setattr(features.FeatureCache, "encode", counted)
    arrays = []
    for size in (16, 64):
        cache = features.FeatureCache(bundle, tmp_path / str(size), size, print)
        arrays.append(np.array(cache.features(dataset, "validation")))
    assert sizes == 2 * [1, 8, 8, 5], "one image tells the shape"
    assert np.array_equal(*arrays)


def test_loss_with_cached_features_equals_the_live_loss(bundle_and_data, tmp_path):
    bundle, dataset = bundle_and_data
    collate = batches.Collator(bundle.model.config.decoder_start_token_id, 0)
    losses = []
    for cached in (None, compute(bundle, dataset, tmp_path)):
        dataset.features = () if cached is None else [cached]
        inputs = collate([dataset[index] for index in range(6)])
        mask = packing.packed_attention_mask(inputs["segment_ids"])
        if cached is None:
            images = {"pixel_values": dataset.pixels.normalise(inputs["pixel_values"])}
        else:
            images = {"encoder_outputs": (inputs["features"].float(),)}
        logits = bundle.model.eval()(
            **images,
            decoder_input_ids=inputs["decoder_input_ids"],
            decoder_attention_mask=mask,
            decoder_position_ids=inputs["decoder_position_ids"],
        ).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten()).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_other_weights_images_or_preprocessing_are_other_files(bundle_and_data, tmp_path):
    bundle, dataset = bundle_and_data
    cache = features.FeatureCache(bundle, tmp_path, 4, print)
    names = {cache.fingerprint(dataset)}
    with torch.no_grad():
        next(bundle.model.encoder.parameters()).add_(1e-3)
    names.add(cache.fingerprint(dataset))
    bundle.image_processor.image_mean = [0.4, 0.5, 0.5]
    names.add(cache.fingerprint(dataset))
    dataset.split = dataset.split.select(range(20))
    names.add(cache.fingerprint(dataset))
    assert len(names) == 4


def test_parts_and_their_blocks_are_read_as_one_array():
    whole = np.arange(11 * 2, dtype=np.float16).reshape(11, 2, 1)
    blocks = [features.Joined([whole[:4], whole[4:5]]), features.Joined([whole[5:8], whole[8:11]])]
    assert np.array_equal(features.Joined(blocks), whole)


def test_more_blocks_than_a_process_may_open_files(bundle_and_data, tmp_path, monkeypatch):
    """COCO 2014 has 480 blocks for each variant; many systems let a process open 1,024 files, or 256."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    bundle, dataset = bundle_and_data
    undisturbed = compute(bundle, dataset, tmp_path / "undisturbed")
    monkeypatch.setattr(features, "BLOCK", 1)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 10, limit[1]))
    try:
        cached = compute(bundle, dataset, tmp_path / "blocks")
        assert len(cached.parts) == 21
        for index in (0, 20, 7):
            # One image by itself is summed in another order than four: half a float16 step at most.
            np.testing.assert_allclose(cached[index].astype(np.float32), undisturbed[index], atol=4e-3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)


def test_features_of_an_earlier_version_are_used(bundle_and_data, tmp_path):
    bundle, dataset = bundle_and_data
    cached, said = np.array(compute(bundle, dataset, tmp_path)), []
    (block,) = tmp_path.glob("*.npy")
    block.unlink()
    np.save(tmp_path / block.name.replace(".000000.", "."), cached)
    assert np.array_equal(compute(bundle, dataset, tmp_path, said), cached)
    assert said[0].startswith("features: validation from ") and len(said) == 1


def test_an_interrupted_computation_goes_on_where_it_stopped(bundle_and_data, tmp_path, monkeypatch):
    bundle, dataset = bundle_and_data
    monkeypatch.setattr(features, "BLOCK", 4)
    undisturbed = compute(bundle, dataset, tmp_path / "undisturbed")
    decode, seen = batches.CaptionDataset.image, []

    def interrupted(self, index, variant=0):
        if index == 13:
            raise KeyboardInterrupt
        return decode(self, index, variant)

    monkeypatch.setattr(batches.CaptionDataset, "image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute(bundle, dataset, tmp_path / "resumed")
    assert len(list((tmp_path / "resumed").glob("*.npy"))) == 3
    monkeypatch.setattr(
        batches.CaptionDataset,
        "image",
        lambda self, index, variant=0: seen.append(index) or decode(self, index, variant),
    )
    resumed = compute(bundle, dataset, tmp_path / "resumed")
    assert np.array_equal(resumed, undisturbed)
    assert seen == [0, *range(12, 21)], "the first image tells the shape; the others go on after three whole blocks"
    assert {path.suffix for path in (tmp_path / "resumed").iterdir()} == {".npy"}


def test_what_another_machine_may_be_writing_is_left_alone(bundle_and_data, tmp_path):
    """Its processes are not known here, and on some disks its locks do not hold here."""
    bundle, dataset = bundle_and_data
    compute(bundle, dataset, tmp_path)
    (block,) = tmp_path.glob("*.npy")
    block.unlink()
    new, old = (tmp_path / f".999999999.0000000{number}.{block.name}" for number in range(2))
    for part in (new, old):
        part.touch()
    os.utime(old, times=(0, time.time() - 2 * features.ABANDONED))
    compute(bundle, dataset, tmp_path)
    assert sorted(tmp_path.iterdir()) == [new, block]


def test_processes_share_the_blocks_and_one_that_dies_is_replaced(bundle_and_data, tmp_path, monkeypatch):
    """Two at work on one folder, a third that stops in the middle: the bytes of one process alone, each block once."""
    bundle, dataset = bundle_and_data
    monkeypatch.setattr(features, "BLOCK", 4)
    alone = compute(bundle, dataset, tmp_path / "alone")
    begun, encode = threading.Barrier(2), features.FeatureCache.encode
    made = {"dies": [], "first": [], "second": []}

    def slow(self, images):
        who = made[threading.current_thread().name]
        if len(images) > 1 or who:  # not the image that tells the shape
            if not who and threading.current_thread().name != "dies":
                begun.wait(60)  # both are in a block of their own
            who.append(len(images))
            if threading.current_thread().name == "dies":
                raise KeyboardInterrupt
        return encode(self, images)

    monkeypatch.setattr(features.FeatureCache, "encode", slow)
    found, shown = {}, dict.fromkeys(made, 0)

    class Bar(contextlib.nullcontext):
        def update(self, images):
            shown[threading.current_thread().name] += images

    monkeypatch.setattr(features.cli, "bar", lambda initial, **_: Bar(Bar()))

    def work(name):
        with contextlib.suppress(KeyboardInterrupt):
            found[name] = compute(copy.deepcopy(bundle), dataset, tmp_path / "shared")

    dies = threading.Thread(target=work, args=("dies",), name="dies")
    dies.start()
    dies.join()
    both = [threading.Thread(target=work, args=(name,), name=name) for name in ("first", "second")]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert np.array_equal(found["first"], alone) and np.array_equal(found["second"], alone)
    assert sorted(made["first"] + made["second"]) == [1, 4, 4, 4, 4, 4], "21 images, each of them once"
    assert shown["first"] == shown["second"] == 21, "a bar counts the images of others too"
    for ours, theirs in zip(
        sorted((tmp_path / "shared").iterdir()), sorted((tmp_path / "alone").iterdir()), strict=True
    ):
        assert ours.name == theirs.name and ours.read_bytes() == theirs.read_bytes()


def test_no_room_is_said_before_anything_is_computed(bundle_and_data, tmp_path, monkeypatch):
    bundle, dataset = bundle_and_data
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match="--cache_features needs"):
        compute(bundle, dataset, tmp_path)


def test_training_on_cached_features_gives_the_live_runs_weights(prepared, tmp_path):
    common = [
        f"--data_path={prepared}",
        "--freeze_encoder",
        "--epochs=1",
        "--per_device_train_batch_size=150",
        "--use_cpu",
        "--bf16=False",
        "--dataloader_num_workers=0",
        "--dataloader_persistent_workers=False",
    ]
    for name, more in (("live", []), ("cached", ["--cache_features"])):
        train.main([*common, f"--output_dir={tmp_path / name}", *more])
    live, cached = (load_file(tmp_path / name / "model.safetensors") for name in ("live", "cached"))
    for name in live:
        if name.startswith("encoder."):
            assert torch.equal(live[name], cached[name])
        else:
            # Adam turns a rounding of the features into up to a full step where a gradient is near zero.
            assert (live[name] - cached[name]).abs().mean() < 1e-4, name


def test_caching_a_moving_encoder_is_refused(prepared, tmp_path, capsys):
    with pytest.raises(SystemExit):
        read([f"--data_path={prepared}", f"--output_dir={tmp_path}", "--cache_features"])
    assert "--cache_features needs --freeze_encoder" in capsys.readouterr().err


def test_variants_are_cached_apart_and_taken_in_turn(bundle_and_data, prepared, tmp_path):
    bundle, plain = bundle_and_data
    rows = load_prepared(prepared)[0]["validation"].select(range(21))
    dataset = batches.CaptionDataset(rows, plain.pixels, augment=True, seed=3)
    cache = features.FeatureCache(bundle, tmp_path, 4, lambda _: None)
    cached = [cache.features(dataset, "validation", variant) for variant in range(3)]
    assert len(list(tmp_path.glob("*.npy"))) == 3
    assert np.array_equal(cached[0], compute(bundle, plain, tmp_path)), "variant 0 is the image as it is"
    dataset.features = cached
    for epoch in range(5):
        assert np.array_equal(dataset[epoch * 21 + 8]["features"], cached[epoch % 3][8])
    live = plain.pixels.normalise(torch.from_numpy(dataset.image(8, 2))[None])
    live = bundle.model.encoder.eval()(pixel_values=live).last_hidden_state[0].detach().numpy()
    np.testing.assert_allclose(cached[2][8].astype(np.float32), live, atol=4e-3)
    other = batches.CaptionDataset(rows, plain.pixels, augment=True, seed=4)
    names = {cache.fingerprint(d, v) for d in (dataset, other) for v in (0, 1, 2)}
    assert len(names) == 5, "variant 0 does not depend on the seed"
    straight = batches.CaptionDataset(rows, plain.pixels, augment=True, seed=3, mirror=False)
    assert cache.fingerprint(straight, 0) == cache.fingerprint(dataset, 0)
    assert cache.fingerprint(straight, 1) not in names, "what is never mirrored is cached apart"
