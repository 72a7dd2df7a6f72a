"""What K,V maps of low rank cost in agreement and give in time, beside whole maps.

Maps are regressed on prose (Python's language reference) and cut to each rank. A share of the judged rows of unseen prose
leaves at an exit by lot; of the others, KL(full || dynamic) and agreement with full depth are measured, as in kv_maps.py. The
seconds are those of ops.backfill_kv for so many rows that leave, with nothing of the maps in the caches.

    PYTHONPATH=benchmarks python benchmarks/kv_ranks.py build
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from band_maps import regressed
from kv_maps import compared, first_tokens, judged_rows, prose, ready

from dyndepth import info
from dyndepth.closed_form.measure import Lottery
from dyndepth.closed_form.progress import Progress
from dyndepth.closed_form.search import with_criterion
from dyndepth.data import FIT, TEST, deal, encode, sections, text_pieces
from dyndepth.demo.weights import load_model
from dyndepth.exits import Exits, KVMap
from dyndepth.files import replacing
from dyndepth.ops import backfill_kv
from dyndepth.runtime.bind import Model, bind
from dyndepth.runtime.fingerprint import facts_of
from dyndepth.runtime.session import Session

EXITS, RANKS, SHARE = (10, 20), (None, 384, 256, 192, 128, 64), 0.3
LEAVING = (4, 16)
_FIT_TOKENS, _TEST_ROWS, _ROUNDS = 32_768, 2_000, 40
#: Bytes that are read between two calls, several times what the caches of the machines at hand hold.
_EVICTED = 256 * 2**20


@torch.no_grad()
def main(folder: Path) -> None:
    model, tokenizer = load_model()
    bound = bind(model)
    pieces = deal([], text_pieces(sections(encode(prose(), tokenizer), 256), 1 << 20, 256), bound.hidden_size, 0)
    with Progress(True) as report:
        spans = [(leave, bound.depth) for leave in EXITS]
        fitter = regressed(bound, spans, first_tokens(pieces.of(FIT), _FIT_TOKENS), "maps", report)
    test = judged_rows(pieces.of(TEST), _TEST_ROWS)
    full = ready(model, test, None, None)
    rows: list[dict[str, Any]] = []
    for leave in EXITS:
        bands = {}
        for rank in RANKS:
            fitter.kv_rank = rank
            bands[rank] = fitter.band((leave, bound.depth))[0].to(bound.dtype)
        seconds = timed(bound, leave, {rank: band.kv for rank, band in bands.items() if band.kv is not None})
        for rank, band in bands.items():
            exits = Exits([with_criterion(band, Lottery(SHARE))], facts_of(bound))
            assert band.kv is not None
            numbers = sum(value.numel() for value in band.kv.parameters())
            quality = compared(bound, full, ready(model, test, exits, "predict"))
            rows.append({"exit": leave, "rank": rank, "numbers": numbers, **quality, "seconds": seconds[rank]})
            print(rows[-1], flush=True)
    found = {
        "machine": info.collect(), "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "share": SHARE,
        "fitted_on_tokens": _FIT_TOKENS, "leaving": list(LEAVING), "rounds": _ROUNDS, "rows": rows,
    }  # fmt: skip
    with replacing(folder / "kv_ranks.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")


def timed(model: Model, leave: int, maps: dict[int | None, KVMap]) -> dict[int | None, dict[str, list[float]]]:
    """By rank and rows: median, tenth and ninetieth percentile of a call's seconds, ranks in turn."""
    evicted = torch.ones(_EVICTED // 4)
    seconds: dict[tuple[int | None, int], list[float]] = {(rank, count): [] for rank in maps for count in LEAVING}
    for count in LEAVING:
        session = Session(model, [8] * count)
        rows, context = session.rows(range(count), [4] * count, tokens=torch.ones(count, dtype=torch.long))
        hidden = torch.randn(count, model.hidden_size).to(model.dtype)
        for number in range(_ROUNDS + 1):
            for rank, kv in maps.items():
                evicted.add_(1)
                begin = time.perf_counter()
                backfill_kv(
                    hidden, kv.weight, rows.pos, rows.slots, context.pages, leave, bias=kv.bias, cos=context.cos,
                    sin=context.sin, down=kv.down,
                )  # fmt: skip
                if number:
                    seconds[rank, count].append(time.perf_counter() - begin)
    found: dict[int | None, dict[str, list[float]]] = {rank: {} for rank in maps}
    for (rank, count), taken in seconds.items():
        tenths = statistics.quantiles(taken, n=10)
        found[rank][str(count)] = [statistics.median(taken), tenths[0], tenths[-1]]
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
