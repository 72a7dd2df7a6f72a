"""What tests of graph style begin with: exits of several kinds, and a session with prompts in its pages."""

from __future__ import annotations

from typing import Any

import tiny_exits
import tiny_models
import torch

from dyndepth.exits import (
    AdapterJump,
    Always,
    Exits,
    FixedDepth,
    MlpJump,
    Patience,
    Router,
    RouterScore,
    Saturation,
    Schedule,
    TopProbability,
)
from dyndepth.runtime.bind import bind
from dyndepth.runtime.block import block_head
from dyndepth.runtime.session import Session

#: With these some rows of the tiny models leave at each of several boundaries, and not all.
THRESHOLDS = {
    ("llama", "saturation"): 0.82, ("qwen3", "saturation"): 0.82, ("gemma3", "saturation"): 0.98,
    ("llama", "probability"): 0.95, ("qwen3", "probability"): 0.95, ("gemma3", "probability"): 0.999999,
    ("gemma3", "block_probability"): 0.999999,
}  # fmt: skip


def start(
    family: str, exits: Exits | None, kv: str, rows: int = 9, depth: list[int | None] | None = None
) -> tuple[Session, dict[str, Any]]:
    """A session with prompts in its pages, and the arguments of a decode step of `rows` sequences."""
    model = bind(tiny_models.shared(family))
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 14, (rows,), generator=generator).tolist()
    session = Session(model, [length + 4 for length in lengths], exits, kv=kv, depth=depth)
    prompts = [torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator) for length in lengths]
    session.prefill(prompts, session.work())
    tokens = torch.randint(3, tiny_models.VOCABULARY, (rows,), generator=generator)
    return session, {"seq": list(range(rows)), "pos": lengths, "tokens": tokens, "step": [3] * rows}


def exits_of(family: str, kind: str) -> Exits:
    """Exits for the six layers of a tiny model, by the name of what is special about them."""
    model = tiny_models.shared(family)
    few = torch.tensor([3, 9, 20])  # so few words that random heads agree now and then, and are not always sure
    if kind in ("mixed", "low_rank"):
        return tiny_exits.mixed(model, kv_rank=7 if kind == "low_rank" else None)
    if kind == "jumps":  # two bands that resume at one place, with jumps of their own
        return tiny_exits.exits_of(
            model, tiny_exits.band(model, 1, 4), tiny_exits.band(model, 2, 4), tiny_exits.band(model, 4, 6)
        )
    if kind == "patience":
        patient = [tiny_exits.band(model, leave, 6, Patience(), threshold=1.0, shortlist=few) for leave in (2, 4, 5)]
        return tiny_exits.exits_of(model, patient[0], tiny_exits.band(model, 3, 4), *patient[1:])
    if kind.startswith("block"):  # heads of the rows that leave; of all that are judged; of all
        criteria = {"block": None, "block_probability": TopProbability(), "block_always": Always()}
        bands = []
        for leave in (2, 4):
            threshold = THRESHOLDS.get((family, kind), 0.99) if kind == "block_probability" else 0.5
            short = few if kind == "block_probability" else None
            bands.append(tiny_exits.band(model, leave, 6, criteria[kind], threshold=threshold, shortlist=short))
            bands[-1].head = block_head(bind(model), leave)
        return tiny_exits.exits_of(model, *bands)
    if kind == "maps":  # every kind of jump; heads with corrections of their own
        adapter = AdapterJump(model.config.hidden_size, 1, 5, linear=False)
        jumps = [MlpJump(model.config.hidden_size, 7), AdapterJump(model.config.hidden_size, 2, 5), adapter]
        bands = [tiny_exits.band(model, leave, resume) for leave, resume in ((1, 3), (2, 4), (3, 4))]
        for number, (band, jump) in enumerate(zip(bands, jumps, strict=True)):
            band.jump = tiny_exits.filled(jump, torch.Generator().manual_seed(number))
        bands += [tiny_exits.band(model, 4, 6, head="mlp"), tiny_exits.band(model, 5, 6, head="whole")]
        bands[3].head.readout = bands[4].head
        bands[4].head = block_head(bind(model), 5)
        bands[4].head.readout = tiny_exits.head_of("translator", model.config.hidden_size, bind(model).ready_size, _drawn(9))
        return tiny_exits.exits_of(model, *bands)
    if kind == "routers":  # that compare residuals; that know where rows left and see statistics
        seeing = {"cosine": True}, {}, {"cosine": True}, {"stats": True, "history": (2, 3)}
        bands = []
        for (leave, resume), options in zip(((2, 6), (3, 4), (4, 6), (5, 6)), seeing, strict=True):
            router = tiny_exits.filled(Router(model.config.hidden_size, 3, silu=True, **options), _drawn(leave), 4.0)
            bands.append(tiny_exits.band(model, leave, resume, RouterScore(router), head="norm", threshold=0.5))
        return tiny_exits.exits_of(model, *bands)
    if kind in ("named", "schedule"):  # no row ever reads what another skipped
        by_kind = FixedDepth() if kind == "named" else Schedule(first=6, last=2, length=8)
        return tiny_exits.exits_of(model, *(tiny_exits.band(model, point, 6, by_kind) for point in (2, 3, 5)))
    criterion = Saturation() if kind == "saturation" else TopProbability()
    options: dict[str, Any] = {"criterion": criterion, "threshold": THRESHOLDS.get((family, kind), 0.8)}
    return tiny_exits.exits_of(model, *(tiny_exits.band(model, point, 6, **options) for point in (2, 3, 5)))


def _drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
