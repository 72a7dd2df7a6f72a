"""The teacher cache: what it holds, that it resumes, and that it is never half-read."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from dyndepth.data import Piece
from dyndepth.errors import ArgumentError, CacheError
from dyndepth.runtime.bind import bind
from dyndepth.runtime.score import score
from dyndepth.training import cache as cache_module
from dyndepth.training.batches import Batches
from dyndepth.training.cache import TeacherCache

_EXITS = [2, 5]


def _pieces(count: int = 9, seed: int = 0) -> list[Piece]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 25, (count,), generator=generator).tolist()
    texts = [torch.randint(3, tiny_models.VOCABULARY, (n,), generator=generator) for n in lengths]
    return [Piece(text, min(4, len(text) - 1), f"{seed}-{i}") for i, text in enumerate(texts)]


def _build(folder: Path, pieces: list[Piece] | None = None, name: str = "llama", **options: Any) -> TeacherCache:
    model = bind(tiny_models.shared(name))
    options = {"top": 5, "shard_rows": 30} | options
    return TeacherCache.build(model, pieces or _pieces(), options.pop("boundaries", _EXITS), folder, **options)


def _content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", ["llama", "gemma2", "opt"])
def test_rows_are_the_full_models(name: str, tmp_path: Path) -> None:
    pieces = _pieces()
    cache = _build(tmp_path, pieces, name)
    assert len(cache) > 2
    full = score(tiny_models.shared(name), [p.tokens for p in pieces], start=[p.start for p in pieces])
    logits = full.logits()

    def whole(take: Any) -> torch.Tensor:
        return torch.cat([take(shard) for shard in cache])

    torch.testing.assert_close(whole(lambda s: s.ready), full.ready)
    assert torch.equal(whole(lambda s: s.answers).long(), full.argmax())
    assert torch.equal(whole(lambda s: s.tokens).long(), torch.cat([p.tokens for p in pieces]))
    best = logits.topk(5)
    assert torch.equal(whole(lambda s: s.top_ids).long(), best.indices)
    torch.testing.assert_close(whole(lambda s: s.top_logits), best.values)
    torch.testing.assert_close(whole(lambda s: s.logsumexp), logits.logsumexp(-1))
    with torch.no_grad():
        hidden = tiny_models.shared(name)(pieces[0].tokens[None], output_hidden_states=True).hidden_states
    for leave in _EXITS:
        torch.testing.assert_close(cache.shard(0).residual[leave][: len(pieces[0].tokens)], hidden[leave][0])


def test_a_built_cache_opens_and_is_not_built_again(tmp_path: Path) -> None:
    cache = _build(tmp_path)
    before, told = _content(tmp_path), []
    done: list[int] = []
    again = _build(tmp_path, say=told.append, advance=done.append)
    assert _content(tmp_path) == before
    assert "0 MiB to write" in told[0]
    assert sum(done) == cache.rows == TeacherCache.open(tmp_path).rows
    assert again.boundaries == _EXITS
    assert TeacherCache.open(tmp_path).facts == bindings()


def bindings() -> Any:
    from dyndepth.runtime.fingerprint import facts_of

    return facts_of(bind(tiny_models.shared("llama")))


def test_what_a_killed_run_finished_is_kept(tmp_path: Path, monkeypatch: Any) -> None:
    """A run that stops in any shard leaves whole shards only; the next one computes the others and gives the same bytes."""
    whole, compute = _build(tmp_path / "whole"), cache_module._computed
    for stop in range(len(whole)):
        folder = tmp_path / str(stop)
        computed: list[int] = []

        def interrupted(*args: Any, stop: int = stop, computed: list[int] = computed) -> Any:
            if len(computed) == stop:
                raise KeyboardInterrupt
            computed.append(1)
            return compute(*args)

        with monkeypatch.context() as patch:
            patch.setattr(cache_module, "_computed", interrupted)
            with pytest.raises(KeyboardInterrupt):
                _build(folder)
        assert len(list(folder.glob("shard-*"))) == stop
        assert not list(folder.glob(".*")), "no temporaries"
        with pytest.raises(CacheError, match=f"lacks {len(whole) - stop} of {len(whole)} shards"):
            TeacherCache.open(folder)
        _build(folder)
        assert _content(folder) == _content(tmp_path / "whole")


def test_temporaries_of_killed_processes_are_swept(tmp_path: Path) -> None:
    import os
    import platform

    _build(tmp_path)
    dead = tmp_path / f".shard-00001.safetensors.{platform.node()}@4194999.x.tmp"
    alive = tmp_path / f".shard-00001.safetensors.{platform.node()}@{os.getpid()}.x.tmp"
    other = tmp_path / ".shard-00001.safetensors.elsewhere@4194999.x.tmp"
    for path in (dead, alive, other):
        path.write_text("half")
    _build(tmp_path)
    assert (dead.exists(), alive.exists(), other.exists()) == (False, True, True)


@pytest.mark.parametrize(
    "change",
    [
        {"boundaries": [2, 4]},
        {"top": 4},
        {"shard_rows": 40},
        {"pieces": _pieces(seed=1)},
        {"name": "qwen2"},
    ],
)
def test_a_folder_holds_one_cache(change: dict[str, Any], tmp_path: Path) -> None:
    _build(tmp_path)
    before = _content(tmp_path)
    with pytest.raises(CacheError, match="holds another cache"):
        _build(tmp_path, **change)
    assert _content(tmp_path) == before


def test_damage_is_seen(tmp_path: Path) -> None:
    _build(tmp_path)
    path = tmp_path / "shard-00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(CacheError, match="is damaged"):
        TeacherCache.open(tmp_path).shard(1)
    with pytest.raises(CacheError, match="is damaged"):
        _build(tmp_path)
    shutil.copy(tmp_path / "shard-00000.safetensors", path)
    with pytest.raises(CacheError, match="belongs to another cache"):
        TeacherCache.open(tmp_path).shard(1)
    path.write_bytes(content)
    TeacherCache.open(tmp_path).shard(1)
    (tmp_path / "manifest.json").write_text('{"format": "dyndepth-teacher-cache", "version": 9}')
    with pytest.raises(CacheError, match="of version 1"):
        TeacherCache.open(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(CacheError, match="does not exist"):
        TeacherCache.open(tmp_path)
    with pytest.raises(CacheError, match="shards without a manifest"):
        _build(tmp_path)


def test_a_full_disk_is_said_before_work_starts(tmp_path: Path, monkeypatch: Any) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(1 << 28) + 100))
    with pytest.raises(CacheError, match=r"wanted \d+ MiB of disk"):
        _build(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_size_said_is_the_size_written(tmp_path: Path) -> None:
    cache = _build(tmp_path)
    for number, shard in enumerate(cache.manifest["shards"]):
        tensors = cache.shard(number)
        held = [
            tensors.answers,
            tensors.tokens,
            tensors.lengths,
            tensors.start,
            tensors.ready,
            tensors.top_ids,
            tensors.top_logits,
        ]
        held += [tensors.logsumexp, *tensors.residual.values()]
        assert sum(t.numel() * t.element_size() for t in held) == shard["bytes"]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"boundaries must be in \[1, 6\)"):
        _build(tmp_path, boundaries=[6])
    with pytest.raises(ArgumentError, match="at least two tokens, got 0 pieces"):
        TeacherCache.build(bind(tiny_models.shared("llama")), [], [2], tmp_path)
    foreign = [Piece(torch.tensor([1, tiny_models.VOCABULARY]), 1, "a")]
    with pytest.raises(ArgumentError, match="tokenizer of another model"):
        _build(tmp_path, foreign)
    with pytest.raises(ArgumentError, match="wanted top in"):
        _build(tmp_path, top=0)
    model = tiny_models.tiny("llama")
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(ArgumentError, match="not finite"):
        TeacherCache.build(bind(model), _pieces(), [2], tmp_path / "nan")


def test_answers_are_generations_where_logits_tie(tmp_path: Path) -> None:
    """bf16 logits tie often, and the first of a sorted list is not the one that arg max takes."""
    model = tiny_models.tiny("llama", torch.bfloat16, vocab_size=4000)
    pieces = [Piece(torch.randint(3, 4000, (60,), generator=torch.Generator().manual_seed(i)), 3, str(i)) for i in range(12)]
    cache = TeacherCache.build(bind(model), pieces, [2], tmp_path, top=5)
    full = score(model, [p.tokens for p in pieces]).argmax()
    first = torch.cat([shard.top_ids[:, 0] for shard in cache]).long()
    assert not torch.equal(first, full), "there are ties"
    # Other row counts may round otherwise; what is stored is the arg max of what was computed.
    ready = torch.cat([shard.ready for shard in cache])
    stored = torch.cat([shard.answers for shard in cache]).long()
    assert float((stored == bind(model).logits(ready).argmax(-1)).float().mean()) > 0.995


def test_a_model_that_computes_something_else_gets_its_own_cache(tmp_path: Path) -> None:
    """Wrapped modules have no fingerprint: what the model says of a few tokens tells."""

    class Adapter(torch.nn.Module):
        def __init__(self, inner: Any, scale: float) -> None:
            super().__init__()
            self.inner, self.scale = inner, scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) * self.scale

    def adapted(scale: float) -> Any:
        model = tiny_models.tiny("llama")
        for layer in model.model.layers:
            layer.mlp.down_proj = Adapter(layer.mlp.down_proj, scale).eval()
        return bind(model)

    TeacherCache.build(adapted(1.0), _pieces(), [2], tmp_path)
    TeacherCache.build(adapted(1.0), _pieces(), [2], tmp_path)
    with pytest.raises(CacheError, match="outputs of the model"):
        TeacherCache.build(adapted(1.5), _pieces(), [2], tmp_path)


def test_batches_are_equal_in_rows(tmp_path: Path) -> None:
    lengths = [20, 120] * 20
    pieces = [Piece(torch.randint(3, 90, (n,)), 1, str(i)) for i, n in enumerate(lengths)]
    cache = _build(tmp_path, pieces)
    batches = Batches(cache, range(40), 400, 0, _EXITS)
    for step in range(3 * batches.steps_per_epoch):
        assert abs(sum(batches.at(step).lengths) - 400) <= 120
    huge = Batches(cache, [0, 1], 10, 0, _EXITS)
    assert huge.steps_per_epoch == 2
    assert all(huge.at(step).lengths for step in range(4)), "a sequence longer than a batch leaves none empty"
    counts = batches.frequencies(tiny_models.VOCABULARY)
    answers = torch.cat([batch.answers[batch.judged] for batch in batches.once()])
    assert torch.equal(counts, torch.bincount(answers, minlength=tiny_models.VOCABULARY))


def test_batches_deal_every_sequence_once_per_epoch(tmp_path: Path) -> None:
    pieces = _pieces(12)
    cache = _build(tmp_path, pieces)
    parts = [0, 2, 3, 5, 8, 9, 11]
    batches = Batches(cache, parts, 25, 7, _EXITS)
    steps = batches.steps_per_epoch
    assert steps > 2
    for epoch in range(3):
        lengths = [n for step in range(steps) for n in batches.at(epoch * steps + step).lengths]
        assert sorted(lengths) == sorted(len(pieces[i].tokens) for i in parts)
    first, again = batches.at(1), Batches(cache, parts, 25, 7, _EXITS).at(1)
    assert torch.equal(first.ready, again.ready)
    assert not torch.equal(batches.at(0).ready, batches.at(steps).ready), "epochs are shuffled"
    judged = sum(len(pieces[i].tokens) - pieces[i].start for i in parts)
    assert batches.judged_per_step * steps == pytest.approx(judged)


def test_a_batch_holds_the_rows_of_its_sequences(tmp_path: Path) -> None:
    pieces = _pieces(12)
    batches = Batches(_build(tmp_path, pieces), [1, 4, 10], 10_000, 0, [5])
    (batch,) = list(batches.once())
    chosen = [pieces[i] for i in (1, 4, 10)]
    full = score(tiny_models.shared("llama"), [p.tokens for p in chosen], start=[p.start for p in chosen])
    torch.testing.assert_close(batch.ready, full.ready)
    assert torch.equal(batch.answers, full.argmax())
    assert torch.equal(batch.judged, full.judged)
    assert torch.equal(batch.labels, torch.cat([torch.cat([p.tokens[1:], torch.tensor([-100])]) for p in chosen]))
    padded = batch.padded(5)
    assert padded.shape[:2] == (3, max(batch.lengths))
    assert torch.equal(batch.unpadded(padded), batch.residual[5])
