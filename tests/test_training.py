"""Stage 2: the loss, packing, accumulation, resuming, several processes, and the run folder."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, free_port, script
from datasets import load_from_disk
from PIL import Image
from safetensors.torch import load_file
from toy import Rows, make_trainer, toy_tokenizer
from transformers import Seq2SeqTrainingArguments, TrainerCallback, set_seed

import train
from captioning import InputError
from captioning.data.folder import encode_captions
from captioning.model import captioner, parts
from captioning.model.caption import ranked
from captioning.model.captioner import part_of
from captioning.model.packing import can_pack, decoder_mask
from captioning.scores.reward import CiderReward
from captioning.training import self_critical
from captioning.training.arguments import (
    length,
    read,
    start_missing_processes,
    training_argument_types,
    training_arguments,
)
from captioning.training.loss import caption_loss
from captioning.training.self_critical import SelfCritical
from captioning.training.trainer import Patience


@pytest.fixture(scope="module")
def tokenizer():
    return toy_tokenizer()


def loss_and_gradients(trainer, rows, **settings):
    trainer.model.train()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(
        trainer.model, trainer.data_collator(rows), num_items_in_batch=settings.get("num_items")
    )
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_loss_is_the_cross_entropy_over_real_tokens():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    labels = torch.tensor([[1, 4, -100], [0, -100, -100]])
    real = [(0, 0, 1), (0, 1, 4), (1, 0, 0)]
    by_hand = [math.log(sum(map(math.exp, logits[r, t].tolist()))) - logits[r, t, k].item() for r, t, k in real]
    assert caption_loss(logits, labels, None).item() == pytest.approx(sum(by_hand) / 3, rel=1e-6)
    assert caption_loss(logits, labels, 12).item() == pytest.approx(sum(by_hand) / 12, rel=1e-6)
    smoothed = [
        0.9 * nll + 0.1 * (math.log(sum(map(math.exp, logits[r, t].tolist()))) - logits[r, t].mean().item())
        for nll, (r, t, _) in zip(by_hand, real, strict=True)
    ]
    assert caption_loss(logits, labels, None, 0.1).item() == pytest.approx(sum(smoothed) / 3, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_and_gradients_equal_the_unpacked_ones(tokenizer, tmp_path, smoothing, attention):
    rows = Rows(tokenizer, 5)
    results = []
    for packed in (True, False):
        trainer = make_trainer(tokenizer, rows, tmp_path, packed, label_smoothing_factor=smoothing)
        trainer.model.set_attn_implementation(attention)
        results.append(loss_and_gradients(trainer, rows.rows))
    (packed_loss, packed_gradients), (loss, gradients) = results
    assert len({len(row["labels"]) for row in rows.rows}) > 2, "the caption counts should be ragged"
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert packed_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_projecting_the_labelled_positions_alone_changes_nothing(tokenizer, tmp_path):
    rows = Rows(tokenizer, 4)
    trainer = make_trainer(tokenizer, rows, tmp_path)
    ours, our_gradients = loss_and_gradients(trainer, rows.rows)
    batch_of_all = trainer.data_collator(rows.rows)
    trainer.model.zero_grad()
    logits = trainer.model(
        pixel_values=trainer.bundle.pixels.normalise(batch_of_all["pixel_values"]),
        decoder_input_ids=batch_of_all["decoder_input_ids"],
        decoder_position_ids=batch_of_all["decoder_position_ids"],
        decoder_attention_mask=decoder_mask(trainer.model, batch_of_all["segment_ids"]),
    ).logits
    plain = caption_loss(logits, batch_of_all["labels"], None)
    plain.backward()
    assert logits.shape[:2] == batch_of_all["labels"].shape
    assert ours == pytest.approx(plain.item(), rel=1e-6)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(our_gradients[name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"bf16": True},
        {"bf16": True, "attention": "eager"},
        {"activation_checkpointing": True},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
        {
            "bf16": True,
            "activation_checkpointing": True,
            "label_smoothing_factor": 0.1,
            "gradient_accumulation_steps": 2,
        },
    ],
    ids=lambda settings: "+".join(settings),
)
def test_packed_training_equals_unpacked_training(tokenizer, tmp_path, settings):
    """Three updates, and the loss and the captions of an evaluation after each."""
    rows = Rows(tokenizer, 8)
    logs = []
    for packed in (True, False):
        trainer = make_trainer(
            tokenizer,
            rows,
            tmp_path / str(packed),
            packed,
            max_steps=3,
            per_device_train_batch_size=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=1e-3,
            **settings,
        )
        trainer.train()
        logs.append(trainer.state.log_history)
    tolerance = 5e-3 if settings.get("bf16") else 1e-4
    for name in ("loss", "eval_loss"):
        packed, unpacked = ([entry[name] for entry in log if name in entry] for log in logs)
        assert len(packed) == 3
        assert packed == pytest.approx(unpacked, rel=tolerance), name
        assert packed[0] > packed[-1], "it should have learnt something"


def test_a_decoder_that_cannot_pack_is_noticed(tokenizer, tmp_path, monkeypatch):
    net = captioner.build("tiny", "tiny", tokenizer)
    assert can_pack(net)
    net.set_attn_implementation("eager")
    assert can_pack(net)
    # A decoder that counts its positions itself, and one whose attention takes no mask for each position
    forward = net.decoder.forward
    monkeypatch.setattr(net.decoder, "forward", lambda **kwargs: forward(**{**kwargs, "position_ids": None}))
    assert not can_pack(net)

    def refuses(**kwargs):
        if kwargs.get("attention_mask") is not None and kwargs["attention_mask"].dim() != 2:
            raise ValueError("a mask of (rows, length) is wanted")
        return forward(**kwargs)

    monkeypatch.setattr(net.decoder, "forward", refuses)
    assert not can_pack(net)


@pytest.mark.parametrize("packed", [True, False])
def test_an_update_does_not_depend_on_gradient_accumulation(tokenizer, tmp_path, packed):
    rows = Rows(tokenizer, 8)
    weights = []
    for size in (8, 4, 2):
        trainer = make_trainer(
            tokenizer,
            rows,
            tmp_path,
            packed,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            max_steps=1,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
        )
        trainer.train()
        weights.append({name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()})
    start = dict(make_trainer(tokenizer, rows, tmp_path).model.named_parameters())
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    for other in weights[1:]:
        for name, weight in weights[0].items():
            torch.testing.assert_close(other[name], weight, atol=1e-5, rtol=1e-4)


def test_eight_images_are_learnt_by_heart_stop_included(tokenizer, tmp_path):
    rows = Rows(tokenizer, 8, captions=(1, 2), seed=3)
    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        max_steps=150,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_steps=10,
    )
    trainer.train()
    metrics = trainer.evaluate()
    assert trainer.predictions == {image_id: captions[0] for image_id, captions in rows.captions.items()}
    assert metrics["eval_loss"] < 0.05
    assert metrics["eval_bleu_4"] == pytest.approx(1, abs=1e-6)
    # "stop included": generation ended by the end token, well before its limit.
    assert trainer.model.generation_config.max_new_tokens > 2 * max(len(row["labels"][0]) for row in rows.rows)


def test_evaluation_counts_each_image_once_and_each_token_once(tokenizer, tmp_path):
    rows = Rows(tokenizer, 7)
    losses = []
    for size, packed in ((7, True), (2, True), (3, False)):
        trainer = make_trainer(tokenizer, rows, tmp_path, packed, per_device_eval_batch_size=size)
        metrics = trainer.evaluate()
        assert set(trainer.predictions) == set(rows.captions)
        losses.append(metrics["eval_loss"])
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)
    loss, _ = loss_and_gradients(trainer, rows.rows)
    assert losses[0] == pytest.approx(loss, rel=1e-5)


def test_the_final_loss_is_that_of_float32(tokenizer, tmp_path):
    """Whatever precision the run was trained and evaluated in."""
    rows = Rows(tokenizer, 6)
    settings = {"attention": "eager", "per_device_train_batch_size": 6}
    half = make_trainer(tokenizer, rows, tmp_path, bf16=True, max_steps=1, **settings)
    half.train()
    found, on_the_way = half.losses_of(rows), half.evaluate()["eval_loss"]
    whole = make_trainer(tokenizer, rows, tmp_path, bf16=False, **settings)
    whole.model.load_state_dict(half.model.state_dict())
    assert found == whole.losses_of(rows)
    loss = sum(found[0].values()) / sum(found[1].values())
    assert loss != on_the_way == pytest.approx(loss, rel=1e-2), "which stays in the precision of the run"


def test_a_part_that_waits_keeps_its_weights_until_its_time(tokenizer, tmp_path):
    rows = Rows(tokenizer, 8)
    moved = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            self.before = {name: weight.detach().clone() for name, weight in model.named_parameters()}

        def on_step_end(self, args, state, control, model=None, **kwargs):
            changed = {part_of(n) for n, weight in model.named_parameters() if not torch.equal(weight, self.before[n])}
            moved.append(changed)

    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        waiting={"encoder": 2, "decoder": 1},
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
    )
    trainer.add_callback(Watch())
    trainer.train()
    everything = {"cross_attention", "decoder", "encoder"}
    assert moved == [{"cross_attention"}] * 2 + [{"cross_attention", "decoder"}] * 2 + [everything] * 2


@pytest.mark.parametrize(
    "settings",
    [{"num_train_epochs": 2}, {"max_steps": 4}, {"num_train_epochs": 2, "gradient_accumulation_steps": 2}],
    ids=["epochs", "steps", "accumulation"],
)
@pytest.mark.parametrize("epochs", [2, 3, math.inf])
def test_a_part_that_waits_beyond_the_end_never_moves(epochs, settings, tokenizer, tmp_path):
    rows = Rows(tokenizer, 8)
    size = 4 // settings.get("gradient_accumulation_steps", 1)
    trainer = make_trainer(
        tokenizer, rows, tmp_path, waiting={"decoder": epochs}, per_device_train_batch_size=size, **settings
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.state.global_step == 4
    moved = {part_of(n) for n, weight in trainer.model.named_parameters() if not torch.equal(weight, before[n])}
    assert moved == {"cross_attention", "encoder"}


@pytest.mark.parametrize(
    ("settings", "epochs", "begin"),
    [
        ({"num_train_epochs": 3}, 1, 3),
        ({"num_train_epochs": 3}, 5, 9),
        ({"max_steps": 7}, 1, 3),
        ({"max_steps": 7}, 3, 7),
        ({"num_train_epochs": 3, "gradient_accumulation_steps": 2}, 1, 2),
        ({"num_train_epochs": 0.5}, 1, 2),
    ],
)
def test_when_a_part_moves_is_known_before_training(settings, epochs, begin, tmp_path):
    args = Seq2SeqTrainingArguments(output_dir=tmp_path, use_cpu=True, per_device_train_batch_size=4, **settings)
    assert length(args, images=10).updates(epochs) == begin
    assert length(args, images=10).updates(math.inf) == length(args, images=10).total


def test_a_rate_that_follows_the_score_waits_for_it_to_rise(few, tmp_path):
    for kind in ("reduce_lr_on_plateau", "greedy"):
        given = [f"--lr_scheduler_type={kind}"]
        assert training_arguments(*read(arguments(few, tmp_path, *given))).lr_scheduler_kwargs["mode"] == "max"
        given.append("--metric_for_best_model=loss")
        assert training_arguments(*read(arguments(few, tmp_path, *given))).lr_scheduler_kwargs["mode"] == "min"


def test_patience_waits_for_the_self_critical_epochs(tokenizer, tmp_path, monkeypatch):
    """Scores fall from the first evaluation on; the last four of eight epochs are self-critical."""
    rows = Rows(tokenizer, 4)
    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        self_critical=SelfCritical(4, CiderReward(rows.captions)),
        num_train_epochs=8,
        per_device_train_batch_size=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="cider_d",
        save_total_limit=1,
    )
    trainer.add_callback(Patience(2, trainer))

    def evaluated(*args, **kwargs):
        metrics = {"eval_cider_d": 1 / trainer.state.global_step, "eval_loss": 1.0}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    trainer.train()
    assert trainer.self_critical_begin() == 4
    assert trainer.state.global_step == 5, "two evaluations of self-critical epochs were no better"


def test_a_learning_rate_that_no_part_has_is_refused(trained, few, tmp_path):
    with pytest.raises(InputError, match="--learning_rate is for parts that start from random weights, and here none"):
        train.main(arguments(few, tmp_path / "run", f"--model_path={trained}", "--learning_rate=1e-5"))


def test_self_critical_loss_is_that_of_each_sampled_caption_alone(tokenizer, tmp_path, monkeypatch):
    rows = Rows(tokenizer, 3)
    given = []

    def reward(ids, captions, ended):
        given.append((ids, captions, ended))
        return [float(len(caption) % 7) for caption in captions]

    # Dropout is off where captions are sampled: these are not what the model with it would say.
    trainer = make_trainer(
        tokenizer, rows, tmp_path, dropout=0.3, self_critical=SelfCritical(1, reward, samples=4), max_steps=1
    )
    drawn = []
    sample = self_critical.sample_captions
    monkeypatch.setattr(self_critical, "sample_captions", lambda *args: drawn.extend(sample(*args)) or drawn)
    loss, gradients = loss_and_gradients(trainer, rows.rows, num_items=100)

    (ids, captions, _) = given[0]
    assert ids == [row["image_id"] for row in rows.rows for _ in range(4)]
    rewards = [len(caption) % 7 for caption in captions]
    pixels = trainer.bundle.pixels.normalise(torch.stack([torch.from_numpy(row["pixels"]) for row in rows.rows]))
    trainer.model.eval()
    trainer.model.zero_grad()
    total = 0.0
    for index, words in enumerate(caption for of_image in drawn for caption in of_image):
        first = index - index % 4
        advantage = rewards[index] - (sum(rewards[first : first + 4]) - rewards[index]) / 3
        inputs = torch.tensor([[tokenizer.bos_token_id, *words[:-1]]])
        logits = trainer.model(pixel_values=pixels[[index // 4]], decoder_input_ids=inputs, use_cache=False).logits[0]
        likelihood = torch.log_softmax(logits, -1)[range(len(words)), words].sum()
        total = total - advantage * likelihood / 100
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-4)
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_sampling_draws_from_the_model_s_own_distribution(tokenizer, monkeypatch, attention):
    """With the likeliest token drawn at each step, packed sampling is greedy generation."""
    set_seed(3)
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    net.set_attn_implementation(attention)
    pixels = torch.randn(4, 3, 64, 64)
    greedy = net.generate(pixel_values=pixels, num_beams=1, max_new_tokens=9)[:, 1:].tolist()
    first_end = [row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else 9 for row in greedy]
    greedy = [row[:end] for row, end in zip(greedy, first_end, strict=True)]
    features = net.encoder(pixels).last_hidden_state
    asked = []

    def likeliest(probabilities):
        asked.append(probabilities)
        # The second caption of an image takes another way, which must not disturb the first and the third.
        ranks = torch.tensor([0, 1, 0]).expand(4, 3)
        return probabilities.topk(2).indices.gather(2, ranks[..., None])[..., 0]

    monkeypatch.setattr(self_critical, "draw", likeliest)
    drawn = self_critical.sample_captions(net, features, 3, 9)
    assert [captions[0] for captions in drawn] == [captions[2] for captions in drawn] == greedy
    assert all(captions[1] != captions[0] for captions in drawn)
    for probabilities in asked:
        torch.testing.assert_close(probabilities[:, 0], probabilities[:, 2])


def test_a_caption_may_have_several_tokens_that_end_it(tokenizer, monkeypatch):
    """As the generation_config.json of a model folder may say."""
    net = captioner.build("tiny", "tiny", tokenizer).eval()
    end = tokenizer.eos_token_id
    net.generation_config.eos_token_id = ends = [end, 7]
    drawn = [[[5, 9]] * 2, [[7, 9], [5, 5]], [[9, end], [5, 6]], [[9, 9], [5, 7]], [[9, 9], [7, 7]], [[9, 9]] * 2]
    left = iter(drawn)
    monkeypatch.setattr(self_critical, "draw", lambda probabilities: torch.tensor(next(left)))
    told = {}

    def reward(ids, texts, ended):
        told.update(ids=ids, ended=ended)
        return [0.0] * len(ids)

    bundle = captioner.Bundle(net, tokenizer, parts.load_image_processor("tiny"))
    features = net.encoder(torch.randn(2, 3, 64, 64)).last_hidden_state
    made = SelfCritical(1, reward, samples=2, max_new_tokens=9).sample(bundle, features, [3, 4])
    assert made.captions == [[[5, 7], [9, 9, end]], [[5, 5, 5, 5, 7], [9, 5, 6, 7]]]
    assert told == {"ids": [3, 3, 4, 4], "ended": [True] * 4}
    assert len(list(left)) == 1, "none is drawn once all have come to their ends"
    ((caption,),) = ranked([(0, "", [5, 7, end, 5], [-1.0] * 4)], 1, ends, 1.0)
    assert caption.tokens == [5, 7]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    torch.manual_seed(0)
    likely = torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0], [1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0]])
    drawn = self_critical.draw(likely.expand(20_000, 3, 6))
    often = torch.nn.functional.one_hot(drawn, 6).float().mean(0)
    torch.testing.assert_close(often, likely, atol=0.015, rtol=0)
    assert not often[likely == 0].any()


def test_self_critical_training_raises_the_reward(tokenizer, tmp_path):
    rows = Rows(tokenizer, 16)
    wanted = CiderReward(rows.captions)
    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        self_critical=SelfCritical(30, wanted, learning_rate=5e-4),
        num_train_epochs=45,
        per_device_train_batch_size=16,
        learning_rate=1e-3,
        logging_steps=1,
    )
    trainer.train()
    # What is logged is the likelihood's loss first, and then the reward instead.
    logged = trainer.state.log_history
    assert [entry["step"] for entry in logged if "loss" in entry] == list(range(1, 16))
    assert [entry["step"] for entry in logged if "reward" in entry] == list(range(16, 46))
    rewards = [entry["reward"] for entry in logged if "reward" in entry]
    # 0.48 -> 0.68 and 0.49 -> 0.67 with two seeds
    assert sum(rewards[-5:]) > 1.2 * sum(rewards[:5]) > 0


def test_each_part_has_its_learning_rate_and_keeps_it_along_the_schedule(tokenizer, tmp_path):
    rows = Rows(tokenizer, 4)
    trainer = make_trainer(tokenizer, rows, tmp_path, learning_rate=1e-3, weight_decay=0.1, warmup_steps=0)
    trainer.learning_rates = {"encoder": 1e-5, "decoder": 1e-4, "cross_attention": 1e-3}
    trainer.create_optimizer_and_scheduler(10)
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    seen = {}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in seen
            seen[name] = group["lr"]
            assert group["weight_decay"] == (0.0 if parameter.ndim < 2 else 0.1), name
    assert set(seen) == {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert seen["decoder.transformer.wte.weight"] == 1e-4
    assert seen["decoder.transformer.h.0.crossattention.q_attn.weight"] == 1e-3
    for _ in range(5):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert sorted(rates) == pytest.approx([rate / 2 for rate in (1e-5, 1e-4, 1e-3)])


def test_self_critical_epochs_have_a_schedule_of_their_own(tokenizer, tmp_path):
    rows = Rows(tokenizer, 8)
    settings = {
        "per_device_train_batch_size": 4,  # 2 updates an epoch
        "num_train_epochs": 20,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.1,
    }
    critical = SelfCritical(10, CiderReward(rows.captions), learning_rate=1e-4)
    trainer = make_trainer(
        tokenizer, rows, tmp_path, waiting={"decoder": 2}, self_critical=critical, learning_rate=1e-3, **settings
    )
    trainer.learning_rates = {"encoder": 2e-5, "decoder": 1e-3, "cross_attention": 1e-3}
    trainer.create_optimizer_and_scheduler(40)
    rates = {part: [] for part in trainer.learning_rates}
    for _ in range(40):
        for group in trainer.optimizer.param_groups:
            rates[group["part"]].append(group["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    rates = {part: np.array(seen).reshape(40, -1)[:, 0] for part, seen in rates.items()}
    # The whole schedule twice, each with its warm-up, from the rate of the part and from the other.
    wave = np.array([0, 0.5, *(0.5 * (1 + math.cos(math.pi * step / 18)) for step in range(18))])
    for part, first, second in (("encoder", 2e-5, 2e-5), ("cross_attention", 1e-3, 1e-4)):
        np.testing.assert_allclose(rates[part], [*first * wave, *second * wave], atol=1e-12)
    np.testing.assert_allclose(rates["decoder"], [*[0] * 4, *1e-3 * wave[4:], *1e-4 * wave], atol=1e-12)

    settings |= {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"}
    trainer = make_trainer(tokenizer, rows, tmp_path, self_critical=critical, **settings)
    with pytest.raises(InputError, match="reduce_lr_on_plateau"):
        trainer.create_optimizer_and_scheduler(40)


# ---- the script


def arguments(prepared, folder, *more):
    return [
        f"--data_path={prepared}",
        f"--output_dir={folder}",
        "--per_device_train_batch_size=300",
        "--use_cpu",
        "--dataloader_num_workers=0",
        "--dataloader_persistent_workers=False",
        *more,
    ]


def test_a_hyperparameter_search_is_refused_with_the_reason(tokenizer, tmp_path):
    trainer = make_trainer(tokenizer, Rows(tokenizer, 2), tmp_path)
    with pytest.raises(InputError, match=r"call train\.main once for each trial"):
        trainer.hyperparameter_search(lambda trial: {}, n_trials=1)


def test_the_run_folder_is_complete(trained, prepared):
    expected = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "preprocessor_config.json",
        "results.json",
        "predictions_test.json",
        "training_curves.png",
        "gallery.png",
        "README.md",
    }
    assert expected <= {path.name for path in trained.iterdir()}
    assert list(trained.glob("checkpoint-*"))
    for name in ("training_curves.png", "gallery.png"):
        with Image.open(trained / name) as picture:
            assert min(picture.size) > 200

    results = json.loads((trained / "results.json").read_text())
    assert results["test"]["images"] == 120 and results["validation"]["images"] == 80
    scores = {"loss", "bleu_4", "rouge_1", "rouge_2", "rouge_l", "cider_d", "facts_right"}
    assert scores <= set(results["test"]) and scores <= set(results["test"]["intervals"])
    intervals = results["test"]["intervals"].items()
    assert all(low - 1e-9 <= results["test"][name] <= high + 1e-9 for name, (low, high) in intervals)
    assert "official COCO" in results["protocol"]
    assert results["recipe"]["augment"] == 0 and results["recipe"]["packing"] is True
    predictions = json.loads((trained / "predictions_test.json").read_text())
    test_ids = list(load_from_disk(str(prepared))["test"]["image_id"])
    assert [entry["image_id"] for entry in predictions] == test_ids
    assert all(set(entry) == {"image_id", "file_name", "caption"} for entry in predictions)
    # stdout holds the table and nothing else; what was decided is on stderr.
    table, beside = (trained.parent / "stdout.txt").read_text().split("\n\n")
    assert len(table.splitlines()) == 12 and table.split()[:2] == ["validation", "test"]
    assert beside.split()[0] == "distinct" and results["diversity"]["people"]["distinct"] > 0.1
    err = (trained.parent / "stderr.txt").read_text()
    for said in (
        "data: ",
        "model: tiny -> tiny",
        "learning rates: ",
        "device: cpu",
        "epoch 2  validation loss",
    ):
        assert said in err
    assert re.search(r"training: +100%.* 58/58 .*(update/s|s/update), loss \d", err), "a bar with the rate, to its end"


def test_the_best_checkpoint_is_the_one_that_is_kept(prepared, tmp_path):
    # "Best" turned round, so that it is surely not the last: the highest loss is that of the first epoch.
    folder = tmp_path / "run"
    turned = ("--metric_for_best_model=loss", "--greater_is_better=True")
    train.main(arguments(prepared, folder, "--epochs=2", "--learning_rate=1e-3", *turned))
    state = json.loads((folder / "checkpoint-12" / "trainer_state.json").read_text())
    losses = {entry["step"]: entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry}
    assert losses[6] > losses[12]
    results = json.loads((folder / "results.json").read_text())
    assert (results["step"], results["checkpoint"]) == (6, "best loss on validation")
    kept = load_file(folder / "model.safetensors")
    checkpoint = load_file(folder / "checkpoint-6" / "model.safetensors")
    assert all(torch.equal(kept[name], checkpoint[name]) for name in kept)
    assert results["validation"]["loss"] == pytest.approx(losses[6])


def test_a_loss_that_is_not_a_number_stops_the_run(prepared, tmp_path):
    with pytest.raises(InputError, match=r"the loss became nan at step \d+, with \w+\.jpg, "):
        train.main(
            arguments(
                prepared,
                tmp_path / "run",
                "--epochs=3",
                "--learning_rate=1e12",
                "--max_grad_norm=0",
                "--warmup_steps=0",
            )
        )
    assert not (tmp_path / "run" / "results.json").exists()


def test_without_load_best_the_scores_are_those_of_the_last_weights(prepared, tmp_path):
    folder = tmp_path / "run"
    train.main(arguments(prepared, folder, "--epochs=1", "--load_best_model_at_end=False"))
    results = json.loads((folder / "results.json").read_text())
    assert (results["checkpoint"], results["step"]) == ("last", 6)
    kept, last = load_file(folder / "model.safetensors"), load_file(folder / "checkpoint-6" / "model.safetensors")
    assert all(kept[name].dtype == torch.float32 and torch.equal(kept[name], last[name]) for name in kept)


def test_a_caption_longer_than_the_decoder_is_refused_before_training(tmp_path):
    from coco import coco_folder, photographs

    import dataloader

    long = " ".join(chr(0x4E00 + i) for i in range(60))  # 3 bytes each, and the vocabulary has no merges for them
    root = coco_folder(tmp_path / "coco", {i: [long] for i in range(1, 6)}, {i: [long] for i in range(101, 104)})
    for part, ids in (("train2014", range(1, 6)), ("val2014", range(101, 104))):
        photographs(root / part, [f"COCO_{part}_{i:012d}.jpg" for i in ids])
    (tmp_path / "decoder").mkdir()
    parts.train_tokenizer(["a"], 300).save_pretrained(tmp_path / "decoder")
    dataloader.main(
        [
            f"--coco_dir={root}",
            f"--save_path={tmp_path / 'data'}",
            "--encoder=tiny",
            f"--decoder={tmp_path / 'decoder'}",
            "--max_length=200",
            "--num_proc=1",
        ]
    )
    with pytest.raises(InputError, match="has 128 positions, and the longest caption 200 tokens"):
        train.main([f"--data_path={tmp_path / 'data'}", f"--output_dir={tmp_path / 'run'}", "--decoder=tiny"])


def test_two_processes_score_every_image_once_and_as_one_process_does(trained, prepared, tmp_path):
    """79 of the images: a number that two processes with batches of 10 cannot share evenly."""
    code = (
        "import sys, json, pathlib, torch\n"
        "from captioning.data import folder\n"
        "from transformers import Seq2SeqTrainingArguments\n"
        "from captioning.model import captioner, parts\n"
        "from captioning.training import batches\n"
        "from captioning.training.trainer import CaptionTrainer\n"
        "prepared, trained, output = sys.argv[1:]\n"
        "torch.set_num_threads(1)\n"
        "bundle = captioner.load(trained)\n"
        "rows = folder.load_prepared(pathlib.Path(prepared))[0]['validation'].select(range(79))\n"
        "references = dict(zip(rows.image_id, rows.captions))\n"
        "args = Seq2SeqTrainingArguments(output_dir=output, report_to='none', remove_unused_columns=False,\n"
        "    use_cpu=True, predict_with_generate=True, per_device_eval_batch_size=10, disable_tqdm=True)\n"
        "net = bundle.model\n"
        "trainer = CaptionTrainer(bundle, references, {}, args=args,\n"
        "    data_collator=batches.Collator(net.config.decoder_start_token_id, bundle.tokenizer.pad_token_id))\n"
        "metrics = trainer.evaluate(batches.CaptionDataset(rows, parts.Pixels(bundle.image_processor)))\n"
        "assert set(trainer.predictions) == set(references), 'every image exactly once'\n"
        "if trainer.is_world_process_zero():\n"
        "    scores = {k: v for k, v in metrics.items() if 'second' not in k and 'time' not in k}\n"
        "    open(output + '.json', 'w').write(json.dumps([scores, trainer.predictions, args.world_size]))\n"
        "trainer.accelerator.end_training()\n"
    )
    file = tmp_path / "evaluate.py"
    file.write_text(code)
    results = []
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    for processes, command in ((1, [sys.executable]), (2, launch)):
        output = str(tmp_path / str(processes))
        done = subprocess.run(
            [*command, str(file), str(prepared), str(trained), output],
            capture_output=True,
            text=True,
            timeout=200,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(json.loads(Path(output + ".json").read_text()))
        assert results[-1][2] == processes
    assert results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)


def test_two_processes_train_as_one_does(prepared, tmp_path):
    """The same effective batch gives the same number of updates, and the script its run folder."""
    folder = tmp_path / "two"
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes=2",
        "--cpu",
        "--num_cpu_threads_per_process=1",
    ]
    done = subprocess.run(
        [
            *launch,
            str(ROOT / "train.py"),
            *arguments(prepared, folder, "--epochs=1", "--learning_rate=1e-3", "--per_device_train_batch_size=75"),
        ],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((folder / "results.json").read_text())
    assert results["step"] == 12
    assert len(json.loads((folder / "predictions_test.json").read_text())) == 120
    assert "2 process(es)" in done.stderr and "150 images per update" in done.stderr
    assert done.stdout.count("cider_d") == 1, "one process speaks for all"


def launched(launcher: list, *words) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, ROOT / "train.py", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_the_processes_of_accelerate_s_config_file_are_those_that_run(few, tmp_path):
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}
    config |= {"num_machines": 1, "num_processes": 2, "machine_rank": 0, "mixed_precision": "no"}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    run = launched([f"--config_file={tmp_path / 'config.yaml'}"], *arguments(few, tmp_path / "run", "--max_steps=1"))
    said = run.communicate(timeout=240)[0]
    assert run.returncode == 0 and "2 process(es)" in said, said


@pytest.mark.slow
def test_two_machines_of_accelerate_are_one_training(few, tmp_path):
    port = free_port()
    together = ["--cpu", "--num_processes=2", "--num_machines=2", "--main_process_ip=127.0.0.1"]
    together.append(f"--main_process_port={port}")
    words = arguments(few, tmp_path / "run", "--max_steps=1")
    runs = [launched([*together, f"--machine_rank={rank}"], *words) for rank in (0, 1)]
    said = [run.communicate(timeout=240)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert "2 process(es)" in said[0] and sum(text.count("cider_d") for text in said) == 1


def test_processes_that_cannot_be_counted_are_refused(few, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(InputError, match="accelerate was asked for several processes and starts one of them on CPUs"):
        train.main(arguments(few, tmp_path / "run"))


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        ("-m accelerate.commands.launch --cpu --num_processes=2", "--nproc_per_node=2 --standalone"),
        ("/opt/bin/accelerate launch --cpu --num_processes 3", "--nproc_per_node=3 --standalone"),
        ("/opt/bin/accelerate-launch --config_file=FILE", "--nproc_per_node=2 --standalone"),
        (
            "/opt/bin/accelerate launch --cpu --num_processes=4 --num_machines=2 --machine_rank=1",
            "--nproc_per_node=2 --nnodes=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500",
        ),
        ("/opt/bin/accelerate launch --cpu --num_processes=2 sweep.py", None),
        ("/opt/bin/launch.py --num_processes=2", None),
        ("", None),
    ],
)
def test_only_the_launcher_of_this_very_process_tells_how_many_there_are(launcher, expected, tmp_path, monkeypatch):
    """An accelerate further up that launched another script says nothing of this one."""
    import psutil

    config = {"distributed_type": "MULTI_CPU", "use_cpu": True, "num_machines": 1, "num_processes": 2}
    (tmp_path / "file.yaml").write_text(json.dumps({"compute_environment": "LOCAL_MACHINE", **config}))
    words = ["--epochs=1", "--output_dir=a b"]
    above = [sys.executable, *launcher.replace("FILE", str(tmp_path / "file.yaml")).split()]
    above += ["train.py"] if "sweep.py" not in launcher else []
    monkeypatch.setattr(psutil.Process, "cmdline", lambda self: [*above, *words] if self.pid == os.getppid() else [])
    monkeypatch.setattr(sys, "argv", ["train.py", *words[:1]] if "sweep.py" in launcher else ["train.py", *words])
    for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_USE_CPU": "true", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    started = []
    monkeypatch.setattr(os, "execv", lambda program, command: started.extend(command))
    if expected is None:
        with pytest.raises(InputError, match=r"torchrun --nproc_per_node N train\.py"):
            start_missing_processes("train.py", None)
    else:
        start_missing_processes("train.py", None)
        assert started == [
            sys.executable, "-m", "torch.distributed.run", *expected.split(), str(Path("train.py").resolve()), *words,
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs=0"], "--epochs 0 is not above 0"),
        (["--epochs=2", "--max_steps=5"], "say two things"),
        (["--per_device_train_batch_size=2.5"], "takes an integer, not '2.5'"),
        (["--learning_rte=1"], "unknown flag --learning_rte; did you mean --learning_rate?"),
        (["--learning_rate=fast"], "--learning_rate takes a number, not 'fast'"),
        (["--learning_rate", "fast"], "--learning_rate takes a number, not 'fast'"),
        (["--data_path=nowhere"], "did you run it?"),
    ],
)
def test_mistakes_in_the_arguments_are_named_at_once(prepared, tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as stopped:
        read(arguments(prepared, tmp_path / "run", *more))
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--encoder=no/such-encoder"], "--encoder 'no/such-encoder' is not here"),
        (["--lr_scheduler_type=wavy"], "wavy"),
        (["5"], "'5' belongs to no flag"),
        (["--remove_unused_columns=True"], "--remove_unused_columns True cannot work here"),
        (["--encoder_lr=-1"], "--encoder_lr -1 is not above 0"),
        (["--resume_from_checkpoint=nowhere"], "'nowhere' is not a whole checkpoint folder"),
        (["--dataloader_drop_last=True"], "--dataloader_drop_last True cannot work here"),
        (["--metric_for_best_model=bleu4"], "'bleu4' is not a score; choose from"),
        (["--per_device_train_batch_size=0"], "--per_device_train_batch_size 0 is below 1"),
        (["--learning_rate=-1"], "--learning_rate -1 is not above 0"),
        (["--eval_strategy=steps", "--save_strategy=epoch"], "requires the save and eval strategy to match"),
    ],
)
def test_what_cannot_work_is_one_sentence(prepared, tmp_path, more, message, capsys):
    with pytest.raises((InputError, SystemExit)) as stopped:
        train.main([*arguments(prepared, tmp_path / "run"), *more])
    said = capsys.readouterr().err.splitlines()[-1] if stopped.type is SystemExit else str(stopped.value)
    assert stopped.type is InputError or stopped.value.code == 2
    assert message in said and "\n" not in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--eval_strategy steps --eval_steps 2", ("steps", 2, "steps", 2, True)),
        ("--eval_steps 3", ("steps", 3, "steps", 3, True)),
        ("--eval_strategy steps", ("steps", 0.1, "steps", 0.1, True)),
        ("--save_steps 5", ("steps", 5, "steps", 5, True)),
        ("--eval_strategy steps --eval_steps 2 --save_steps 4", ("steps", 2, "steps", 4, True)),
        ("--eval_strategy no", ("no", None, "epoch", 500, False)),
        ("--eval_strategy no --save_steps 4", ("no", None, "steps", 4, False)),
    ],
)
def test_saving_follows_evaluating(flags, expected, prepared, tmp_path):
    t = training_arguments(*read(arguments(prepared, tmp_path / "run", *flags.split())))
    assert (t.eval_strategy, t.eval_steps, t.save_strategy, t.save_steps, t.load_best_model_at_end) == expected


@pytest.mark.parametrize("flags", ["--eval_strategy epoch --eval_steps 4", "--save_strategy epoch --save_steps 4"])
def test_a_number_of_steps_without_effect_is_refused(flags, prepared, tmp_path):
    with pytest.raises(InputError, match=r"_steps has no effect with --\w+_strategy epoch"):
        training_arguments(*read(arguments(prepared, tmp_path / "run", *flags.split())))


def test_evaluating_by_steps_and_not_at_all_end_in_a_whole_run_folder(few, tmp_path):
    for name, flags in (("steps", ["--eval_strategy=steps", "--eval_steps=2"]), ("no", ["--eval_strategy=no"])):
        train.main(arguments(few, tmp_path / name, "--epochs=1", "--per_device_train_batch_size=8", *flags))
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert set(results["test"]) == set(results["validation"])


@pytest.mark.parametrize(
    ("evaluations", "kept"),
    [
        ([(0.3, 4.0), (0.5, 3.9), (0.4, 3.0)], 2),  # the best, between two checkpoints
        ([(0.0, 5.0), (0.0, 4.0), (0.0, 4.5)], 2),  # of equals the one with the lowest loss
        ([(0.2, 4.0), (0.2, 4.0), (0.1, 1.0)], 1),
    ],
)
def test_the_kept_checkpoint_is_the_best_evaluation(evaluations, kept, tokenizer, tmp_path, monkeypatch):
    rows = Rows(tokenizer, 4)
    trainer = make_trainer(
        tokenizer,
        rows,
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="cider_d",
        learning_rate=1e-2,
    )
    planned, weights = iter(evaluations), {}

    def evaluated(*args, **kwargs):
        score, loss = next(planned)
        step = trainer.state.global_step
        weights[step] = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        metrics = {"eval_cider_d": score, "eval_loss": loss}
        trainer.log(dict(metrics))
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics

    monkeypatch.setattr(trainer, "evaluate", evaluated)
    trainer.train()
    assert trainer.state.best_global_step == kept
    assert all(torch.equal(weight, weights[kept][name]) for name, weight in trainer.model.named_parameters())


def test_a_captioner_brings_its_own_tokenizer_and_image_processor(trained, few, tmp_path, capsys):
    """--model_path on data of another tokenizer: the captions are tokenised anew, and nothing is forgotten."""
    splits = load_from_disk(str(few))
    other = parts.train_tokenizer(["words", "of another data set, in another order"] * 9, 300)
    data = tmp_path / "data"
    shutil.copytree(few, data)
    other.save_pretrained(data)
    for split in splits:
        rows = splits[split].map(lambda row: {"labels": encode_captions(other, row["captions"], 64)[0]})
        shutil.rmtree(data / split)
        rows.save_to_disk(str(data / split))
    out = tmp_path / "run"
    train.main(
        arguments(data, out, f"--model_path={trained}", "--max_steps=1", "--encoder_lr=1e-9", "--decoder_lr=1e-9")
    )
    said = capsys.readouterr().err
    assert "tokenised anew" in said and "model: tiny -> tiny" in said
    before, after = captioner.load(trained), captioner.load(out)
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab() != other.get_vocab()
    assert after.image_processor.to_dict() == before.image_processor.to_dict()
    results = json.loads((out / "results.json").read_text())
    whole = json.loads((trained / "results.json").read_text())
    assert results["test"]["loss"] < whole["test"]["loss"] + 1, "it still knows what it learnt"


def test_images_that_are_stored_too_small_for_a_captioner_are_refused(few, tmp_path, tokenizer):
    net = captioner.build("small", "tiny", tokenizer)  # sees 224 px, where the data were stored for 64
    captioner.save(captioner.Bundle(net, tokenizer, parts.load_image_processor("small")), tmp_path / "captioner")
    with pytest.raises(
        InputError, match=r"stored with 73 px, and '.*captioner' sees 224; run dataloader.py with --enc"
    ):
        train.main(arguments(few, tmp_path / "run", f"--model_path={tmp_path / 'captioner'}"))


def test_captions_may_be_as_long_as_those_of_the_training_images(few, tmp_path, capsys):
    splits = load_from_disk(str(few))
    tokenizer = parts.load_tokenizer(few)
    data = tmp_path / "data"
    shutil.copytree(few, data)
    words = "a red circle " * 20
    for split in splits:
        labels, _ = encode_captions(tokenizer, [words], 100)
        shutil.rmtree(data / split)
        splits[split].map(lambda row, labels=labels: {"labels": labels, "captions": [words]}).save_to_disk(
            str(data / split)
        )
    train.main(arguments(data, tmp_path / "run", "--max_steps=1"))
    config = captioner.load(tmp_path / "run").model.generation_config
    assert config.max_new_tokens == len(labels[0]) > 40
    assert f"captions: {len(labels[0])} tokens at most are generated; 100.0% of the training" in capsys.readouterr().err


def test_weights_and_biases_without_a_login_is_one_sentence(few, tmp_path, monkeypatch):
    available = "transformers.integrations.integration_utils.get_available_reporting_integrations"
    monkeypatch.setattr(available, lambda: ["wandb"])
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match="--report_to wandb needs a login: run 'wandb login', or set WANDB_MODE=off"):
        train.main(arguments(few, tmp_path / "run", "--report_to=wandb"))


def test_a_decoder_with_another_tokenizer_is_refused(prepared, tmp_path):
    other = parts.train_tokenizer(["entirely different words"] * 3, 300)
    other.save_pretrained(tmp_path / "decoder")
    with pytest.raises(InputError, match="has another tokenizer"):
        train.main(arguments(prepared, tmp_path / "run", f"--decoder={tmp_path / 'decoder'}"))


def test_an_earlier_run_is_not_written_over(trained, prepared, capsys):
    with pytest.raises(SystemExit) as stopped:
        read([f"--data_path={prepared}", f"--output_dir={trained}"])
    assert stopped.value.code == 2
    assert "holds checkpoints of an earlier run" in capsys.readouterr().err


@pytest.mark.parametrize("capable", [True, False])
def test_bfloat16_is_used_on_a_cpu_that_multiplies_in_it(prepared, tmp_path, monkeypatch, capable):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training = training_arguments(*read([f"--data_path={prepared}", f"--output_dir={tmp_path / 'run'}"]))
    assert (training.bf16, training.use_cpu, training.device.type) == (capable, True, "cpu")


def test_self_critical_training_is_refused_where_captions_cannot_be_packed(few, tmp_path, monkeypatch):
    monkeypatch.setattr("captioning.model.packing.can_pack", lambda net: False)
    with pytest.raises(InputError, match="--self_critical_epochs needs packing, which this decoder cannot do"):
        train.main(arguments(few, tmp_path / "run", "--self_critical_epochs=1"))


def test_dropout_is_the_decoders_and_is_saved_with_it(tokenizer, tmp_path):
    net = captioner.build("tiny", "tiny", tokenizer)
    captioner.set_dropout(net, 0.3)
    net.save_pretrained(tmp_path)
    for loaded in (net, type(net).from_pretrained(tmp_path)):
        rates = {n: m.p for n, m in loaded.named_modules() if isinstance(m, torch.nn.Dropout)}
        decoders = {n for n in rates if n.startswith("decoder.") and not n.endswith("attn_dropout")}
        assert len(decoders) == 1 + 2 * 3
        assert {n for n, rate in rates.items() if rate == 0.3} == decoders
        assert {rates[n] for n in rates.keys() - decoders} == {0.0}


def test_help_is_one_screen_and_help_all_has_every_flag():
    short = script("train.py", "--help")
    assert short.returncode == 0
    assert len(short.stdout.splitlines()) <= 75
    assert "--help_all" in short.stdout and "--data_path" in short.stdout
    long = script("train.py", "--help_all")
    for flag in (
        "--data_path",
        "--lr_scheduler_type",
        "--adam_beta1",
        "--bf16",
        "--report_to",
        "--generation_num_beams",
    ):
        assert flag in long.stdout
    documented = {name for name in training_argument_types() if f"--{name}" in long.stdout}
    assert {"learning_rate", "predict_with_generate", "label_smoothing_factor"} <= documented
    assert len(documented) > 80


def test_an_evaluation_does_not_count_in_the_remaining_time(tokenizer, tmp_path, monkeypatch):
    """Time stands still: an update takes a second, an evaluation a hundred."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    rows, remaining = Rows(tokenizer, 4), []
    settings = {"max_steps": 6, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tokenizer, rows, tmp_path, **settings)
    trainer.args.disable_tqdm = False

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            now[0] += 1

        def on_prediction_step(self, *args, **kwargs):
            now[0] += 100

        def on_evaluate(self, args, state, control, **kwargs):
            figures = trainer.progress.training_bar.format_dict
            remaining.append((figures["total"] - figures["n"]) * figures["elapsed"] / figures["n"])

    trainer.add_callback(Clock())
    trainer.train()
    assert remaining[0] == pytest.approx(4, abs=0.1) and remaining[1] == pytest.approx(2, abs=0.1)
