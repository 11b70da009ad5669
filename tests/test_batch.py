"""Rows -> tensors: one end token, masking by length, packing, and pixels equal to the image processor's own."""

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from captioning.data import folder
from captioning.model import packing, parts
from captioning.training import batches

CAPTIONS = ["a dog runs", "a dog runs on the grass", "dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return parts.train_tokenizer(CAPTIONS * 3, 400)


def rows(*groups):
    return [
        {"image_id": 10 + i, "pixels": np.full((3, 4, 4), i, np.uint8), "labels": labels}
        for i, labels in enumerate(groups)
    ]


def test_every_caption_ends_in_exactly_one_eos(tokenizer):
    labels, truncated = folder.encode_captions(tokenizer, [*CAPTIONS, "", "a <|endoftext|> dog"], 100)
    eos = tokenizer.eos_token_id
    assert truncated == 0
    assert [ids.count(eos) for ids in labels] == [1] * 5
    assert all(ids[-1] == eos for ids in labels)
    assert labels[3] == [eos]


def test_truncation_keeps_the_eos(tokenizer):
    full, _ = folder.encode_captions(tokenizer, CAPTIONS, 100)
    cut, truncated = folder.encode_captions(tokenizer, CAPTIONS, 4)
    assert truncated == 1
    assert cut[1] == [*full[1][:3], tokenizer.eos_token_id]
    assert cut[0] == full[0]  # three words and the end: exactly 4


def test_padding_is_masked_by_length_and_eos_is_not():
    # Padding and end token are the same id, as in GPT-2.
    one_per_row = batches.Collator(start_token_id=0, pad_token_id=0, packed=False)(rows([[5, 6, 0], [7, 0]], [[8, 0]]))
    assert one_per_row["labels"].tolist() == [[5, 6, 0], [7, 0, -100], [8, 0, -100]]
    assert one_per_row["decoder_input_ids"].tolist() == [[0, 5, 6], [0, 7, 0], [0, 8, 0]]
    assert one_per_row["pixel_values"][:, 0, 0, 0].tolist() == [0, 0, 1]
    assert one_per_row["image_of_row"].tolist() == [0, 0, 1]


def test_packing_puts_all_captions_of_an_image_in_one_row():
    packed = batches.Collator(start_token_id=9, pad_token_id=0)(rows([[5, 6, 0], [7, 0]], [[8, 0]]))
    assert packed["labels"].tolist() == [[5, 6, 0, 7, 0], [8, 0, -100, -100, -100]]
    assert packed["decoder_input_ids"].tolist() == [[9, 5, 6, 9, 7], [9, 8, 0, 0, 0]]
    assert packed["decoder_position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]]
    assert packed["segment_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]]
    assert packed["image_id"].tolist() == [10, 11]


def test_the_mask_is_causal_within_a_caption_and_never_empty():
    mask = packing.packed_attention_mask(torch.tensor([[0, 0, 1, 1, -1]]))[0, 0]
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=3),
        BitImageProcessorPil(size={"shortest_edge": 40}, crop_size={"height": 36, "width": 36}, resample=3),
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        ViTImageProcessorPil(size={"height": 32, "width": 32}, do_normalize=False),
    ],
    ids=["vit", "vit-small", "dinov2", "clip", "not-normalised"],
)
def test_pixels_equal_the_image_processor(processor):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (57, 75, 3), dtype=np.uint8))
    pixels = parts.Pixels(processor)
    array = pixels(image)
    assert array.dtype == np.uint8
    ours = pixels.normalise(torch.from_numpy(array)[None])
    theirs = processor(image, return_tensors="pt").pixel_values
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_rows_of_a_prepared_folder(prepared):
    processor = parts.load_image_processor(prepared)
    split = load_from_disk(str(prepared))["train"]
    row = batches.CaptionDataset(folder.Split(split), parts.Pixels(processor))[3]
    assert row["image_id"] == split[3]["image_id"]
    assert row["labels"] == split[3]["labels"]
    expected = processor(split[3]["image"], do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
    assert (row["pixels"] == expected).all()


def test_length_sampler_gives_every_image_once_with_little_padding_and_repeatably():
    rng = np.random.default_rng(0)
    # As in COCO: five captions of 8 to 16 tokens; some images have one.
    lengths = [int(rng.integers(8, 17, rng.choice([1, 5], p=[0.3, 0.7])).sum()) for _ in range(1003)]
    sampler = batches.LengthSampler(lengths, 16, seed=1)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert sorted(orders[-1]) == list(range(epoch * 1003, (epoch + 1) * 1003))
    assert orders[0] == orders[2] != orders[1]
    assert sampler.padding() < 0.1
    # The least sorting that achieves it: half the window would not.
    assert sampler.window > 1
    sampler.window //= 2
    assert sampler.padding() >= 0.1
    assert batches.LengthSampler([12] * 100, 16, seed=1).window == 1, "nothing to gain, nothing is sorted"
    # Batches do not come in the order of their length.
    firsts = [lengths[i] for i in orders[0][::16]]
    assert firsts != sorted(firsts) and abs(np.corrcoef(firsts, range(len(firsts)))[0, 1]) < 0.5


def test_without_sorting_the_order_is_random_and_every_image_comes_once():
    sampler = batches.LengthSampler(range(1, 101), 10, seed=0, sort=False)
    assert sampler.window == 1
    order = list(sampler)
    assert sorted(order) == list(range(100)) != order
    assert np.ptp(np.reshape(order, (10, 10)), axis=1).mean() > 70, "lengths as unlike as chance makes them"


def test_an_augmented_image_depends_on_seed_epoch_and_image_alone(prepared):
    rows = folder.load_prepared(prepared)[0]["train"].select(range(6))
    pixels = parts.Pixels(parts.load_image_processor(prepared))
    dataset = batches.CaptionDataset(rows, pixels, augment=True, seed=1)
    plain = batches.CaptionDataset(rows, pixels)
    first = [dataset[index]["pixels"] for index in range(6)]
    assert all(np.array_equal(a, plain[index]["pixels"]) for index, a in enumerate(first)), "the first epoch sees all"
    later = {(epoch, index): dataset[6 * epoch + index]["pixels"] for epoch in (1, 2) for index in range(6)}
    again = batches.CaptionDataset(rows.select([4]), pixels, augment=True, seed=1)
    assert np.array_equal(again[2]["pixels"], later[2, 4]), "whatever the other images are"
    assert not np.array_equal(later[1, 4], later[2, 4])
    assert not np.array_equal(batches.CaptionDataset(rows, pixels, True, 2)[6 * 2 + 4]["pixels"], later[2, 4])
    assert later[1, 0].shape == first[0].shape and later[1, 0].dtype == np.uint8


def test_an_image_whose_id_is_below_zero_has_variants_too(prepared, monkeypatch):
    rows = folder.load_prepared(prepared)[0]["train"].select(range(1))
    pixels = parts.Pixels(parts.load_image_processor(prepared))
    dataset = batches.CaptionDataset(rows, pixels, augment=True, seed=1)
    seen = {}
    for image_id in (-7, 7, 2**40):
        monkeypatch.setattr(type(rows), "labelled", lambda split, row, id=image_id: {"image_id": id, "labels": []})
        seen[image_id] = dataset[3]["pixels"]
        if image_id > 0:
            rng = np.random.default_rng((1, 3, image_id))
            expected = pixels(batches.augmented(rows.image(0), rng, dataset.may_mirror(rows.captions_of(0))))
            assert np.array_equal(seen[image_id], expected), "those of ids above are as ever"
    assert not np.array_equal(seen[-7], seen[7])


def test_only_images_whose_captions_name_no_side_are_mirrored():
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 64, dtype=np.uint8)[None, :, None], (64, 1, 3)))

    def mirrored(may_mirror):
        variants = [batches.augmented(gradient, np.random.default_rng(seed), may_mirror) for seed in range(40)]
        assert all(variant.size == gradient.size for variant in variants)
        return sum(np.asarray(variant)[:, 0].mean() > np.asarray(variant)[:, -1].mean() for variant in variants)

    assert 10 <= mirrored(True) <= 30
    assert mirrored(False) == 0
    may_mirror = batches.CaptionDataset([], None, augment=True).may_mirror
    assert may_mirror(["a bright light", "a dog"])
    assert not may_mirror(["a dog", "Квадрат слева."])
    assert not batches.CaptionDataset([], None, augment=True, mirror=False).may_mirror(["a dog"])


def test_images_in_their_order_are_augmented_too():
    sampler = batches.LengthSampler([3, 1, 2], 2, seed=0, shuffle=False)
    sampler.set_epoch(2)
    assert list(sampler) == [6, 7, 8], "the third epoch's variants, in the images' order"


def test_an_update_is_the_same_however_it_is_cut_into_batches():
    rng = np.random.default_rng(3)
    lengths = rng.integers(8, 90, 203).tolist()
    updates = []
    for batch_size, accumulation in ((16, 1), (8, 2), (4, 4), (2, 8)):
        sampler = batches.LengthSampler(lengths, batch_size, seed=5, accumulation=accumulation)
        sampler.set_epoch(1)
        order = list(sampler)
        updates.append([set(order[start : start + 16]) for start in range(0, len(order), 16)])
    assert all(other == updates[0] for other in updates[1:])


def test_the_images_that_fill_no_update_are_not_the_longest():
    lengths = list(range(1, 104))  # 6 whole updates of 16, and 7 images
    sampler = batches.LengthSampler(lengths, 16, seed=0)
    assert sampler.window > 1
    last = []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        last += [lengths[index % 103] for index in list(sampler)[-7:]]
    assert np.mean(last) == pytest.approx(np.mean(lengths), rel=0.05)


def test_an_epoch_can_end_with_a_whole_batch(prepared):
    sampler = batches.LengthSampler([4] * 10, 6, seed=0, fill=True)
    order = list(sampler)
    assert len(order) == len(sampler) == 12 and order[10:] == [batches.FILLER] * 2
    assert sorted(order[:10]) == list(range(10))
    split = folder.load_prepared(prepared)[0]["train"].select(range(3))
    dataset = batches.CaptionDataset(split, parts.Pixels(parts.load_image_processor(prepared)))
    for packed in (True, False):
        collate = batches.Collator(start_token_id=0, pad_token_id=0, packed=packed)
        filled, plain = collate([dataset[1], dataset[batches.FILLER]]), collate([dataset[1]])
        assert torch.equal(filled["labels"][filled["labels"] != -100], plain["labels"][plain["labels"] != -100])
        alone = collate([dataset[batches.FILLER]] * 2)
        assert len(alone["label_positions"]) == 0 and alone["labels"].shape[1] == 1
