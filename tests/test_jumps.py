"""Jumps beyond the linear one: their formulas, files, runtime use, starts and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import tiny_exits
import tiny_models
import torch
from tiny_training import SETTINGS, looks, texts

import dyndepth
import dyndepth.training
from dyndepth.errors import ArgumentError, ExitsError
from dyndepth.exits import AdapterJump, Band, Exits, JumpMap, MlpJump
from dyndepth.runtime.bind import bind
from dyndepth.runtime.fingerprint import check_exits
from dyndepth.runtime.score import score
from dyndepth.training.config import TrainConfig
from dyndepth.training.starts import start_jump

WIDTH = 48


def _jump(kind: str, layers: int = 2) -> Any:
    made = {
        "mlp": lambda: MlpJump(WIDTH, 20),
        "adapter": lambda: AdapterJump(WIDTH, layers, 12),
        "adapter alone": lambda: AdapterJump(WIDTH, layers, 12, linear=False),
    }[kind]()
    return tiny_exits.filled(made, torch.Generator().manual_seed(5))


KINDS = ["mlp", "adapter", "adapter alone"]


def _norm(x: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _by_hand(jump: Any, h: torch.Tensor) -> torch.Tensor:
    """The formulas of the docstrings, written out on one row after the other."""
    rows = []
    for row in h.double():
        linear = None if jump.linear is None else jump.linear.weight.double() @ _norm(row) + jump.linear.bias.double()
        if isinstance(jump, MlpJump):
            rows.append(row + linear + jump.down.double() @ _silu(jump.up.double() @ _norm(row)))
            continue
        stream = row
        for j in range(jump.up.shape[0]):
            x = _norm(stream)
            stream = stream + jump.down[j].double() @ (_silu(jump.gate[j].double() @ x) * (jump.up[j].double() @ x))
        rows.append(stream if linear is None else stream + linear)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind: str) -> None:
    h = torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1)) * 3
    jump = _jump(kind)
    torch.testing.assert_close(jump(h).double(), _by_hand(jump, h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(jump.bfloat16()(h.bfloat16()).double(), _by_hand(jump, h.bfloat16()), rtol=0.05, atol=0.15)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_use_them_and_files_keep_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the oracle, one token at a time, whose jump is the formula by hand; and again after a round trip."""
    model = tiny_models.shared("llama")
    low, high = tiny_exits.band(model, 1, 3), tiny_exits.band(model, 3, 5)
    low.jump, high.jump = _jump(kind), _jump(kind)
    exits = tiny_exits.exits_of(model, low, high, tiny_exits.band(model, 5, 6))
    tokens = torch.randint(3, tiny_models.VOCABULARY, (22,), generator=torch.Generator().manual_seed(2))
    scored = score(model, [tokens], exits, start=[3], kv="predict")
    assert len(set(scored.bands_taken.tolist())) > 2
    monkeypatch.setattr(oracle, "jumped", lambda band, h: _by_hand(band.jump, h).float())
    told = oracle.Oracle(model, exits, "predict", 3).run(tokens)
    assert scored.bands_taken.tolist() == told.bands
    torch.testing.assert_close(scored.logits(), torch.stack(told.logits), rtol=1e-3, atol=1e-3)
    exits.save_pretrained(tmp_path)
    again = score(model, [tokens], Exits.from_pretrained(tmp_path), start=[3], kv="predict")
    assert torch.equal(again.ready, scored.ready)


def test_files_and_widths_that_do_not_fit(tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    band = tiny_exits.band(model, 1, 3)
    band.jump = _jump("adapter")
    tiny_exits.exits_of(model, band).save_pretrained(tmp_path)
    manifest = tmp_path / "exits.json"
    content = json.loads(manifest.read_text())
    for change, message in (
        ({"kind": "guess"}, "jump must be one of linear, mlp, adapter, got 'guess'"),
        ({"inner": 7}, "damaged"),
    ):
        wrong = json.loads(json.dumps(content))
        wrong["bands"][0]["jump"].update(change)
        manifest.write_text(json.dumps(wrong))
        with pytest.raises(ExitsError, match=message):
            Exits.from_pretrained(tmp_path)
    with pytest.raises(ExitsError, match=r"band \[1, 4\): wanted adapters of 3 layers, got 2"):
        Band(1, 4, jump=_jump("adapter"))
    for jump in (MlpJump(60, 8), AdapterJump(60, 2, 8)):
        with pytest.raises(ExitsError, match=r"jump must be \[48\] for this model, got \[60\]"):
            check_exits(tiny_exits.exits_of(model, Band(1, 3, jump=jump)), bind(model))


@pytest.mark.parametrize("kind", ["mlp", "adapter"])
def test_starts_say_what_the_linear_jump_says(kind: str) -> None:
    band = tiny_exits.band(tiny_models.shared("llama"), 1, 4)
    started = start_jump(kind, band, None, torch.Generator().manual_seed(0))
    assert isinstance(started, MlpJump | AdapterJump)
    assert band.jump is not None
    h = torch.randn(5, WIDTH)
    torch.testing.assert_close(started(h), band.jump(h), rtol=1e-6, atol=1e-5)
    assert float(started.up.abs().min()) > 0, "a gradient must reach the zeros in `down`"
    assert started.linear is not band.jump
    assert start_jump("linear", band, None, torch.Generator()) is band.jump
    with pytest.raises(ArgumentError, match="jump must be one of linear, mlp, adapter, got 'cubic'"):
        start_jump("cubic", band, None, torch.Generator())
    with pytest.raises(ArgumentError, match=r"band \[4, 6\) has no linear jump"):
        start_jump(kind, tiny_exits.band(tiny_models.shared("llama"), 4, 6), None, torch.Generator())


@pytest.mark.parametrize("kind", ["mlp", "adapter"])
def test_tuning_teaches_them(kind: str, tmp_path: Path) -> None:
    model = tiny_models.shared("llama")
    fitted = dyndepth.fit(model, texts(400), candidates=[(1, 3)], tokens=6000, own=0.0, agreement=0.3, progress=False)
    assert isinstance(fitted.bands[0].jump, JumpMap)
    fitted.bands[0].jump.bias.data += 0.5  # ridge is nearly the best there is on a random model
    config = TrainConfig.of(SETTINGS | {"own": 0.0, "corpus": 6000, "tokens": 15_000, "lr": 3e-3})
    tuned = dyndepth.training.tune_maps(model, fitted, texts(400), output=tmp_path, config=config, jump=kind, progress=False)
    seen = looks(tmp_path)
    assert seen[-1]["1"]["kl"] < 0.96 * seen[0]["1"]["kl"]
    jump = tuned.bands[0].jump
    assert isinstance(jump, MlpJump | AdapterJump)
    assert jump.kind == kind
    assert float(jump.down.abs().max()) > 0, "what started at zero has learned"
    assert tuned.record["tuned_maps"]["jump"] == kind
    assert isinstance(Exits.from_pretrained(tmp_path / "exits").bands[0].jump, type(jump))
