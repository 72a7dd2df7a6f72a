"""`make kv-weighting`: do predicted K,V get better where regression counts rows by the attention they receive?

Every row's K,V of a layer weigh as much as the queries after it look at them there (softmax mass summed over heads and later
rows of its sequence, in units of its mean over the sequence), against every row alike. As in `make kv-maps`, a share of the
rows leaves at an exit by lot and the others are compared with full depth. Takes the corpus of `make exit-heads` from the
folder; writes `kv_weighting.json` there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from band_maps import first
from exit_heads import load_or_collect
from kv_maps import compared, ready
from torch import Tensor

from dyndepth.closed_form.measure import Lottery
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.data import FIT, TEST, Piece
from dyndepth.demo.weights import load_model
from dyndepth.exits import Band, Exits, KVMap
from dyndepth.exits.products import EPS
from dyndepth.files import replacing
from dyndepth.ops._math import rms_normalise
from dyndepth.ops._paged import rotate
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.training.stack import run_layer

EXITS, SHARE = (15, 20), 0.3
_FIT_ROWS, _TEST_ROWS = 15_000, 4_000
WEIGHTINGS = ("alike", "by attention")


def main(folder: Path) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    report = Progress(True)
    with torch.no_grad(), report:
        corpus = load_or_collect(folder, model, tokenizer, report)
        fitting, tested = first(corpus.of(FIT), _FIT_ROWS), first(corpus.of(TEST), _TEST_ROWS)
        bands, errors = _bands(bound, fitting, report)
        full = ready(model, tested, None, None)
        rows: list[dict[str, Any]] = []
        for (leave, weighting), band in bands.items():
            found = compared(bound, full, ready(model, tested, Exits([band], facts_of(bound)), "predict"))
            rows.append({"exit": leave, "weighting": weighting, "error": errors[leave, weighting], **found})
    result = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "share": SHARE, "tokens_sha256": corpus.digest,
        "fitted_rows": sum(piece.judged for piece in fitting), "rows": rows,
    }  # fmt: skip
    with replacing(folder / "kv_weighting.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n")


def _bands(
    model: Model, pieces: Sequence[Piece], report: Progress
) -> tuple[dict[tuple[int, str], Band], dict[tuple[int, str], float]]:
    """Exits with K,V maps of either weighting; one document in eight judges the penalties, weighted alike or not."""
    width, kv = model.hidden_size, 2 * model.layers[0].kv_heads * model.layers[0].head_dim
    keys = [(leave, way, layer) for leave in EXITS for way in WEIGHTINGS for layer in range(leave, model.depth)]
    sums = {key: (NormalEquations(width, kv), NormalEquations(width, kv)) for key in keys}
    with report.stage("regressing maps", sum(p.tokens.shape[0] for p in pieces)) as advance:
        for number, piece in enumerate(pieces):
            residual: dict[int, Tensor] = {}
            for layer, hidden, target, mass in _layers(model, piece.tokens):
                if layer in EXITS:
                    residual[layer] = rms_normalise(hidden, EPS)[piece.start :]
                for leave, x in residual.items():
                    for way in WEIGHTINGS:
                        weight = mass[piece.start :] / mass[piece.start :].mean() if way == "by attention" else None
                        sums[leave, way, layer][number % 8 == 0].add(x, target[piece.start :], weight)
            advance(piece.tokens.shape[0])
    bands, errors = {}, {}
    for leave in EXITS:
        for way in WEIGHTINGS:
            maps = KVMap(model.depth - leave, kv // 2, width)
            found = [solve_best(*sums[leave, way, layer], {"kv": slice(None)})["kv"] for layer in range(leave, model.depth)]
            maps.weight.data = torch.stack([w[:-1].T.unflatten(0, (2, -1)) for w, _ in found]).contiguous()
            maps.bias.data = torch.stack([w[-1].unflatten(0, (2, -1)) for w, _ in found]).contiguous()
            bands[leave, way] = Band(leave, model.depth, Lottery(SHARE), kv=maps)
            # Judged alike: squared error on rows that each count once.
            alike = [sums[leave, "alike", layer][1] for layer in range(leave, model.depth)]
            errors[leave, way] = sum(s.error(w.double()) for s, (w, _) in zip(alike, found, strict=True)) / len(found)
    return bands, errors


def _layers(model: Model, tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Per layer of one sequence: (number, residual before it [t, d], K before rotation and V [t, 2 kv], mass [t])."""
    length = tokens.shape[0]
    pos = torch.arange(length)
    hidden = model.embed(tokens, pos.int())
    cos, sin = model.rotary_tables(length)
    later = torch.ones(length, length).triu(1).T.bool()  # [query, key]: the key lies before the query
    for number, layer in enumerate(model.layers):
        x = hidden if layer.before_attention is None else layer.before_attention(hidden)
        q, k, v = layer.project(x, length)
        target = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
        if cos is not None and sin is not None:
            q, k = (rotate(part, cos[layer.variant], sin[layer.variant], pos) for part in (q, k))
        k = k.repeat_interleave(layer.heads // layer.kv_heads, dim=1)
        scores = (q.transpose(0, 1).float() @ k.permute(1, 2, 0).float()) * layer.scale
        share = scores.masked_fill(~(later | torch.eye(length).bool()), -torch.inf).softmax(-1)
        mass = (share * later).sum((0, 1))
        yield number, hidden, target, mass
        hidden = run_layer(layer, hidden[None], cos, sin)[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
