"""Calls of a pass against a pass that counts; lower bounds, sizes, errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch
from counting import counting

from dyndepth.errors import ArgumentError, UnsupportedModelError
from dyndepth.exits import Exits, Router, RouterScore, TopProbability
from dyndepth.op import REGISTRY, backend
from dyndepth.plan import Call, Leaving, Machine, Shape, Sizes, calls, peak, roofline
from dyndepth.plan.passes import total
from dyndepth.plan.sizes import KINDS
from dyndepth.plan.traffic import Traffic
from dyndepth.runtime.bind import bind
from dyndepth.runtime.session import Session

CONTEXT, PAGE = 11, 4


def counted(model: Any, rows: int, exits: Exits | None, kv: str | None) -> tuple[Counter[tuple[str, int]], list[int]]:
    """One decode pass of `rows` sequences and its LM head: calls, and the boundaries where rows left."""
    tokens = torch.randint(3, tiny_models.VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(5))
    bound = bind(model)
    session = Session(bound, [CONTEXT] * rows, exits, kv=kv, page_size=PAGE)
    session.prefill(list(tokens[:, :-1]), session.work())
    given: dict[str, Any] = {"tokens": tokens[:, -1]}
    with backend("torch"):  # what is made on first use is made
        session.run(range(rows), [CONTEXT - 1] * rows, **given)
    with counting(model) as mode:
        result = session.run(range(rows), [CONTEXT - 1] * rows, **given)
        bound.logits(result.ready)
    return mode.seen, result.exit_layer.tolist()


def planned(found: list[Call]) -> Counter[tuple[str, int]]:
    seen: Counter[tuple[str, int]] = Counter()
    for call in found:
        seen[call.op, call.traffic.bytes] += call.count
    return seen


def routed(model: Any, thresholds: dict[int, float]) -> Exits:
    """Norm heads behind random routers of one neuron, with K,V maps."""
    bands = []
    for leave, threshold in thresholds.items():
        router = tiny_exits.filled(Router(48), torch.Generator().manual_seed(leave), 30.0)
        bands.append(tiny_exits.band(model, leave, 6, RouterScore(router), head="norm", threshold=threshold))
    return tiny_exits.exits_of(model, *bands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_full_pass_is_counted(name: str, rows: int, dtype: torch.dtype) -> None:
    """Every call and every byte of it, biases, norms of q and k, and windows included."""
    model = tiny_models.tiny(name, dtype)
    seen, _ = counted(model, rows, None, None)
    item = torch.empty(0, dtype=dtype).element_size()
    found = calls(Sizes.of(model), rows, CONTEXT, item=item, page_size=PAGE)
    assert planned(found) == seen
    number, moved = total(found)
    more = {"gemma2": 2 * 6 + 1 + 3, "gemma3": 2 * 6 + 1}  # norms behind attention and MLP, scaled embeddings, capped logits
    assert number == sum(seen.values()) == 12 * 6 + 3 + more.get(name, 0)
    assert moved.bytes == sum(size * count for (_, size), count in seen.items())


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3", "gemma2", "gemma3"])
@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("judge", ["router", "statistics"])
@pytest.mark.parametrize("everybody", [False, True])
def test_a_pass_with_exits_is_counted(name: str, kv: str, judge: str, everybody: bool) -> None:
    """Some leave at two boundaries and some stay; or at the second all that are left leave, and layers above do not run."""
    model, rows = tiny_models.shared(name), 12
    last = 0.0 if everybody else 0.5
    exits = routed(model, {2: 0.5, 4: last})
    words = 0
    if judge == "statistics":
        # Over all words Gemma's heads are sure of everything, or of nothing.
        short = torch.tensor([3, 9, 20]) if name.startswith("gemma") else None
        words = tiny_models.VOCABULARY if short is None else len(short)
        first, then = {"gemma2": (0.8, 0.8), "gemma3": (0.99, 0.99)}.get(name, (0.98, 0.97))
        options: dict[str, Any] = {"head": "norm", "shortlist": short}
        bands = [tiny_exits.band(model, 2, 6, TopProbability(), threshold=first, **options)]
        bands.append(tiny_exits.band(model, 4, 6, TopProbability(), threshold=0.0 if everybody else then, **options))
        exits = tiny_exits.exits_of(model, *bands)
    seen, went = counted(model, rows, exits, kv)
    assert 0 < went.count(2) < rows
    assert went.count(4) > 0
    assert (went.count(6) == 0) == everybody
    taken = [Leaving(leave, went.count(leave), words) for leave in (2, 4)]
    assert planned(calls(Sizes.of(model), rows, CONTEXT, taken, kv=kv, item=4, page_size=PAGE)) == seen


@pytest.mark.parametrize("kv", ["predict", "propagate"])
def test_boundaries_are_judged_while_somebody_is_there(kv: str) -> None:
    """Nobody leaves at 2, all leave at 4, nobody is left to be judged at 5."""
    model = tiny_models.shared("llama")
    seen, went = counted(model, 3, routed(model, {2: 2.0, 4: -1.0, 5: -1.0}), kv)
    assert went == [4, 4, 4]
    taken = [Leaving(2, 0), Leaving(4, 3), Leaving(5, 0)]
    assert planned(calls(Sizes.of(model), 3, CONTEXT, taken, kv=kv, item=4, page_size=PAGE)) == seen


# -- bounds, sizes, errors ------------------------------------------------------------------------------------------------

TOY = Machine("toy", "bfloat16", bandwidth=10.0, flops=100.0)


def test_bounds_by_hand() -> None:
    """10 bytes/s and 100 FLOP/s: 50 bytes take 5 s, 600 FLOPs 6 s."""
    assert roofline.bound(TOY, Traffic(50, 400)) == (5.0, "memory")
    assert roofline.bound(TOY, Traffic(50, 600)) == (6.0, "compute")
    two = (Call("product", "", Traffic(50, 400), 3), Call("norm", "", Traffic(10, 200)))
    line = roofline.PassLine("", 1, two)
    assert (line.launches, line.traffic) == (4, Traffic(160, 1400))
    assert line.seconds(TOY) == 3 * 5.0 + 2.0, "every call waits for what it waits for"


def test_sheets_are_taken_whole() -> None:
    """Twice the figures, with sparsity, would be no lower bound; nine tenths of them neither."""
    found = {name: (peak(name).flops / 1e12, peak(name).bandwidth / 1e12) for name in ("h100-sxm", "h200", "b200", "mi300x")}
    assert found == {"h100-sxm": (989, 3.35), "h200": (989, 4.8), "b200": (2250, 7.7), "mi300x": (1307.4, 5.3)}
    assert peak("h100-sxm", "float32").flops == 67e12
    assert "data sheet" in peak("mi300x").source
    with pytest.raises(ArgumentError, match=r"machine: wanted here or one of a10, .*, got 'h1000'"):
        peak("h1000")


def test_a_full_pass_of_llama_3_8b() -> None:
    """Weights are 218.1 M a layer and 525.3 M in the head; K,V 4096 bytes a token and layer; the rest is small."""
    rows, context = 32, 2048
    no_exit, predict, propagate = roofline.passes(Sizes.known("Llama-3-8B"), rows, context)
    weights = 2 * (32 * 218_103_808 + 128256 * 4096)
    kv = 32 * rows * context * 4096
    assert 0 < no_exit.traffic.bytes / (weights + kv) - 1 < 0.02
    # Half of the rows read no K,V in half of the layers; maps of 16 layers are read, or nothing more.
    saved = no_exit.traffic.bytes - propagate.traffic.bytes
    assert saved / (kv / 4) == pytest.approx(1, abs=0.05)
    maps = 16 * 2048 * 4096 * 2
    assert (predict.traffic.bytes - propagate.traffic.bytes) / maps == pytest.approx(1, abs=0.05)
    # A router, a norm, a partition, and a back-fill only where K,V do not ride along.
    assert (predict.launches, propagate.launches) == (no_exit.launches + 4, no_exit.launches + 3)


def test_ops_come_in_one_order() -> None:
    sizes = Sizes.known("Qwen3-8B")
    small, large = roofline.ops(sizes, 1, 64), roofline.ops(sizes, 256, 64)
    assert [(line.op, line.what) for line in small] == [(line.op, line.what) for line in large]
    assert {line.op for line in small} == set(REGISTRY) - {"accept_drafts"}
    assert all(few.traffic.bytes < many.traffic.bytes for few, many in zip(small, large, strict=True))
    h100 = peak("h100-sxm")
    assert {roofline.bound(h100, line.traffic)[1] for line in small} == {"memory"}
    head = next(line for line in roofline.ops(sizes, 512, 64) if line.what == "LM head")
    assert roofline.bound(h100, head.traffic)[1] == "compute", "512 rows are beyond 295 FLOPs per byte"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_sizes_are_those_of_shape(name: str) -> None:
    """The planner's two views of a model agree."""
    config = tiny_models.shared(name).config
    sizes, shape = Sizes.of(config), Shape.of(config)
    assert sizes.width * (2 * sizes.query + sizes.kv) + 3 * sizes.width * sizes.inner == shape.layer
    assert (sizes.layers, sizes.kv, sizes.windows) == (shape.layers, shape.kv, shape.windows)
    assert sizes.vocab * sizes.width == shape.head


def test_known_sizes() -> None:
    """Parameters of the published models: 134.5 M, 8.03 B, 8.19 B, 2.61 B, 3.88 B (text); small ones tie head and embedding."""
    found = {}
    large = ("Llama-3-8B", "Qwen3-8B")
    for name in ("SmolLM2-135M", *large, "Gemma-2-2B", "Gemma-3-4B"):
        s, tied = Sizes.known(name), name not in large
        norms = (2 + 2 * s.sandwich) * s.width + (2 * s.head_dim if s.qk_norm else 0)
        layer = s.width * (2 * s.query + s.kv) + 3 * s.width * s.inner + norms
        found[name] = s.layers * layer + s.width + (1 if tied else 2) * s.vocab * s.width
    assert found == {
        "SmolLM2-135M": 134_515_008, "Llama-3-8B": 8_030_261_248, "Qwen3-8B": 8_190_735_360, "Gemma-2-2B": 2_614_341_888,
        "Gemma-3-4B": 3_880_263_168,
    }  # fmt: skip
    assert Sizes.demo() == Sizes.known("SmolLM2-135M")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: Sizes.known("GPT-5"),
            "wanted one of SmolLM2-135M, Llama-3-8B, Qwen3-8B, Gemma-2-2B, Gemma-3-4B, got 'GPT-5'",
        ),
        (lambda s: calls(s, 0, 5), "at least one row and a context of at least 1, got 0, 5"),
        (lambda s: calls(s, 1, 0), "at least one row and a context of at least 1, got 1, 0"),
        (lambda s: calls(s, 4, 5, kv="copy"), "kv must be one of predict, propagate, got 'copy'"),
        (lambda s: calls(s, 4, 5, [Leaving(30, 1)]), r"different boundaries in \[1, 30\), got \[30\]"),
        (lambda s: calls(s, 4, 5, [Leaving(3, 1), Leaving(3, 1)]), r"different boundaries in \[1, 30\), got \[3, 3\]"),
        (lambda s: calls(s, 4, 5, [Leaving(3, 3), Leaving(5, 2)]), r"4 rows cannot leave as \[3, 2\]"),
        (lambda s: calls(s, 4, 5, [Leaving(3, 1, resume=5)]), "only exits for good through the final norm"),
        (lambda s: calls(s, 4, 5, [Leaving(3, 1, head="block")]), "only exits for good through the final norm"),
        (lambda s: calls(s, 4, 5, [Leaving(3, 1, neurons=0)]), "judged by a router or by statistics, are known, got Leaving"),
        (lambda s: calls(s, 4, 5, [Leaving(3, -1)]), r"4 rows cannot leave as \[-1\]"),
    ],
)
def test_errors(call: Callable[[Sizes], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(Sizes.demo())


def test_other_families_are_refused() -> None:
    """Their layers run other modules: figures for them would be wrong without a word."""
    for name in set(tiny_models.FAMILIES) - {"llama_bias", "gemma3", *KINDS}:
        with pytest.raises(
            UnsupportedModelError, match="the roofline knows layers of llama, mistral, qwen2, qwen3, gemma2, gemma3_text, got"
        ):
            Sizes.of(tiny_models.shared(name))
