"""Mamba with rows leaving: as a loop over sequences with transformers' own blocks has it, whatever the batch and policy."""

from __future__ import annotations

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from dyndepth.errors import ArgumentError, ExitsError, UnsupportedModelError
from dyndepth.ssm import CLASSIFIERS, MambaDecoder, SsmExit, SsmExits, State, mixer
from dyndepth.ssm.exits import facts_of
from dyndepth.ssm.generate import penalised

LAYERS, WIDTH, WORDS, NEW = 6, 20, 41, 7
LENGTHS = [6, 2, 4, 1, 6]


@functools.cache
def tiny(**changes: Any) -> Any:
    torch.manual_seed(9)
    config = t.MambaConfig(
        vocab_size=WORDS, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=5, conv_kernel=4, time_step_rank=3, expand=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    model = t.MambaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "A_log" not in name:
            parameter.data = torch.randn_like(parameter) * (0.5 if "embed" in name else 0.35)
        elif "bias" in name:
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


@functools.cache
def exits(kind: str, threshold: float = 0.5) -> SsmExits:
    torch.manual_seed(4)
    settings = {"linear": {}, "ffn": {"neurons": 7}, "mamba": {"states": 3}}[kind]
    points = []
    for leave in (1, 3, 4):
        classifier = CLASSIFIERS[kind](WIDTH, **settings)
        for name, parameter in classifier.named_parameters():
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.data = torch.randn_like(parameter) * 0.6
        points.append(SsmExit(leave, classifier, threshold))
    return SsmExits(points, facts_of(tiny()))


def prompts() -> dict[str, Tensor]:
    ids = torch.randint(3, WORDS, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(6))
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(model: Any, points: SsmExits, prompt: Tensor, policy: str, new: int = NEW) -> tuple[list[int], list[int]]:
    """One sequence, one token at a time through transformers' blocks and cache; classifiers read all they saw anew."""
    cache: Any = t.DynamicCache(config=model.config)
    history: dict[int, list[Tensor]] = {point.leave: [] for point in points}
    at = {point.leave: point for point in points}
    tokens, depths = prompt.tolist(), []
    for place in range(len(prompt) + new - 1):
        x = model.backbone.embeddings(torch.tensor([[tokens[place]]]))
        judged, left = place >= len(prompt) - 1, None
        for number, layer in enumerate(model.backbone.layers):
            if number in at and left is None:
                history[number].append(x[0, 0])
                logit = at[number].classifier(torch.stack(history[number])[None])[0, -1]
                if judged and float(torch.sigmoid(logit)) >= at[number].threshold:
                    left = number
            elif number in at and policy == "update":
                history[number].append(x[0, 0])
            if left is None:
                x = layer(x, cache_params=cache)
            elif policy == "update":
                layer(x, cache_params=cache)  # moves the states; what comes out is nobody's
        if judged:
            depths.append(LAYERS if left is None else left)
            logits = model.lm_head(model.backbone.norm_f(x))[0, 0]
            tokens.append(int(logits.argmax()))
            if tokens[-1] == 2:
                break
    return tokens[len(prompt) :], depths


@pytest.mark.parametrize("policy", ["leave", "update"])
@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_a_batch_decodes_as_each_sequence_alone(kind: str, policy: str) -> None:
    model, points = tiny(), exits(kind)
    out = MambaDecoder(model, points).generate(**prompts(), max_new_tokens=NEW, policy=policy)
    all_depths: list[int] = []
    for row, length in enumerate(LENGTHS):
        tokens, depths = alone(model, points, prompts()["input_ids"][row, -length:], policy)
        assert out.sequences[row, max(LENGTHS) :].tolist()[: len(tokens)] == tokens
        assert out.layers_run[row, : len(depths)].tolist() == depths
        all_depths += depths
    assert len(set(all_depths)) > 2, all_depths
    assert out.work.run == sum(all_depths)
    assert out.work.rows == len(all_depths)
    assert out.updated == (sum(LAYERS - depth for depth in all_depths) if policy == "update" else 0)


@pytest.mark.parametrize("policy", ["leave", "update"])
@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_scoring_what_was_generated_is_generation(kind: str, policy: str) -> None:
    """Padded prompts too; and the text of another row, which nobody generated here, is read as a batch of one reads it."""
    decoder, width = MambaDecoder(tiny(), exits(kind)), max(LENGTHS)
    out = decoder.generate(**prompts(), max_new_tokens=NEW, policy=policy, end=-1)
    mask = torch.cat([prompts()["attention_mask"], torch.ones(len(LENGTHS), NEW, dtype=torch.int64)], 1)
    told = decoder.score(out.sequences, mask, begin=width, policy=policy)
    assert torch.equal(told.tokens, out.sequences[:, width:])
    assert torch.equal(told.layers_run, out.layers_run)
    assert (told.work, told.updated) == (out.work, out.updated)
    strange = out.sequences.clone()
    strange[:, width:] = out.sequences[:, width:].roll(1, 0)
    told = decoder.score(strange, mask, begin=width, policy=policy)
    for row in range(len(LENGTHS)):
        one = decoder.score(strange[row : row + 1], mask[row : row + 1], begin=width, policy=policy)
        assert torch.equal(told.layers_run[row], one.layers_run[0])
        torch.testing.assert_close(told.log_probs[row], one.log_probs[0], rtol=1e-4, atol=1e-4)


def test_scores_of_closed_exits_are_transformers_log_probabilities() -> None:
    model, text = tiny(), torch.randint(3, WORDS, (3, 9), generator=torch.Generator().manual_seed(2))
    told = MambaDecoder(model, SsmExits([], facts_of(model))).score(text, begin=4)
    wanted = model(text).logits[:, 3:-1].log_softmax(-1)
    torch.testing.assert_close(told.log_probs, wanted.gather(2, text[:, 4:, None])[..., 0], rtol=1e-4, atol=1e-4)
    assert torch.equal(told.tokens, wanted.argmax(-1))
    assert told.work.fraction == 1


def test_the_policies_differ() -> None:
    made = [
        MambaDecoder(tiny(), exits("linear")).generate(**prompts(), max_new_tokens=NEW, policy=p, end=-1)
        for p in ("leave", "update")
    ]
    assert not torch.equal(made[0].sequences, made[1].sequences)


@pytest.mark.parametrize("changes", [{}, {"use_bias": True, "use_conv_bias": False}, {"residual_in_fp32": False}])
def test_closed_exits_are_transformers_own(changes: dict[str, Any]) -> None:
    model = tiny(**changes)
    closed = SsmExits([], facts_of(model))
    out = MambaDecoder(model, closed).generate(**prompts(), max_new_tokens=NEW, end=-1)
    for row, length in enumerate(LENGTHS):
        prompt = prompts()["input_ids"][row : row + 1, -length:]
        wanted = model.generate(prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert out.sequences[row, max(LENGTHS) :].tolist() == wanted[0, length:].tolist()
    assert out.work.fraction == 1


def test_states_of_other_rows_are_not_touched() -> None:
    """Bit for bit, with `step` and with `update`; and both leave the same states behind."""
    one = tiny().backbone.layers[0].mixer
    start = State(torch.randn(5, 40, 4), torch.randn(5, 40, 5))
    seq, x = torch.tensor([3, 1]), torch.randn(2, WIDTH)
    moved = []
    for run in (mixer.step, mixer.update):
        state = State(start.conv.clone(), start.ssm.clone())
        run(one, x, state, seq)
        for row in (0, 2, 4):
            assert torch.equal(state.conv[row], start.conv[row])
            assert torch.equal(state.ssm[row], start.ssm[row])
        for row in (1, 3):
            assert torch.equal(state.conv[row, :, :3], start.conv[row, :, 1:])
            assert not torch.equal(state.ssm[row], start.ssm[row])
        moved.append(state)
    torch.testing.assert_close(moved[0].conv, moved[1].conv)
    torch.testing.assert_close(moved[0].ssm, moved[1].ssm)


def test_one_step_by_hand() -> None:
    """One channel, one state, a kernel of 2, all weights known."""
    config = t.MambaConfig(
        hidden_size=1, expand=1, state_size=1, conv_kernel=2, time_step_rank=1, num_hidden_layers=1, vocab_size=3
    )
    one = t.MambaForCausalLM(config).eval().backbone.layers[0].mixer
    for name, value in {
        "in_proj.weight": [[2.0], [1.0]], "conv1d.weight": [[[0.5, 1.0]]], "conv1d.bias": [0.25],
        "x_proj.weight": [[1.0], [0.5], [2.0]], "dt_proj.weight": [[1.0]], "dt_proj.bias": [0.0], "A_log": [[0.0]], "D": [3.0],
    }.items():  # fmt: skip
        one.get_parameter(name).data = torch.tensor(value)
    state = State(torch.tensor([[[9.0, 4.0]]]), torch.tensor([[[1.5]]]))
    out = mixer.step(one, torch.tensor([[0.5]]), state, torch.tensor([0]))
    # u = 2 * 0.5 = 1, z = 0.5; window (4, 1): 0.5 * 4 + 1 * 1 + 0.25 = 3.25, silu of it is u.
    u = 3.25 / (1 + math.exp(-3.25))
    dt = math.log(1 + math.exp(u))
    h = 1.5 * math.exp(-dt) + dt * (0.5 * u) * u
    y = (h * 2 * u + 3 * u) * (0.5 / (1 + math.exp(-0.5)))
    assert state.conv.tolist() == [[[4.0, 1.0]]]
    assert float(state.ssm) == pytest.approx(h, rel=1e-5)
    assert float(out) == pytest.approx(y, rel=1e-5)


def test_a_repetition_penalty_is_transformers_own() -> None:
    logits, tokens = torch.randn(3, 11), torch.randint(0, 11, (3, 4))
    wanted = t.RepetitionPenaltyLogitsProcessor(1.7)(tokens, logits.clone())
    assert torch.equal(penalised(logits, tokens, torch.ones(3, 4, dtype=torch.bool), 1.7), wanted)
    nothing = torch.zeros(3, 4, dtype=torch.bool)
    assert torch.equal(penalised(logits, tokens, nothing, 1.7), logits), "padding is no token that was said"
    decoder = MambaDecoder(tiny(), exits("linear", 0.0))
    plain = decoder.generate(**prompts(), max_new_tokens=12, end=-1).sequences[:, 6:]
    varied = decoder.generate(**prompts(), max_new_tokens=12, end=-1, repetition_penalty=9.0).sequences[:, 6:]
    assert sum(len(set(row)) for row in varied.tolist()) > sum(len(set(row)) for row in plain.tolist())


@pytest.mark.parametrize("kind", list(CLASSIFIERS))
def test_exits_come_back_from_files(kind: str, tmp_path: Path) -> None:
    points = exits(kind).with_thresholds([0.4, 0.5, math.inf])
    points.save_pretrained(tmp_path)
    found = SsmExits.from_pretrained(tmp_path)
    assert [(p.leave, p.threshold, p.classifier.kind) for p in found] == [(1, 0.4, kind), (3, 0.5, kind), (4, math.inf, kind)]
    x = torch.randn(2, 5, WIDTH)
    for a, b in zip(points, found, strict=True):
        assert torch.equal(a.classifier(x), b.classifier(x))
    manifest = (tmp_path / "exits.json").read_text()
    (tmp_path / "exits.json").write_text(manifest.replace(f'"kind": "{kind}"', '"kind": "os.system"'))
    with pytest.raises(ExitsError, match=r"classifier must be one of linear, ffn, mamba, got 'os\.system'"):
        SsmExits.from_pretrained(tmp_path)
    (tmp_path / "exits.json").write_text(manifest.replace('"width": 20', '"width": 21'))
    with pytest.raises(ExitsError, match=r"damaged|must read 20|must be 20"):
        SsmExits.from_pretrained(tmp_path)


def test_the_callers_exits_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dyndepth.ssm.generate.check_facts", lambda *_: None)  # a model on meta has no weights to compare
    points = copy.deepcopy(exits("linear"))
    decoder = MambaDecoder(copy.deepcopy(tiny()).to("meta"), points)
    assert {value.device.type for value in points.parameters()} == {"cpu"}
    assert {value.device.type for value in decoder.exits.parameters()} == {"meta"}
    assert MambaDecoder(tiny(), points).exits is points


def test_nan_is_said() -> None:
    model = copy.deepcopy(tiny())
    model.backbone.layers[-1].mixer.out_proj.weight.data.fill_(math.nan)
    with pytest.raises(ArgumentError, match="logits of new token 1 hold NaN"):
        MambaDecoder(model, SsmExits([], facts_of(tiny()))).generate(**prompts(), max_new_tokens=3)


def test_what_is_refused() -> None:
    model, points = tiny(), exits("linear")
    decoder, inputs = MambaDecoder(model, points), prompts()
    with pytest.raises(ArgumentError, match="policy must be one of leave, update, got 'copy'"):
        decoder.generate(**inputs, policy="copy")
    with pytest.raises(ArgumentError, match="max_new_tokens must be at least 1, got 0"):
        decoder.generate(**inputs, max_new_tokens=0)
    with pytest.raises(ArgumentError, match="repetition_penalty must be at least 1"):
        decoder.generate(**inputs, repetition_penalty=0.5)
    with pytest.raises(ArgumentError, match="padded on the left"):
        decoder.generate(inputs["input_ids"], inputs["attention_mask"].flip(1))
    for begin in (0, 3, 6):  # column 3 holds the first token of a sequence, column 6 is past the last
        with pytest.raises(ArgumentError, match=f"a column 1 to 5 that is no sequence's first token, got {begin}"):
            decoder.score(**inputs, begin=begin)
    with pytest.raises(ArgumentError, match=r"input_ids must be int64 \[n, t\], not empty"):
        decoder.generate(torch.zeros(0, 3, dtype=torch.int64))
    with pytest.raises(ExitsError, match="made for another mamba of the same size"):
        MambaDecoder(tiny(use_conv_bias=False), points)
    with pytest.raises(UnsupportedModelError, match="wanted a causal LM of type mamba, got BertModel"):
        facts_of(t.BertModel(t.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)))
    with pytest.raises(ExitsError, match="at most one exit per boundary below 6, got"):
        SsmExits([*points, *points], points.model)
    with pytest.raises(ExitsError, match="threshold must be a number"):
        SsmExit(1, points.exits[0].classifier, math.nan)
