"""Stack: layers of the Llama kind in one call of C++, against their modules and against a witness in float64."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import layers_witness
import pytest
import tiny_exits
import tiny_models
import torch
from torch import Tensor

from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.climb import apart
from dyndepth.runtime.layer import Context
from dyndepth.runtime.session import Session
from dyndepth.runtime.stack import Stack
from dyndepth.testing import assert_as_exact_as, assert_same

FAMILIES = ["llama", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [13, 1, 21]  # longer than every window of tiny_models
#: Widths that matrix tiles take (multiples of 32) and head sizes that stay in registers.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 64, "num_attention_heads": 4}


@functools.cache
def bound(family: str, dtype: torch.dtype, *, wide: bool = False) -> Model:
    return bind(tiny_models.tiny(family, dtype, **(WIDE if wide else {})))


def without_stack(model: Model) -> Model:
    return dataclasses.replace(model, stack="the modules are asked for")


@dataclasses.dataclass
class Given:
    """The arguments of a run of layers: ragged sequences from their first token on, in any order of rows."""

    session: Session
    hidden: Tensor
    seq: Tensor
    pos: Tensor
    slots: Tensor
    context: Context

    def ran(self, live: int, begin: int = 0, end: int = tiny_models.LAYERS) -> tuple[Tensor, Tensor]:
        """Residuals and K,V [layers, 2, rows, ...] after the model's own way of running layers; the givens stay."""
        model, hidden = self.session.model, self.hidden.clone()
        pages = self.context.pages.clone()
        context = dataclasses.replace(self.context, pages=pages)
        if isinstance(model.stack, Stack):
            model.stack.run(begin, end, hidden, live, self.seq, self.pos, self.slots, context)
        else:
            for layer in model.layers[begin:end]:
                layer.run(hidden, live, len(hidden), self.seq, self.pos, self.slots, context)
        return hidden, pages.flatten(2, 3)[:, :, self.slots.long()]


def given(model: Model, lengths: list[int] = LENGTHS, *, page_size: int = 5, order: Tensor | None = None) -> Given:
    generator = torch.Generator().manual_seed(4)
    seq = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    pos = torch.cat([torch.arange(length) for length in lengths])
    tokens = torch.randint(3, tiny_models.VOCABULARY, (len(seq),), generator=generator)
    order = torch.arange(len(seq)) if order is None else order
    session = Session(model, lengths, page_size=page_size)
    session.pages.kv.zero_()
    rows, context = session.rows(seq[order], pos[order], tokens=tokens[order])
    return Given(session, rows.hidden, rows.seq, rows.pos, rows.slots, context)


def stacked(model: Model) -> Stack:
    assert isinstance(model.stack, Stack), model.stack
    return model.stack


def check(model: Model, live: int | None = None, order: Tensor | None = None, factor: float = 3.0) -> None:
    """Residuals and K,V about as exact as those of the modules (errors add up over layers), rows past `live` untouched."""
    stacked(model)
    mine = given(model, order=order)
    live = len(mine.hidden) if live is None else live
    hidden, kv = mine.ran(live)
    other = given(without_stack(model), order=order)
    reference, reference_kv = other.ran(live)
    assert mine.context.cos is not None
    assert mine.context.sin is not None
    span = range(tiny_models.LAYERS)
    told = layers_witness.run(model, mine.hidden, live, mine.seq, mine.pos, mine.context.cos, mine.context.sin, span)
    assert_as_exact_as(hidden[:live], reference[:live], told.hidden[:live], what="residuals", factor=factor)
    assert_same(hidden[live:], mine.hidden[live:], "residuals past live")
    for layer in span:
        for part, truth in enumerate((told.keys[layer], told.values[layer])):
            what = f"{'KV'[part]} of layer {layer}"
            assert_as_exact_as(kv[layer, part], reference_kv[layer, part], truth, what=what, factor=factor)


# -- the same numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wide", [False, True], ids=["odd", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_as_exact_as_the_modules(family: str, dtype: torch.dtype, wide: bool) -> None:
    check(bound(family, dtype, wide=wide))


@pytest.mark.parametrize("live", [0, 1, 11, 34])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_only_give_their_keys_and_values(family: str, dtype: torch.dtype, live: int) -> None:
    """Propagation: rows past `live`, of the same sequences as live rows and of others, in no order."""
    check(bound(family, dtype), live, torch.randperm(sum(LENGTHS), generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh"])
def test_activations(activation: str) -> None:
    check(bind(tiny_models.tiny("llama", hidden_act=activation)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_spans_of_layers(family: str, dtype: torch.dtype) -> None:
    """[0, 6) at once, in two spans and layer by layer: the same bits, and only the pages of those layers are written."""
    mine = given(bound(family, dtype))
    whole, kv = mine.ran(20)
    for cuts in ([0, 2, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]):
        hidden = mine.hidden
        for begin, end in itertools.pairwise(cuts):
            hidden, part = dataclasses.replace(mine, hidden=hidden).ran(20, begin, end)
            assert_same(part[begin:end], kv[begin:end], f"K,V of [{begin}, {end})")
            assert not bool(part[:begin].any())
            assert not bool(part[end:].any())
        assert_same(hidden, whole, f"residuals, {cuts}")


# -- a row does not depend on the others ----------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("wide", [False, True], ids=["odd", "tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_invariance(family: str, dtype: torch.dtype, wide: bool, threads: Callable[[int], None]) -> None:
    """Whole passes, embedding to logits: all sequences in one pass, in chunks, shuffled, alone, token by token, under one
    thread or two, whatever the neighbours hold and whatever the pages are: the same bits."""
    model = bound(family, dtype, wide=wide)
    stacked(model)
    lengths = [13, 1, 21, 5]
    generator = torch.Generator().manual_seed(6)
    tokens = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths]

    def logits(which: list[int], chunk: int, page_size: int = 16) -> dict[tuple[int, int], Tensor]:
        """By sequence and position; passes of `chunk` rows."""
        session = Session(model, [lengths[one] for one in which], page_size=page_size)
        places = [(at, pos) for at, one in enumerate(which) for pos in range(lengths[one])]
        found = {}
        for begin in range(0, len(places), chunk):
            part = places[begin : begin + chunk]
            content = torch.stack([tokens[which[at]][pos] for at, pos in part])
            result = session.run([at for at, _ in part], [pos for _, pos in part], tokens=content)
            found |= {(which[at], pos): y for (at, pos), y in zip(part, model.logits(result.ready), strict=True)}
        return found

    threads(1)
    together = logits([0, 1, 2, 3], 40)
    assert len(together) == 40
    for count in (1, 2):
        threads(count)
        ways = [logits([0, 1, 2, 3], 40), logits([3, 2, 0, 1], 40, page_size=3), logits([2, 3, 1], 7), logits([0, 2], 17)]
        ways += [logits([one], 40) for one in range(4)] + [logits([2], 1, page_size=1)]
        for number, way in enumerate(ways):
            for place, found in way.items():
                assert_same(found, together[place], f"way {number}, row {place}, {count} threads")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_wrong_neighbours_do_not_spread(family: str, dtype: torch.dtype) -> None:
    """NaN in the residuals of other sequences, live or carried."""
    mine = given(bound(family, dtype, wide=True))
    clean, clean_kv = mine.ran(30)
    hit = (mine.seq == 0) | (torch.arange(len(mine.hidden)) >= 30)
    mine.hidden[hit] = torch.nan
    hidden, kv = mine.ran(30)
    assert_same(hidden[~hit], clean[~hit])
    assert_same(kv[:, :, ~hit], clean_kv[:, :, ~hit])
    assert bool(hidden[hit].isnan().all())


# -- inside the pass --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", ["predict", "propagate"])
@pytest.mark.parametrize("family", FAMILIES)
def test_passes_with_exits(family: str, kv: str) -> None:
    """Rows leave, resume and get their K,V as they do with the modules."""
    model = bound(family, torch.float32)
    exits = tiny_exits.mixed(tiny_models.shared(family))
    tokens = torch.randint(3, tiny_models.VOCABULARY, (19,), generator=torch.Generator().manual_seed(1))
    found = []
    for way in (model, without_stack(model)):
        session = Session(way, [19, 19], exits, kv=kv)
        session.pages.kv.zero_()
        result = session.run([0] * 19 + [1] * 19, [*range(19), *range(19)], tokens=torch.cat([tokens, tokens.flip(0)]))
        found.append((result, session.pages.kv))
    (mine, pages), (other, other_pages) = found
    assert torch.equal(mine.bands_taken, other.bands_taken)
    assert len(mine.bands_taken.unique()) > 1, "rows must go several ways for this to test anything"
    assert mine.work == other.work
    torch.testing.assert_close(mine.ready, other.ready, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pages, other_pages, rtol=1e-3, atol=1e-3)


def test_one_call_between_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """[begin, end), rows carried and live rows of every call: no rows past live are carried unless K,V are propagated."""
    calls: list[tuple[int, int, bool]] = []
    original = Stack.run

    def counted(self: Any, begin: int, end: int, hidden: Tensor, live: int, *rest: Any) -> None:
        calls.append((begin, end, len(hidden) > live))
        original(self, begin, end, hidden, live, *rest)

    monkeypatch.setattr(Stack, "run", counted)
    model = tiny_models.shared("llama")
    exits = tiny_exits.exits_of(model, tiny_exits.band(model, 2, 4))
    for kv in ("predict", "propagate"):
        calls.clear()
        session = Session(bind(model), [23], exits, kv=kv)
        with apart():
            session.run([0] * 23, list(range(23)), tokens=torch.arange(3, 26))
        assert calls == [(0, 2, False), (2, 4, kv == "propagate"), (4, 6, False)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama_bias", "gemma2", "qwen2", "phi3"])
def test_weights_are_the_modules_own(family: str, dtype: torch.dtype) -> None:
    """Every parameter of a layer, changed in place, changes the next call of the same bound model."""
    causal_lm = tiny_models.tiny(family, dtype)
    model = bind(causal_lm)
    stacked(model)
    before, _ = given(model).ran(35)
    for name, parameter in model.layers[3].module.named_parameters():
        parameter.mul_(1.5)
        after, _ = given(model).ran(35)
        assert not torch.equal(after, before), name
        assert_same(after, given(bind(causal_lm)).ran(35)[0], name)
        before = after


# -- what must not crash ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pos": 21}, r"decoder_layers: pos must be in \[0, 21\)"),
        ({"pos": 2**31 - 1}, r"decoder_layers: pos must be in \[0, 21\)"),
        ({"pos": -1}, r"decoder_layers: pos must be in \[0, 21\)"),
        ({"slots": 45}, r"decoder_layers: slots must be in \[-1, 45\), got 45 at 3"),
        ({"slots": -2}, r"decoder_layers: slots must be in \[-1, 45\), got -2 at 3"),
        ({"seq": 3}, r"decoder_layers: seq must be in \[0, 3\), got 3 at 3"),
        ({"seq": -1}, r"decoder_layers: seq must be in \[0, 3\), got -1 at 3"),
        ({"seq": 1}, r"decoder_layers: block_table must be in \[0, 9\) for visible positions, got -1 for sequence 1, page 1"),
        ({"table": 9}, r"decoder_layers: block_table must be in \[0, 9\) for visible positions, got 9"),
        ({"dtype": torch.float16}, "expected scalar type"),
    ],
)
def test_wrong_values_are_errors(change: dict[str, Any], message: str) -> None:
    """They name the op, and nothing was written."""
    mine = given(bound("llama", torch.float32))
    seq, pos, slots, hidden = mine.seq.clone(), mine.pos.clone(), mine.slots.clone(), mine.hidden.clone()
    table = mine.context.block_table.clone()
    hidden = hidden.to(change.get("dtype", hidden.dtype))
    if "seq" in change:
        pos[3] = 7
    for name, tensor in (("seq", seq), ("pos", pos), ("slots", slots)):
        tensor[3] = change.get(name, int(tensor[3]))
    table[0, 0] = change.get("table", int(table[0, 0]))
    context, before = dataclasses.replace(mine.context, block_table=table), hidden.clone()
    with pytest.raises(RuntimeError, match=message):
        stacked(mine.session.model).run(0, 6, hidden, 35, seq, pos, slots, context)
    assert_same(hidden, before)
    assert not bool(context.pages.any())


def test_rows_without_a_slot_store_nothing() -> None:
    mine = given(bound("llama", torch.float32))
    context = dataclasses.replace(mine.context, pages=mine.context.pages.clone())
    slots = torch.full_like(mine.slots, -1)
    stacked(mine.session.model).run(0, 6, mine.hidden.clone(), 0, mine.seq, mine.pos, slots, context)
    assert not bool(context.pages.any())


def test_no_rows() -> None:
    mine = given(bound("llama", torch.float32))
    nothing = mine.hidden[:0]
    stacked(mine.session.model).run(0, 6, nothing, 0, mine.seq[:0], mine.pos[:0], mine.slots[:0], mine.context)
    assert not bool(mine.context.pages.any())
