"""Invariant 6 where drafts skip layers (Draft & Verify): the full model's text, its pages, and which layers run again."""

from __future__ import annotations

import itertools
from typing import Any

import joint
import pytest
import tiny_exits
import tiny_models
import torch
from full_model import FullModel
from torch import Tensor

import dyndepth
from dyndepth.errors import ArgumentError
from dyndepth.exits import Always, Band, Exits, Schedule
from dyndepth.runtime import generate, speculate
from dyndepth.runtime.bind import bind
from dyndepth.runtime.confidence import Confidence

#: Bands of six layers: one, several with the first layer after the embedding, skipping and then leaving, decided per row.
WAYS = ["middle", "several", "skip and leave", "routed", "scheduled"]


def _exits(model: Any, way: str = "middle") -> Exits:
    if way == "routed":
        return tiny_exits.exits_of(model, tiny_exits.band(model, 1, 3), tiny_exits.band(model, 3, 5))
    if way == "scheduled":
        return tiny_exits.exits_of(model, *(Band(at, at + 1, Schedule(at + 1, at - 2, 12)) for at in (2, 3)))
    bands = {
        "middle": [Band(2, 3, Always())],
        "several": [Band(1, 2, Always()), Band(3, 4, Always())],
        "skip and leave": [Band(2, 3, Always()), Band(5, 6, Always())],
    }
    return tiny_exits.exits_of(model, *bands[way])


def _plain(model: Any, inputs: dict[str, Tensor], **options: Any) -> Any:
    return model.generate(**inputs, **({"do_sample": False, "return_dict_in_generate": True} | options))


def _lossless(model: Any, inputs: dict[str, Tensor], exits: Exits, **options: Any) -> Any:
    return _plain(model, inputs, custom_generate=dyndepth.generate, exits=exits, mode="lossless", **options)


def _first(inputs: dict[str, Tensor], batch: int) -> dict[str, Tensor]:
    return {name: value[:batch] for name, value in inputs.items()}


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_greedy_is_the_full_model(family: str, batch: int) -> None:
    model, inputs = tiny_models.shared(family), _first(tiny_models.prompts(5), batch)
    wanted = _plain(model, inputs, max_new_tokens=18)
    found = _lossless(model, inputs, _exits(model), max_new_tokens=18)
    assert torch.equal(found.sequences, wanted.sequences)
    assert found.work.rows == int((found.exit_layers >= 0).sum())
    assert int(found.drafted.sum()) >= 10
    assert int(found.accepted.sum()) == int((found.bands_taken != 0).sum())


@pytest.mark.parametrize("kv", [None, "propagate", "predict", "copy"])
@pytest.mark.parametrize("way", WAYS)
def test_kinds_of_bands_and_what_drafts_leave_each_other(way: str, kv: str | None) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6, seed=8)
    exits = _exits(model, way)
    if kv == "predict":
        for band in exits:
            width = model.config.num_key_value_heads * model.config.head_dim
            maps = dyndepth.exits.KVMap(band.resume - band.leave, width, model.config.hidden_size)
            band.kv = band.kv or tiny_exits.filled(maps, torch.Generator().manual_seed(1))
    wanted = _plain(model, inputs, max_new_tokens=19, output_logits=True)
    for drafts in (1, 5):
        found = _lossless(model, inputs, exits, max_new_tokens=19, output_logits=True, drafts=drafts, kv=kv)
        assert torch.equal(found.sequences, wanted.sequences)
        assert found.kv == (kv or ("predict" if way == "routed" else "none"))
        for step, (mine, theirs) in enumerate(zip(found.logits, wanted.logits, strict=True)):
            alive = found.exit_layers[:, step] >= 0
            torch.testing.assert_close(mine[alive], theirs[alive], rtol=5e-4, atol=5e-4)
        assert 0 < int(found.accepted.sum()) < int(found.drafted.sum())


@pytest.mark.parametrize("options", [{"eos_token_id": list(range(0, 203, 5))}, {"repetition_penalty": 1.7}], ids=str)
def test_ends_inside_drafts_and_processors(options: dict[str, Any]) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(6)
    wanted = _plain(model, inputs, max_new_tokens=20, **options)
    for way in WAYS:
        found = _lossless(model, inputs, _exits(model, way), max_new_tokens=20, **options)
        assert torch.equal(found.sequences, wanted.sequences), way


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("way", ["several", "skip and leave", "routed"])
def test_pages_hold_what_the_full_model_writes(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each verification, every page entry of a final row against transformers' cache; draft K,V would not pass."""
    model, inputs = tiny_models.shared(family), tiny_models.prompts(3)
    checked: list[int] = []
    verify = speculate.Speculation._verify

    def checking(self: Any, *args: Any) -> None:
        before = [each.made for each in self.sequences]
        verify(self, *args)
        for each in self.sequences:
            if each.made > before[each.number] and not each.ended:
                text = self._text(each.number)[each.width - each.prompt :]
                FullModel(model, text).check_pages(self.session, each.number, [6] * each.position)
                checked.append(each.made - before[each.number])

    monkeypatch.setattr(speculate.Speculation, "_verify", checking)
    _lossless(model, inputs, _exits(model, way), max_new_tokens=10, eos_token_id=None, drafts=3)
    assert max(checked) > 1, "a draft must hold for this to test anything"
    assert len(checked) > 6


@pytest.mark.parametrize(("way", "skipped"), [("middle", [2]), ("several", [1, 3]), ("skip and leave", [2, 5])])
@pytest.mark.parametrize("batch", [1, 5])
def test_layers_below_the_first_skipped_one_run_once(batch: int, way: str, skipped: list[int]) -> None:
    """By hooks: a drafted row runs the layers below the lowest band once, those it skipped once, the others twice."""
    model, inputs = tiny_models.tiny("llama"), _first(tiny_models.prompts(5), batch)
    ran: list[int] = [0] * 6
    for number, layer in enumerate(model.model.layers):

        def count(module: Any, args: Any, output: Any, number: int = number) -> None:
            ran[number] += output.shape[0]

        layer.mlp.down_proj.register_forward_hook(count)
    found = _lossless(model, inputs, _exits(model, way), max_new_tokens=16, eos_token_id=None)
    prompt = int(inputs["attention_mask"].sum()) - batch
    assert [layers - prompt for layers in ran] == found.work.layers
    drafted, verified = int(found.drafted.sum()), found.work.rows - int(found.accepted.sum())
    twice = [layer > min(skipped) and layer not in skipped for layer in range(6)]
    assert found.work.layers == [drafted * (1 + again) + verified for again in twice]


def test_pages_of_rejected_drafts_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    seen: list[Any] = []
    kept = generate.Session
    monkeypatch.setattr(generate, "Session", lambda *args, **kwargs: seen.append(kept(*args, **kwargs)) or seen[-1])
    _lossless(model, inputs, _exits(model), max_new_tokens=20, page_size=1, drafts=6)
    assert seen[0].pages.free == seen[0].pages.total


@pytest.mark.parametrize("way", ["middle", "skip and leave"])
def test_sampling_has_the_full_models_distribution(way: str) -> None:
    """Joint distribution of three tokens over 25 x 1,024 samples, with drafting that stops where it is unsure."""
    model = tiny_models.tiny("llama", vocab_size=joint.SMALL)
    exits, prompt, warp = _exits(model, way), torch.tensor([[3, 5, 4]]), {"temperature": 1.1, "top_k": 5}
    wanted = joint.joint(model, prompt, warp, 3)
    generator = torch.Generator().manual_seed(6)
    batch, counts, drafted = 1024, torch.zeros(joint.SMALL**3, dtype=torch.int64), 0
    for _ in range(25):
        inputs = {"input_ids": prompt.expand(batch, -1), "attention_mask": torch.ones(batch, 3, dtype=torch.int64)}
        out = _lossless(
            model, inputs, exits, max_new_tokens=3, do_sample=True, eos_token_id=None, generator=generator, drafts=2,
            confidence=0.4, **warp,
        )  # fmt: skip
        made = out.sequences[:, 3:]
        counts += joint.counted(made)
        drafted += int(out.drafted.sum())
    assert drafted > 15_000
    joint.check(counts, wanted)


# -- when drafting stops ----------------------------------------------------------------------------------------------------


def test_drafting_stops_after_an_unsure_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsure draft is verified too: it was made anyway."""
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    wanted = _plain(model, inputs, max_new_tokens=18).sequences
    most = []
    verify = speculate.Speculation._verify

    def noting(self: Any, *args: Any) -> None:
        most.append(max(len(each.drafts) for each in self.sequences))
        verify(self, *args)

    monkeypatch.setattr(speculate.Speculation, "_verify", noting)
    lengths = {}
    for threshold in (0.0, 0.7, 1.1):
        most.clear()
        found = _lossless(model, inputs, _exits(model), max_new_tokens=18, drafts=5, confidence=threshold)
        assert torch.equal(found.sequences, wanted)
        lengths[threshold] = max(most), int(found.drafted.sum())
    assert lengths[1.1][0] == 1
    assert lengths[0.0][0] == 5
    assert lengths[1.1][1] < lengths[0.7][1] < lengths[0.0][1]


def test_a_threshold_that_follows_what_holds() -> None:
    """By hand: rate 0 -> 0.25 (half of half) is below 0.9: up by a tenth of 0.05; then above 0.2 with drafts to spare: down."""
    gate = Confidence(0.6, target=0.9, step=0.05).begin()
    assert gate.stops(0.59)
    assert not gate.stops(0.6)
    gate.verified(4, 2, 4)
    assert gate.rate == 0.25
    assert gate.threshold == pytest.approx(0.605)
    easy = Confidence(0.6, target=0.2, step=0.05).begin()
    easy.verified(3, 3, 4)
    assert easy.threshold == pytest.approx(0.595)
    easy.verified(4, 4, 4)  # as many drafts as there may be: a lower threshold would change nothing
    assert easy.threshold == pytest.approx(0.595)
    still = Confidence(0.6).begin()
    still.verified(4, 0, 4)
    assert still.threshold == 0.6
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(4)
    wanted = _plain(model, inputs, max_new_tokens=18).sequences
    found = _lossless(model, inputs, _exits(model), max_new_tokens=18, confidence=Confidence(0.3, target=0.8, step=0.5))
    assert torch.equal(found.sequences, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kv": "recompute"},
            "in the layers they skip and may not be recompute or release",
        ),
        ({"mode": "dynamic", "kv": "none", "confidence": 0.5}, "confidence stops drafting, which mode='dynamic' does not do"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    model, inputs = tiny_models.shared("llama"), tiny_models.prompts(2)
    with pytest.raises(ArgumentError, match=message):
        model.generate(
            **inputs,
            custom_generate=dyndepth.generate,
            max_new_tokens=3,
            exits=_exits(model),
            **({"mode": "lossless"} | options),
        )
    with pytest.raises(ArgumentError, match="Confidence: wanted a threshold"):
        Confidence(0.5, target=1.5)


def test_the_bits_are_those_of_full_depth() -> None:
    """bfloat16 on the CPU's kernels: verified rows are computed as they would be alone."""
    model = tiny_models.tiny("llama", torch.bfloat16)
    if isinstance(bind(model).stack, str):
        pytest.skip(f"layers run through their modules here: {bind(model).stack}")
    inputs = tiny_models.prompts(7)
    full = _plain(model, inputs, custom_generate=dyndepth.generate, max_new_tokens=24, output_logits=True)
    for way, batch in itertools.product(("several", "routed"), (1, 7)):
        found = _lossless(model, _first(inputs, batch), _exits(model, way), max_new_tokens=24, output_logits=True)
        width = min(found.sequences.shape[1], full.sequences.shape[1])
        assert torch.equal(found.sequences[:, :width], full.sequences[:batch, :width])
        for mine, theirs, there in zip(found.logits, full.logits, (found.exit_layers >= 0).T, strict=False):
            assert torch.equal(mine[there], theirs[:batch][there])
