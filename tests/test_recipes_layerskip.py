"""LayerSkip: its loss and gradient against transformers' own, layers that are left out, and a base that learns to exit."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import tiny_models
import torch
from full_model import FullModel
from torch import Tensor

import dyndepth
from dyndepth.errors import ArgumentError, ExitsError, NotEnoughDataError, TrainingError
from dyndepth.recipes import layerskip
from dyndepth.recipes.layerskip import Settings
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training.weighting import layerskip_weights

ALL = (1, 2, 3, 4, 5, 6)


def texts(count: int, length: int = 20, seed: int = 0) -> list[Tensor]:
    """Arithmetic on token ids: something to learn."""
    words = tiny_models.VOCABULARY - 3
    starts = torch.randint(0, words, (count,), generator=torch.Generator().manual_seed(seed))
    return [(start + 7 * torch.arange(length)) % words + 3 for start in starts]


def nothing(batch: int) -> Tensor:
    return torch.zeros(6, batch, dtype=torch.bool)


def gradients(model: Any) -> dict[str, Tensor | None]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3", "gemma2", "phi3", "gpt2", "opt", "gpt_neox"])
def test_the_top_alone_is_transformers_own_loss_and_gradient(name: str) -> None:
    """Sequences of three lengths: padding has no label and no influence."""
    model = tiny_models.tiny(name)
    settings = Settings(batch=3)
    tokens, labels = layerskip._batch([text[:n] for text, n in zip(texts(3), (20, 7, 13), strict=True)], settings, 0)
    lengths = (labels != -100).sum(1) + 1
    assert sorted(lengths.tolist()) == [7, 13, 20]
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    with torch.enable_grad():
        theirs = model(tokens, attention_mask=mask.long(), labels=tokens.masked_fill(~mask, -100)).loss
        theirs.backward()
        wanted = gradients(model)
        ours = layerskip.exit_losses(bind(model), tokens, labels, [6], nothing(3))
        assert list(ours) == [6]
        ours[6].backward()
    torch.testing.assert_close(ours[6], theirs, rtol=1e-5, atol=1e-6)
    for key, gradient in gradients(model).items():
        if wanted[key] is None:
            assert gradient is None, key
        else:
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-5, msg=key)


def test_early_exits_read_every_layer_through_the_models_own_head() -> None:
    model = tiny_models.tiny("llama")
    tokens = torch.stack(texts(4))
    labels = torch.cat([tokens[:, 1:], torch.full((4, 1), -100)], dim=1)
    states = model(tokens, output_hidden_states=True).hidden_states
    found = layerskip.exit_losses(bind(model), tokens, labels, ALL, nothing(4))
    for leave in ALL:
        logits = model.lm_head(states[leave] if leave == 6 else model.model.norm(states[leave]))  # the last is normed
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        torch.testing.assert_close(found[leave], wanted, rtol=1e-4, atol=1e-5)


def test_logits_in_parts_are_the_whole(monkeypatch: Any) -> None:
    model = tiny_models.tiny("llama")
    tokens, labels = layerskip._batch(texts(3), Settings(batch=3), 0)
    results = []
    for size in (1 << 24, 7 * tiny_models.VOCABULARY):
        monkeypatch.setattr(layerskip, "_LOGITS", size)
        with torch.enable_grad():
            found = layerskip.exit_losses(bind(model), tokens, labels, [3, 6], nothing(3))
            (found[3] + found[6]).backward()
        results.append((found[3].detach(), found[6].detach(), gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_logits_are_computed_only_where_a_loss_is_on(monkeypatch: Any) -> None:
    """Rows that the LM head sees in a step: labelled rows times boundaries that are on and weigh something."""
    model, seen = tiny_models.tiny("llama"), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[0]))
    record = layerskip.train(
        model, texts(4), settings=Settings(steps=3, batch=4, every=3, dropout=0.0, curriculum="rotational"), progress=False
    )
    assert [list(entry["losses"]) for entry in record] == [[4, 6], [2, 5, 6], [3, 6]], "boundary 1 weighs nothing"
    assert seen == [4 * 19] * (2 + 3 + 2)


def test_a_layer_that_is_left_out_is_not_run() -> None:
    """By all sequences: it is never called and has no gradient. By some: the others equal a batch without these."""
    model = tiny_models.tiny("llama")
    tokens, labels = layerskip._batch(texts(4), Settings(batch=4), 0)
    calls = []
    model.model.layers[4].mlp.register_forward_hook(lambda _, args, __: calls.append(args[0].shape[0]))
    dropped = nothing(4)
    dropped[4] = True
    with torch.enable_grad():
        loss = layerskip.exit_losses(bind(model), tokens, labels, [6], dropped)[6]
        loss.backward()
    found = gradients(model)
    assert not calls
    assert all((gradient is None) == ("layers.4." in key) for key, gradient in found.items())
    assert model.model.layers[4].self_attn.q_proj.weight.grad is None
    some = nothing(4)
    some[4, [0, 3]] = True
    mixed = layerskip.exit_losses(bind(model), tokens, labels, [5], some)[5]
    apart = [
        layerskip.exit_losses(bind(model), tokens[rows], labels[rows], [5], nothing(2) | some[:, rows])[5]
        for rows in ([0, 3], [1, 2])
    ]
    torch.testing.assert_close(mixed, (apart[0] + apart[1]) / 2, rtol=1e-5, atol=1e-6)
    assert calls == [2 * 20, 2 * 20]
    below = layerskip.exit_losses(bind(model), tokens[[0, 3]], labels[[0, 3]], [4], nothing(2))[4]
    assert torch.equal(apart[0], below), "the residual passes unchanged"


def test_dropout_follows_the_papers_rates() -> None:
    """p_l = most (2^(l / (L - 1)) - 1), drawn per sequence from (seed, step); from scratch it grows with the step."""
    settings = Settings(dropout=0.4, batch=8)
    draws = torch.stack([layerskip._dropped(6, 8, settings, step) for step in range(3000)]).float()
    wanted = torch.tensor([0.4 * (2 ** (layer / 5) - 1) for layer in range(6)])
    torch.testing.assert_close(draws.mean((0, 2)), wanted, rtol=0, atol=0.01)
    assert torch.equal(layerskip._dropped(6, 8, settings, 5), layerskip._dropped(6, 8, settings, 5))
    assert not torch.equal(draws[0], draws[1])
    scratch = Settings(dropout=1.0, from_scratch=True, steps=100)
    assert not layerskip._dropped(6, 8, scratch, 0).any()
    assert layerskip._dropped(6, 8, scratch, 99)[5].all()


def test_every_text_comes_once_an_epoch_in_an_order_of_its_own() -> None:
    sequences, settings = [torch.tensor([i, i]) for i in range(10)], Settings(batch=4)
    epochs = [torch.cat([layerskip._batch(sequences, settings, 3 * e + s)[0][:, 0] for s in range(3)]) for e in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(*epochs)


def test_a_step_is_adam_on_the_weighted_losses() -> None:
    """The first step by hand: Adam's first update is lr times the sign of the gradient of sum e(l) CE_l."""
    model, other = tiny_models.tiny("llama"), tiny_models.tiny("llama")
    settings = Settings(steps=4, batch=4, every=2, dropout=0.0, lr=1e-3, warmup=0.0, clip=0.0, scale=0.5)
    (entry, *_) = layerskip.train(model, texts(4), settings=settings, progress=False)
    tokens, labels = layerskip._batch(texts(4), settings, 0)
    on = [1, 3, 5, 6]
    weights = dict(zip(on, layerskip_weights(on, 6, 0.5), strict=True))
    with torch.enable_grad():
        losses = layerskip.exit_losses(bind(other), tokens, labels, on, nothing(4))
        total = torch.stack([weights[leave] * loss for leave, loss in losses.items()]).sum()
        total.backward()
    norm = math.sqrt(sum(float(p.grad.pow(2).sum()) for p in other.parameters() if p.grad is not None))
    assert entry["losses"] == pytest.approx({leave: float(losses[leave]) for leave in (3, 5, 6)}, rel=1e-5)
    assert entry["loss"] == pytest.approx(float(total), rel=1e-5)
    assert entry["gradient_norm"] == pytest.approx(norm, rel=1e-4)
    assert (entry["step"], entry["lr"], entry["dropped"], entry["tokens"]) == (0, 1e-3, 0, 76)
    assert json.loads(json.dumps(entry))["step"] == 0


def test_training_raises_agreement_at_a_middle_layer() -> None:
    """Early exits learn to say what the top says; without their loss they do so far less."""
    found = {}
    for scale in (0.0, 1.0):
        model = tiny_models.tiny("llama")
        held_out = texts(20, seed=9)

        def agreement(model: Any = model, held_out: list[Tensor] = held_out) -> float:
            exits = layerskip.exits(model, [3])
            full = score(model, held_out).argmax()
            early = score(model, held_out, exits, depth=[3] * 20, kv="none").argmax()
            return float((full == early).float().mean())

        before = agreement()
        settings = Settings(steps=60, batch=16, every=3, dropout=0.1, lr=3e-3, scale=scale)
        record = layerskip.train(model, texts(200), settings=settings, progress=False)
        found[scale] = before, agreement()
        assert record[-1]["losses"][6] < 0.5 * record[0]["losses"][6]
    assert found[1.0][1] > found[1.0][0] + 0.3
    assert found[1.0][1] > found[0.0][1] + 0.2


def test_the_same_arguments_give_the_same_weights() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = tiny_models.tiny("llama")
        torch.manual_seed(len(weights))  # the global state must not matter
        settings = Settings(steps=6, batch=4, curriculum="gradual", dropout=0.5, lr=1e-3, seed=seed)
        record = layerskip.train(model, texts(9), settings=settings, progress=False)
        assert [min(entry["losses"]) for entry in record] == [6, 4, 2, 2, 2, 2]
        assert sum(entry["dropped"] for entry in record) > 0
        weights.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_frozen_parts_stay_and_nothing_is_left_behind() -> None:
    model = tiny_models.tiny("llama")
    model.model.embed_tokens.requires_grad_(False)
    before = model.model.embed_tokens.weight.clone()
    asked = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    layerskip.train(model, texts(4), settings=Settings(steps=2, batch=4, lr=1e-2), progress=False)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == asked
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    model.requires_grad_(False)
    with pytest.raises(ArgumentError, match="nothing to train"):
        layerskip.train(model, texts(4), progress=False)


@pytest.mark.parametrize("what", ["loss at boundary", "norm of the gradient"])
def test_what_is_not_finite_stops_before_the_step(what: str, monkeypatch: Any) -> None:
    model, steps = tiny_models.tiny("llama"), []
    original = layerskip.exit_losses

    def broken(*args: Any) -> dict[int, Tensor]:
        losses = original(*args)
        steps.append({name: value.clone() for name, value in model.state_dict().items()})
        if len(steps) == 3:
            grown = (losses[6] - losses[6].detach()) * math.inf if what == "loss at boundary" else _infinite_slope(losses[6])
            losses[6] = losses[6] + grown
        return losses

    monkeypatch.setattr(layerskip, "exit_losses", broken)
    with pytest.raises(TrainingError, match=f"{what}.* at step 2; a lower lr"):
        layerskip.train(model, texts(8), settings=Settings(steps=5, batch=4, every=9), progress=False)
    assert all(torch.equal(value, steps[-1][name]) for name, value in model.state_dict().items())


def _infinite_slope(loss: Tensor) -> Tensor:
    """0, with an infinite derivative."""
    return torch.sqrt((loss - loss.detach()).abs())


def test_exits_are_the_model_cut_there() -> None:
    import copy

    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    exits = layerskip.exits(model, 4)
    ours = model.generate(
        **inputs, custom_generate=dyndepth.generate, exits=exits, depth=4, kv="none", prompt="dynamic", **options
    )
    cut = copy.deepcopy(model)
    cut.model.layers = cut.model.layers[:4]
    cut.config.num_hidden_layers = 4
    assert torch.equal(ours, cut.generate(**inputs, **options))
    assert [band.leave for band in layerskip.exits(model, [2, 5])] == [2, 5]
    with pytest.raises(ArgumentError, match=r"leave must be in \[1, 6\), got \[6\]"):
        layerskip.exits(model, 6)
    with pytest.raises(ArgumentError, match=r"exit_layer must be in \[1, 6\), got \[0\]"):
        layerskip.speculate(model, inputs, 0)


@pytest.mark.parametrize(("leave", "drafts"), [(2, 1), (4, 3), (5, 6)])
def test_every_draft_comes_from_the_exit_layer(leave: int, drafts: int) -> None:
    """Cycles by transformers' own states: so many drafts of the residual at E each, but for the tail; one token of the top."""
    model = tiny_models.tiny("llama", eos_token_id=None)
    model.generation_config.eos_token_id = None
    inputs, new = tiny_models.prompts(4), 17
    options: dict[str, Any] = {"max_new_tokens": new, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(**inputs, **options).sequences
    counts = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            counts[number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    out = layerskip.speculate(model, inputs, leave, drafts, **options)
    ran = [count - int(inputs["attention_mask"].sum()) + 4 for count in counts]
    assert torch.equal(out.sequences, wanted)
    rows = 0
    for row in range(4):
        text = wanted[row][torch.cat([inputs["attention_mask"][row].bool(), torch.ones(new, dtype=torch.bool)])].tolist()
        at, drafted, layers = len(text) - new, [], []
        while at < len(text):
            size = min(drafts, len(text) - at - 1)
            made = text[:at]
            for _ in range(size):
                made.append(int(FullModel(model, torch.tensor(made)).exit_logits(leave)[-1].argmax()))
            good = next((j for j in range(size) if made[at + j] != text[at + j]), size)
            drafted.append(size)
            layers += [leave] * good + [6]
            at += good + 1
        assert int(out.drafted[row]) == sum(drafted)
        assert out.exit_layers[row].tolist() == layers
        rows += sum(drafted) + len(drafted)
    assert ran == out.work.layers == [rows] * 6, "a drafted row runs each layer once: below the exit, then above it"
    assert int(out.accepted.sum()) > 0


def test_a_trained_base_accepts_its_own_drafts() -> None:
    """What the two halves of the paper are for: early layers that learned to say what the top says draft what it accepts."""
    accepted = []
    for scale in (0.0, 1.0):
        model = tiny_models.tiny("llama", eos_token_id=None)
        model.generation_config.eos_token_id = None
        settings = Settings(steps=60, batch=16, every=3, dropout=0.1, lr=3e-3, scale=scale)
        layerskip.train(model, texts(200), settings=settings, progress=False)
        prompts = torch.stack(texts(12, 6, seed=9))
        out = layerskip.speculate(model, prompts, 3, 4, max_new_tokens=12, do_sample=False, return_dict_in_generate=True)
        accepted.append(float(out.accepted.sum() / out.drafted.sum()))
        assert torch.equal(out.sequences, model.generate(prompts, max_new_tokens=12, do_sample=False))
    assert accepted[1] > accepted[0] + 0.2


def test_exits_made_before_training_do_not_fit_afterwards() -> None:
    model = tiny_models.tiny("llama")
    exits = layerskip.exits(model, 3)
    layerskip.train(model, texts(4), settings=Settings(steps=3, batch=4, lr=1e-2), progress=False)
    with pytest.raises(ExitsError, match="made for another"):
        score(model, texts(2), exits, depth=[3, 3], kv="none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 up"),
        ({"length": 1}, "length must be a whole number from 2 up"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"dropout": 1.5}, "dropout must be a share"),
        ({"warmup": 1.0}, "warmup must be a share"),
        ({"scale": float("nan")}, "scale must be a finite number from 0 up"),
        ({"curriculum": "random"}, "curriculum must be rotational or gradual"),
    ],
)
def test_settings_are_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Settings(**changes)


def test_what_training_refuses() -> None:
    model = tiny_models.shared("llama")
    with pytest.raises(NotEnoughDataError, match="at least one text of two tokens"):
        layerskip.train(model, [torch.tensor([5])], progress=False)
    with pytest.raises(ArgumentError, match="tokenizer of another model"):
        layerskip.train(model, [torch.full((5,), tiny_models.VOCABULARY)], progress=False)
    with pytest.raises(ArgumentError, match="so a tokenizer is needed"):
        layerskip.train(model, ["a text"], progress=False)
