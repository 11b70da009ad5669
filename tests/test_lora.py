"""Adapters of low rank: what learns, what stays, merged as if they had never been, and going on to the bit."""

import json
import shutil
import sys

import pytest
import torch
from conftest import run
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderModel, set_seed

import inference
import train
from captioning import InputError
from captioning.model import captioner, lora, parts

pytest.importorskip("peft", reason="--lora needs peft: pip install peft")

RANK = 2
MATRICES = ("attn.c_attn.weight", "c_proj.weight", "c_fc.weight")  # and those of the cross-attention


def write_decoder(data, folder, **settings):
    """A GPT-2 that counts as pretrained: weights in a folder, with the tokenizer of the data."""
    tokenizer = parts.load_tokenizer(data)
    set_seed(1)
    shape = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, **settings}
    GPT2LMHeadModel(GPT2Config(**shape, vocab_size=len(tokenizer))).save_pretrained(folder)
    parts.save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(few, tmp_path_factory):
    return write_decoder(few, tmp_path_factory.mktemp("decoder"))


def words(few, decoder, folder, *more):
    return [
        f"--data_path={few}",
        f"--output_dir={folder}",
        f"--decoder={decoder}",
        f"--lora={RANK}",
        "--epochs=2",
        "--per_device_train_batch_size=8",
        "--generation_max_length=8",
        "--save_total_limit=10",
        "--metric_for_best_model=loss",
        "--greater_is_better=True",  # so that the first checkpoint is the best one, which is read back at the end
        "--use_cpu",
        "--bf16=False",
        "--dataloader_num_workers=0",
        *more,
    ]


@pytest.fixture(scope="module")
def undisturbed(few, gpt2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train.main(words(few, gpt2, folder)) == 0
    return folder


def adapted(few, gpt2) -> captioner.Bundle:
    """A captioner with adapters that have learnt something."""
    tokenizer = parts.load_tokenizer(few)
    model = captioner.build("tiny", str(gpt2), tokenizer)
    lora.add(model, RANK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    return captioner.Bundle(model.eval(), tokenizer, parts.load_image_processor("tiny"))


# ---- the model


def test_merged_weights_give_the_logits_of_weights_with_adapters(few, gpt2, tmp_path):
    bundle = adapted(few, gpt2)
    model = bundle.model
    inputs = {"pixel_values": torch.rand(2, 3, 64, 64), "decoder_input_ids": torch.randint(0, 99, (2, 7))}
    with torch.no_grad():
        before = model(**inputs).logits
        lora.merge(model)
        torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-5, atol=1e-5)
        captioner.save(bundle, tmp_path)
        plain, told = VisionEncoderDecoderModel.from_pretrained(tmp_path, output_loading_info=True)
        torch.testing.assert_close(plain.eval()(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    assert not any(told.values()), "no weight is missing, none has no place"


def test_adapters_change_nothing_before_they_learn(few, gpt2):
    tokenizer = parts.load_tokenizer(few)
    model = captioner.build("tiny", str(gpt2), tokenizer).eval()
    names = set(model.state_dict())
    inputs = {"pixel_values": torch.rand(2, 3, 64, 64), "decoder_input_ids": torch.randint(0, 99, (2, 7))}
    with torch.no_grad():
        before = model(**inputs).logits
        new = lora.add(model, RANK)
        assert torch.equal(model(**inputs).logits, before)
    assert lora.merged(model).keys() == names and lora.rank_of(model) == RANK
    # Queries, keys and values at once, the projection after them, and the two matrices of the feed-forward layer
    assert len(new) == 2 * 4 * model.decoder.config.n_layer
    assert captioner.count_parameters(model.decoder)[1] == sum(
        weight.numel() for name, weight in model.decoder.named_parameters() if "lora_" in name or "cross" in name
    )


def test_a_decoder_without_matrices_and_a_rank_above_its_matrices_are_refused(few, gpt2, tmp_path):
    tokenizer = parts.load_tokenizer(few)
    with pytest.raises(InputError, match=r"--lora 33 is above 32, the rank of the decoder's own matrices"):
        lora.add(captioner.build("tiny", str(gpt2), tokenizer), 33)
    model = captioner.build("tiny", str(gpt2), tokenizer)
    model.decoder.transformer.h = torch.nn.ModuleList()
    with pytest.raises(InputError, match="--lora needs a decoder with attention and feed-forward matrices"):
        lora.add(model, RANK)


# ---- training


def test_the_decoder_s_matrices_change_by_their_rank_and_nothing_else_of_it_does(gpt2, undisturbed):
    weights, before = (load_file(folder / "model.safetensors") for folder in (undisturbed, gpt2))
    for name, tensor in before.items():
        change = weights[f"decoder.{name}"] - tensor
        if name.endswith(MATRICES):
            assert torch.linalg.matrix_rank(change, rtol=1e-3) == RANK, name
        else:
            assert not change.any(), name


def test_a_trained_folder_is_as_any_other(few, undisturbed, capsys):
    model, told = VisionEncoderDecoderModel.from_pretrained(undisturbed, output_loading_info=True)
    assert not any(told.values()) and not any("lora" in name for name in model.state_dict())
    assert not (undisturbed / lora.FILE).exists()
    said = [f"--data_path={few}", "--split=validation", "--device=cpu"]
    assert all(
        inference.main([f"--model_path={path}", *said]) == 0 for path in (undisturbed, undisturbed / "checkpoint-6")
    )
    results = json.loads((undisturbed / "results.json").read_text())
    assert results["recipe"]["lora"] == RANK and results["learning_rates"]["decoder"] == 1e-3
    assert results["step"] == 3
    first = results["evaluations"][0]
    assert results["validation"]["loss"] == pytest.approx(first["loss"], rel=1e-5), "merged as the adapters were"
    kept, best = (load_file(folder / "model.safetensors") for folder in (undisturbed, undisturbed / "checkpoint-3"))
    assert kept.keys() == best.keys() and all(torch.equal(kept[name], best[name]) for name in kept)


def test_a_run_that_goes_on_ends_as_an_undisturbed_one(few, gpt2, undisturbed, tmp_path):
    checkpoint = undisturbed / "checkpoint-3"
    assert train.main(words(few, gpt2, tmp_path, f"--resume_from_checkpoint={checkpoint}")) == 0
    for name in ("model.safetensors", "checkpoint-6/model.safetensors", f"checkpoint-6/{lora.FILE}"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes(), name


def test_a_run_goes_on_with_its_rank_its_decoder_and_its_adapters_only(few, gpt2, undisturbed, tmp_path, capsys):
    checkpoint = shutil.copytree(undisturbed / "checkpoint-3", tmp_path / "checkpoint-3")
    go_on = f"--resume_from_checkpoint={checkpoint}"

    def refused(*more, decoder=gpt2, leave_out="nothing"):
        arguments = [word for word in words(few, decoder, tmp_path / "run", go_on, *more) if leave_out not in word]
        with pytest.raises(InputError) as error:
            train.main(arguments)
        return str(error.value)

    assert "(decoder by adapters of rank 2 and enc_to_dec_proj and encoder, now decoder and" in refused(
        leave_out="--lora"
    )
    assert "now decoder by adapters of rank 1" in refused("--lora=1")
    other = shutil.copytree(gpt2, tmp_path / "other")
    write_decoder(few, other, initializer_range=0.1)
    assert "is of a run with another decoder under its adapters, and a run goes on" in refused(decoder=other)
    (checkpoint / lora.FILE).unlink()
    assert "is not one of this training" in refused()


def test_sampled_captions_kept_features_and_recomputed_activations_go_with_adapters(few, undisturbed, tmp_path):
    """And a captioner to start from; only the adapters and the cross-attention learn."""
    data = shutil.copytree(few, tmp_path / "data")
    more = ["--freeze_encoder", "--cache_features", "--self_critical_epochs=1", "--activation_checkpointing"]
    start = [word for word in words(data, "", tmp_path / "run", *more) if "--decoder" not in word]
    assert train.main([*start, f"--model_path={undisturbed}", "--learning_rate=3e-3"]) == 0
    last = tmp_path / "run" / "checkpoint-6"
    assert any("reward" in entry for entry in json.loads((last / "trainer_state.json").read_text())["log_history"])
    before, first, now = (
        load_file(path / "model.safetensors") for path in (undisturbed, last.with_name("checkpoint-3"), last)
    )
    changing = {
        name for name in now if name.endswith(MATRICES) or "cross" in name or name.startswith("enc_to_dec_proj")
    }
    changing = {name for name in changing if not name.startswith("encoder.")}
    for earlier, later in ((before, first), (first, now)):
        assert {name for name in now if not torch.equal(earlier[name], later[name])} == changing


# ---- what is refused before anything is loaded


def test_without_peft_one_sentence_says_what_to_install(few, gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run("train", words(few, gpt2, tmp_path / "run"), monkeypatch) == 2
    assert "train.py: error: --lora needs peft, which is not installed: pip install peft" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--decoder=tiny"],
            "--lora adapts a decoder that has learnt already, and --decoder 'tiny' starts from random",
        ),
        (
            ["--activation_checkpointing", '--activation_checkpointing_kwargs={"use_reentrant":true}'],
            "--lora cannot learn with use_reentrant",
        ),
    ],
)
def test_what_adapters_cannot_go_with_is_refused(more, message, few, gpt2, tmp_path, monkeypatch, capsys):
    assert run("train", words(few, gpt2, tmp_path / "run", *more), monkeypatch) == 2
    assert message in capsys.readouterr().err
