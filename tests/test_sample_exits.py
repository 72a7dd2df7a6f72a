"""Files of sample exits: everything comes back, sharing included; what is damaged is an error, never code that runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import CLASSES, WIDTH, criteria, exits, inputs, model

import dyndepth
from dyndepth import Exits, SampleExits
from dyndepth.encoders import CtcHead, FrameEntropy, LinearHead, ModelHead, QExit, RegressionPatience, SampleExit, facts_of
from dyndepth.errors import ExitsError
from dyndepth.exits import TopProbability


@pytest.mark.parametrize("kind", criteria())
def test_round_trip(kind: str, tmp_path: Path) -> None:
    found = exits("bert", kind, 0.3, record={"made": "by a test"})
    found.save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    assert again.record == {"made": "by a test"}
    assert [type(point.criterion) for point in again] == [type(point.criterion) for point in found]
    batch = inputs("bert")
    one, other = (dyndepth.DynamicEncoder(model("bert"), e)(**batch) for e in (found, again))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.exit_layers, other.exit_layers)


def test_sharing_survives(tmp_path: Path) -> None:
    """PALBERT's one classifier and one lambda head stay one."""
    facts = facts_of(model("bert"))
    judge = exits("bert", "q_exit").exits[0].judge
    head = LinearHead(WIDTH, CLASSES, dense=True)
    shared = SampleExits([SampleExit(at, head, QExit(module=judge), 0.5) for at in (1, 3)], facts)
    shared.save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    first, second = again
    assert first.head is second.head
    assert first.judge is second.judge is first.criterion.module is second.criterion.module  # type: ignore[attr-defined]
    half = model("bert", torch.bfloat16)
    moved = dyndepth.DynamicEncoder(half, SampleExits(again, facts_of(half)))._exits
    assert next(iter(moved)).head is [*moved][1].head
    assert next(iter(moved)).criterion.module is next(iter(moved)).judge  # type: ignore[attr-defined]


def test_shared_parts_of_heads_stay_one(tmp_path: Path) -> None:
    """PABEE's pooler: one dense layer under all classifiers before and after, kept once; another size is refused."""
    facts = facts_of(model("bert"))
    heads = [LinearHead(WIDTH, CLASSES, dense=True) for _ in range(3)]
    for head in heads:
        head.dense = heads[0].dense
    SampleExits([SampleExit(at, head, TopProbability()) for at, head in enumerate(heads, 1)], facts).save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    loaded = [point.head for point in again]
    assert all(isinstance(head, LinearHead) and head.dense is loaded[0].dense for head in loaded)  # type: ignore[union-attr]
    assert len({id(head.out) for head in loaded}) == 3  # type: ignore[union-attr]
    for old, new in zip(heads, loaded, strict=True):
        assert {name: value.tolist() for name, value in new.state_dict().items()} == {
            name: value.tolist() for name, value in old.state_dict().items()
        }
    assert sum(p.numel() for p in again.parameters()) == WIDTH * (WIDTH + 1) + 3 * CLASSES * (WIDTH + 1)
    again.save_pretrained(tmp_path / "again")
    kept = [path.read_bytes() for folder in (tmp_path, tmp_path / "again") for path in folder.glob("*.safetensors")]
    assert len(kept) == 2
    assert kept[0] == kept[1]
    text = (tmp_path / "exits.json").read_text()
    for wrong, said in (
        ('"dense": "0.head.out"', "another kind or size"),
        ('"dense": "9.head.dense"', "is damaged"),
        ('"": "0.head.dense"', "another kind or size"),
        ('"norm": "0.head.dense"', "another kind or size|is damaged"),
    ):
        assert text.count('"dense": "0.head.dense"') == 2
        (tmp_path / "exits.json").write_text(text.replace('"dense": "0.head.dense"', wrong))
        with pytest.raises(ExitsError, match=said):
            SampleExits.from_pretrained(tmp_path)


def test_regression_patience_wants_answers_per_sample() -> None:
    with pytest.raises(ExitsError, match="criterion regression_patience reads answers per sample, a head of kind ctc"):
        SampleExit(1, CtcHead(WIDTH, 1), RegressionPatience(), 1.0)


def test_other_parts_come_back(tmp_path: Path) -> None:
    base = model("bert").bert
    final = CtcHead(WIDTH, 6, norm=True)
    points = [SampleExit(1, CtcHead(WIDTH, 6), FrameEntropy(), -0.25)]
    SampleExits(points, facts_of(base, final), final=final).save_pretrained(tmp_path)
    again = SampleExits.from_pretrained(tmp_path)
    assert isinstance(again.final, CtcHead)
    assert torch.equal(again.final.out.weight, final.out.weight)
    SampleExits([SampleExit(2, ModelHead(), TopProbability())], facts_of(model("bert"))).save_pretrained(tmp_path)
    assert len(SampleExits.from_pretrained(tmp_path)) == 1
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def _edited(folder: Path, change: Any) -> None:
    manifest = json.loads((folder / "exits.json").read_text())
    change(manifest)
    (folder / "exits.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=9), "version 9"),
        (lambda m: m.update(format="other"), "not a dyndepth-sample-exits"),
        (lambda m: m["exits"][0]["criterion"].update(kind="eval"), "criterion must be one of"),
        (lambda m: m["exits"][0]["head"].update(kind="eval"), "head must be one of"),
        (lambda m: m["exits"][0]["head"].pop("settings"), "damaged"),
        (lambda m: m["exits"][0]["head"]["settings"].update(width=8), "damaged"),
        (lambda m: m["exits"][0]["criterion"].update(unknown=1), "damaged"),
        (lambda m: m["exits"].pop(), "describes"),
        (lambda m: m["exits"][0].update(head={"same_as": "9.head"}), "damaged"),
        (lambda m: m["exits"][0].update(threshold="nan"), "NaN"),
        (lambda m: m["model"].update(layers=0), "damaged"),
        (lambda m: m["exits"][1].update(leave=1), "at most one exit"),
        (lambda m: m["exits"][0].update(head=m["exits"][0]["judge"]), "describes|damaged|head"),
    ],
)
def test_damage_is_named(change: Any, message: str, tmp_path: Path) -> None:
    exits("bert", "q_exit", 0.5).save_pretrained(tmp_path)
    _edited(tmp_path, change)
    with pytest.raises(ExitsError, match=message):
        SampleExits.from_pretrained(tmp_path)


def test_tensors_are_checked(tmp_path: Path) -> None:
    found = exits("bert", "margin", 0.5)
    found.save_pretrained(tmp_path)
    data = next(tmp_path.glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-3])
    with pytest.raises(ExitsError, match="truncated"):
        SampleExits.from_pretrained(tmp_path)
    next(iter(found)).head.out.bias.data[0] = torch.nan
    found.save_pretrained(tmp_path)
    with pytest.raises(ExitsError, match="NaN or infinity"):
        SampleExits.from_pretrained(tmp_path)
    with pytest.raises(ExitsError, match="does not exist"):
        SampleExits.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ExitsError, match="not a dyndepth-exits"):
        Exits.from_pretrained(tmp_path)


def test_a_head_is_no_judge(tmp_path: Path) -> None:
    exits("bert", "q_exit", 0.5).save_pretrained(tmp_path)
    _edited(tmp_path, lambda m: m["exits"][1].update(judge={"same_as": "0.head"}))
    with pytest.raises(ExitsError, match="refer to a head"):
        SampleExits.from_pretrained(tmp_path)
