"""Exits on disk: round trips, damage, other models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.errors import ExitsError
from dyndepth.exits import (
    Always,
    Band,
    Decay,
    Entropy,
    Exits,
    JumpMap,
    KVMap,
    MlpHead,
    ModelFacts,
    Never,
    NormHead,
    Router,
    RouterScore,
    Schedule,
    TopProbability,
    TranslatorHead,
)
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.fingerprint import check_exits, facts_of
from dyndepth.testing import assert_same

MODEL = tiny_models.shared("llama")


def _rich() -> Exits:
    """Every kind of part in one set."""
    stats_router = tiny_exits.filled(Router(48, 2, silu=True, stats=True), torch.Generator().manual_seed(3))
    return tiny_exits.exits_of(
        MODEL,
        tiny_exits.band(MODEL, 1, 3, threshold=0.25, decay=Decay(2.0, 100)),
        tiny_exits.band(MODEL, 2, 6, RouterScore(stats_router), head="full", shortlist=torch.tensor([3, 8, 100])),
        tiny_exits.band(MODEL, 3, 6, TopProbability(), head="mlp", threshold=math.inf),
        Band(4, 6, Schedule(first=6, last=2, length=9), head=block_head(bind(MODEL), 4)),
        Band(5, 6, head=NormHead()),
    )


def _generated(exits: Exits) -> Any:
    return MODEL.generate(
        **tiny_models.prompts(4), custom_generate=dyndepth.generate, exits=exits, kv="propagate", max_new_tokens=6,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    exits = _rich()
    exits.record = {"made": "by hand", "numbers": [1, 2.5]}
    exits.save_pretrained(tmp_path / "set")
    loaded = Exits.from_pretrained(tmp_path / "set")
    assert loaded.record == exits.record
    assert loaded.model == exits.model
    for one, other in zip(loaded, exits, strict=True):
        assert (one.leave, one.resume, one.threshold, one.decay) == (other.leave, other.resume, other.threshold, other.decay)
        assert one.criterion.kind == other.criterion.kind
        ours, theirs = one.state_dict(), other.state_dict()
        assert sorted(ours) == sorted(theirs)
        for name, value in theirs.items():
            assert_same(ours[name], value, name)
    a, b = _generated(exits), _generated(loaded)
    assert torch.equal(a.sequences, b.sequences)
    assert torch.equal(a.bands_taken, b.bands_taken)
    assert_same(torch.stack(a.logits), torch.stack(b.logits))


def test_saving_twice_keeps_one_set(tmp_path: Path) -> None:
    _rich().save_pretrained(tmp_path)
    tiny_exits.mixed(MODEL).save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert len(Exits.from_pretrained(tmp_path)) == 4


def test_nothing_is_pickled(tmp_path: Path) -> None:
    _rich().save_pretrained(tmp_path)
    manifest = json.loads((tmp_path / "exits.json").read_text())
    assert manifest["format"] == "dyndepth-exits"
    assert manifest["version"] == 1
    assert all(not path.read_bytes().startswith((b"\x80", b"PK")) for path in tmp_path.iterdir())


def test_a_failed_save_leaves_the_old_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at any step: what was there still loads, and no temporary file stays."""
    tiny_exits.mixed(MODEL).save_pretrained(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for target in ("dyndepth.exits.store.save", "pathlib.Path.write_bytes", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(target, full)
            with pytest.raises(OSError, match="No space left"):
                _rich().save_pretrained(tmp_path)
        assert len(Exits.from_pretrained(tmp_path)) == 4
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".tmp", ".staged")]
    assert set(before) <= {path.name for path in tmp_path.iterdir()}


def _saved(folder: Path) -> tuple[Path, Path]:
    _rich().save_pretrained(folder)
    return folder / "exits.json", next(folder.glob("*.safetensors"))


def _edit(manifest: Path, **changes: Any) -> None:
    content = json.loads(manifest.read_text())
    content.update(changes)
    manifest.write_text(json.dumps(content))


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(ExitsError, match=r"exits\.json does not exist"):
        Exits.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_truncated_tensors(tmp_path: Path, keep: int) -> None:
    _, tensors = _saved(tmp_path)
    tensors.write_bytes(tensors.read_bytes()[:keep])
    with pytest.raises(ExitsError, match="is truncated or was changed"):
        Exits.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 100, 900])
def test_truncated_manifest(tmp_path: Path, keep: int) -> None:
    manifest, _ = _saved(tmp_path)
    manifest.write_text(manifest.read_text()[:keep])
    with pytest.raises(ExitsError, match="is damaged"):
        Exits.from_pretrained(tmp_path)


def test_one_flipped_bit(tmp_path: Path) -> None:
    _, tensors = _saved(tmp_path)
    content = bytearray(tensors.read_bytes())
    content[-7] ^= 4
    tensors.write_bytes(content)
    with pytest.raises(ExitsError, match="SHA-256"):
        Exits.from_pretrained(tmp_path)


def test_unknown_version_and_format(tmp_path: Path) -> None:
    manifest, _ = _saved(tmp_path)
    _edit(manifest, version=2)
    with pytest.raises(ExitsError, match="has version 2, this dyndepth reads 1"):
        Exits.from_pretrained(tmp_path)
    _edit(manifest, version=1, format="something")
    with pytest.raises(ExitsError, match="is not a dyndepth-exits file"):
        Exits.from_pretrained(tmp_path)
    manifest.write_text("[1, 2]")
    with pytest.raises(ExitsError, match="is not a dyndepth-exits file"):
        Exits.from_pretrained(tmp_path)


def test_manifest_and_tensors_of_different_sets(tmp_path: Path) -> None:
    manifest, _ = _saved(tmp_path)
    content = json.loads(manifest.read_text())
    for change in (
        {"bands": content["bands"][:-2]},
        {"bands": [{**content["bands"][0], "jump": {"width": 7}}, *content["bands"][1:]]},
        {"bands": [{**content["bands"][0], "criterion": {"kind": "guess"}}, *content["bands"][1:]]},
        {"bands": [{"leave": 1}, *content["bands"][1:]]},
        {"tensors": {"file": "../../etc/passwd", "sha256": "0"}},
        {"tensors": None},
        {"model": {}},
    ):
        manifest.write_text(json.dumps({**content, **change}))
        with pytest.raises(ExitsError):
            Exits.from_pretrained(tmp_path)


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    exits = tiny_exits.mixed(MODEL)
    assert exits.bands[0].jump is not None
    exits.bands[0].jump.weight.data[0, 0] = math.nan
    exits.save_pretrained(tmp_path)
    with pytest.raises(ExitsError, match=r"band \[1, 3\): jump\.weight holds NaN or infinity"):
        Exits.from_pretrained(tmp_path)


# -- made for another model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 8}, "layers must be 6, got 8"),
        ({"hidden_size": 60}, "width must be 48, got 60"),
        ({"vocab_size": 300}, "vocab_size must be 203, got 300"),
    ],
)
def test_other_sizes(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ExitsError, match=f"made for another model: {message}"):
        check_exits(tiny_exits.mixed(MODEL), bind(tiny_models.tiny("llama", **changes)))


def test_other_type() -> None:
    with pytest.raises(ExitsError, match="model_type must be 'llama', got 'qwen3'"):
        check_exits(tiny_exits.mixed(MODEL), bind(tiny_models.shared("qwen3")))


def test_other_weights_of_the_same_size() -> None:
    other = tiny_models.tiny("llama")
    for parameter in other.parameters():
        parameter.data = parameter.data.flip(0).contiguous()
    with pytest.raises(ExitsError, match="its weights differ from this model's"):
        check_exits(tiny_exits.mixed(MODEL), bind(other))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fingerprint_survives_a_change_of_dtype(dtype: torch.dtype) -> None:
    check_exits(tiny_exits.mixed(MODEL), bind(tiny_models.tiny("llama", dtype)))


def test_a_model_still_works_after_a_refusal() -> None:
    model, inputs = tiny_models.tiny("llama"), tiny_models.prompts(2)
    wrong = tiny_exits.mixed(tiny_models.shared("mistral"))
    with pytest.raises(ExitsError, match="made for another model"):
        model.generate(**inputs, custom_generate=dyndepth.generate, exits=wrong, max_new_tokens=3)
    with pytest.raises(ExitsError, match="made for another model"):
        dyndepth.convert(model, wrong)
    assert torch.equal(
        model.generate(**inputs, custom_generate=dyndepth.generate, max_new_tokens=3, do_sample=False),
        model.generate(**inputs, max_new_tokens=3, do_sample=False),
    )


# -- bands that make no sense ---------------------------------------------------------------------------------------------

FACTS = ModelFacts("llama", 6, 48, 203)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Band(0, 3), "wanted 1 <= leave < resume, got leave 0, resume 3"),
        (lambda: Band(3, 3), "wanted 1 <= leave < resume"),
        (lambda: Band(2, 6, threshold=math.nan), r"band \[2, 6\): threshold must not be NaN"),
        (lambda: Band(2, 6, head=NormHead(), jump=JumpMap(4)), "exclude each other"),
        (lambda: Band(2, 4, kv=KVMap(3, 4, 4)), "wanted K,V maps of 2 layers, got 3"),
        (lambda: Band(2, 6, shortlist=torch.tensor([1.0, 2.0])), "shortlist must be int64"),
        (lambda: Exits([Band(2, 9)], FACTS), "the model has 6 layers"),
        (lambda: Exits([Band(2, 4, head=NormHead())], FACTS), "resumes below the top"),
        (lambda: Exits([Band(2, 6, jump=JumpMap(48))], FACTS), "leaves for good, so it wants a head"),
        (lambda: Exits([Band(2, 4, TopProbability())], FACTS), "criterion top_probability reads the exit head's logits"),
        (lambda: Exits([Band(2, 4), Band(2, 6)], FACTS), "two bands leave at boundary 2"),
        (lambda: Exits([Band(2, 6, shortlist=torch.tensor([1, 203]))], FACTS), r"shortlist must hold ids in \[0, 203\)"),
        (lambda: Schedule(first=2, last=5), "depth must not increase"),
        (lambda: Decay(tau=-1.0), "wanted tau >= 0"),
        (lambda: Band(2, 6, Entropy(), decay=Decay()), "decay is made for scores in"),
        (lambda: Band(2.0, 6), "wanted 1 <= leave < resume"),
        (lambda: tiny_exits.mixed(MODEL).with_thresholds([0.5]), "wanted 4 numbers"),
        (lambda: tiny_exits.mixed(MODEL).with_thresholds(math.nan), "not NaN"),
    ],
)
def test_bands_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ExitsError, match=message):
        make()


def test_facts_are_plain() -> None:
    facts = facts_of(bind(MODEL))
    assert (facts.model_type, facts.layers, facts.width, facts.vocab_size) == ("llama", 6, 48, 203)
    # Embedding, then four projections, two norms and the MLP per layer, the final norm and the head.
    assert len(facts.fingerprint) == 1 + 6 * 7 + 2
    assert all(facts.fingerprint)


@pytest.mark.parametrize(
    "part",
    [
        "model.layers.2.self_attn.k_proj",
        "model.layers.4.mlp.down_proj",
        "model.layers.1.input_layernorm",
        "model.norm",
        "lm_head",
    ],
)
def test_a_retrained_module_is_noticed(part: str) -> None:
    exits, model = tiny_exits.mixed(MODEL), tiny_models.tiny("llama")
    weight = model.get_submodule(part).weight
    weight.data = torch.randn_like(weight)
    with pytest.raises(ExitsError, match="fingerprint mismatch"):
        check_exits(exits, bind(model))


def test_a_little_training_everywhere_is_noticed_and_rounding_is_not() -> None:
    exits = tiny_exits.mixed(MODEL)
    for dtype in (torch.bfloat16, torch.float16):
        check_exits(exits, bind(tiny_models.tiny("llama").to(dtype)))
        check_exits(exits, bind(tiny_models.tiny("llama").to(torch.bfloat16).to(dtype)))
    model = tiny_models.tiny("llama")
    for parameter in model.parameters():
        parameter.data *= 1 + 0.01 * torch.randn_like(parameter)
    with pytest.raises(ExitsError, match="fingerprint mismatch"):
        check_exits(exits, bind(model))


@pytest.mark.parametrize("change", ["threshold", "criterion", "weights in place", "weights replaced"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_take_effect(change: str, dtype: torch.dtype) -> None:
    """What generation uses is what the exits are now, also after a first call and a change of dtype."""
    model = tiny_models.tiny("llama", dtype)
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 3, 6, threshold=0.5))
    inputs = tiny_models.prompts(4)

    def run() -> Any:
        return model.generate(
            **inputs, custom_generate=dyndepth.generate, exits=exits, max_new_tokens=5, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip

    before, band = run(), exits.bands[0]
    assert before.work.fraction < 1
    if change == "threshold":
        band.threshold = math.inf
    elif change == "criterion":
        band.criterion = Never()
    elif change == "weights in place":
        with torch.no_grad():
            band.head.up.mul_(0.0)
    else:
        band.head.up = torch.nn.Parameter(torch.zeros_like(band.head.up), requires_grad=False)
    after = run()
    if change in ("threshold", "criterion"):
        assert after.work.fraction == 1
    else:
        assert any(not torch.equal(one, other) for one, other in zip(before.logits, after.logits, strict=False))


def test_maps_of_another_width_are_refused() -> None:
    bound = bind(MODEL)
    for band, name in [
        (Band(2, 4, jump=JumpMap(60)), "jump"),
        (Band(2, 4, kv=KVMap(2, 60, 48)), "K,V maps"),
        (Band(2, 4, RouterScore(Router(60))), "router"),
        (Band(2, 6, head=MlpHead(60, 8)), "mlp"),
        (Band(2, 6, head=TranslatorHead(48, 60, 4)), "translator"),
    ]:
        with pytest.raises(ExitsError, match=rf"{name} must be \["):
            check_exits(Exits([band], facts_of(bound)), bound)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("model", "layers"), "six"),
        (("model", "vocab_size"), 3.5),
        (("model", "fingerprint"), [["a"]]),
        (("model", "fingerprint"), 3),
        (("bands", 0, "leave"), 1.5),
        (("bands", 0, "leave"), True),
        (("bands", 0, "criterion", "router", "silu"), "yes"),
    ],
)
def test_wrong_types_are_found_on_loading(tmp_path: Path, where: tuple[Any, ...], value: Any) -> None:
    tiny_exits.mixed(MODEL).save_pretrained(tmp_path)
    path = tmp_path / "exits.json"
    manifest = json.loads(path.read_text())
    inner = manifest
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path.write_text(json.dumps(manifest))
    with pytest.raises(ExitsError):
        Exits.from_pretrained(tmp_path)


def test_saving_removes_its_own_old_file_only(tmp_path: Path) -> None:
    mine = tmp_path / "exits-of-my-other-model.safetensors"
    mine.write_bytes(b"precious")
    tiny_exits.mixed(MODEL).save_pretrained(tmp_path)
    _rich().save_pretrained(tmp_path)
    assert mine.read_bytes() == b"precious"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_closed_exits_let_nobody_leave() -> None:
    exits = tiny_exits.exits_of(MODEL, Band(1, 6, Always()), Band(3, 6, TopProbability(), threshold=0.0, decay=Decay()))
    closed = exits.closed()
    options: dict[str, Any] = {"max_new_tokens": 4, "return_dict_in_generate": True, "custom_generate": dyndepth.generate}
    inputs = tiny_models.prompts(3)
    assert MODEL.generate(**inputs, exits=exits, **options).work.fraction < 1
    assert MODEL.generate(**inputs, exits=closed, **options).work.fraction == 1
