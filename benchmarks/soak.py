"""A soak: requests join and leave for half an hour, and nothing may grow, leak or change.

Rounds repeat one seeded schedule, about a minute each on two cores: requests of different lengths over the slots of one
session that lives as long as the soak (soak_pool.py), then calls of `dyndepth.generate` over varying batches. Every round's
tokens and depths must be the first one's, every page must be free again after it, and resident memory must be flat.

    PYTHONPATH=benchmarks python benchmarks/soak.py build [--minutes 30]

Exit status 1 on a leak, a difference or an exception.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from soak_pool import Answer, Pool, Request, schedule
from torch import Tensor

import dyndepth
from dyndepth import info
from dyndepth.exits import Exits
from dyndepth.files import replacing, require

#: Resident memory may grow by neither of these from the first third of the rounds to the last.
GROWTH_SHARE, GROWTH_BYTES = 0.02, 16 * 2**20
#: Seconds between samples.
EVERY_S = 0.5


@dataclass
class Subject:
    """What a round does; everything of it is fixed before the first one."""

    model: Any
    exits: Exits | None
    requests: list[Request]
    #: Batches for `dyndepth.generate`: (prompts, new tokens).
    calls: list[tuple[list[Tensor], int]]
    ends: list[int]
    slots: int
    capacity: int
    pages: int


@dataclass(frozen=True)
class Sample:
    seconds: float
    rss_bytes: int
    pages_free: int
    pages_total: int


@dataclass(frozen=True)
class Round:
    seconds: float
    tokens: int
    rows_x_layers: float
    digest: str
    rss_bytes: int
    pages_free: int
    pages_total: int


@dataclass
class Soak:
    """What was seen; `verdict` judges it."""

    rounds: list[Round] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

    def verdict(self) -> dict[str, Any]:
        """Plain JSON. `passed` is False on a leak, a difference or an exception, or if no round was finished."""
        memory = judge_memory([one.rss_bytes for one in self.rounds])
        different = [number for number, one in enumerate(self.rounds) if one.digest != self.rounds[0].digest]
        leaked = max((one.pages_total - one.pages_free for one in self.rounds), default=0)
        bad = bool(memory["leak"]) or bool(different) or leaked != 0 or self.error is not None or not self.rounds
        return {
            "passed": not bad, "memory": memory, "different_rounds": different, "pages_leaked": leaked,
            "rounds": len(self.rounds), "error": self.error,
        }  # fmt: skip


def judge_memory(rounds: Sequence[int]) -> dict[str, Any]:
    """Median resident bytes of the last third of the rounds against the first third, the first round (warm-up) left out.

    `leak` is None where fewer than three rounds are left: too short to judge.
    """
    warm = rounds[1:]
    third = len(warm) // 3
    if third == 0:
        return {"leak": None, "first_bytes": None, "last_bytes": None, "growth_bytes": None, "growth_share": None}
    first, last = statistics.median(warm[:third]), statistics.median(warm[-third:])
    growth = last - first
    return {
        "leak": growth > GROWTH_SHARE * first or growth > GROWTH_BYTES, "first_bytes": first, "last_bytes": last,
        "growth_bytes": growth, "growth_share": growth / first,
    }  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory."""
    import psutil  # type: ignore[import-untyped]

    return int(psutil.Process().memory_info().rss)


def soak(
    subject: Subject,
    minutes: float,
    *,
    least_rounds: int = 1,
    rss: Callable[[], int] = resident,
    after: Callable[[int, Soak], None] = lambda number, found: None,
) -> Soak:
    """Rounds until the time is over; `after` is called with the number of every round when it has ended.

    An exception ends the soak and is part of what was found.
    """
    found = Soak()
    begin = time.monotonic()
    try:
        pool = Pool(subject.model, subject.exits, subject.ends, subject.slots, subject.capacity, subject.pages)
        while len(found.rounds) < least_rounds or time.monotonic() - begin < 60 * minutes:
            found.rounds.append(_round(subject, pool, found.samples, begin, rss))
            after(len(found.rounds) - 1, found)
    except Exception as error:
        found.error = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
    return found


def _round(subject: Subject, pool: Pool, samples: list[Sample], begin: float, rss: Callable[[], int]) -> Round:
    pages, started, first = pool.session.pages, time.monotonic(), len(samples)

    def tick(wait: float = EVERY_S) -> None:
        now = time.monotonic() - begin
        if len(samples) == first or now - samples[-1].seconds >= wait:
            samples.append(Sample(now, rss(), pages.free, pages.total))

    answers = pool.run(subject.requests, tick)
    for prompts, new_tokens in subject.calls:
        answers += _generate(subject, prompts, new_tokens)
        tick()
    tick(0.0)
    layers = [count for answer in answers for count in answer.layers]
    return Round(
        seconds=time.monotonic() - started,
        tokens=len(layers),
        rows_x_layers=sum(layers) / (len(layers) * pool.model.depth),
        digest=digest(answers),
        rss_bytes=int(statistics.median(sample.rss_bytes for sample in samples[first:])),
        pages_free=pages.free,
        pages_total=pages.total,
    )


def _generate(subject: Subject, prompts: Sequence[Tensor], new_tokens: int) -> list[Answer]:
    """A call over padded prompts; what follows an end of sequence is left out."""
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(prompt)).long() for prompt in prompts])
    out = subject.model.generate(
        input_ids=ids, attention_mask=mask, custom_generate=dyndepth.generate, exits=subject.exits, do_sample=False,
        max_new_tokens=new_tokens, eos_token_id=subject.ends or None, pad_token_id=0, return_dict_in_generate=True,
    )  # fmt: skip
    ran = out.layers_run >= 0
    return [
        Answer(tokens[kept].tolist(), layers[kept].tolist())
        for tokens, layers, kept in zip(out.sequences[:, width:], out.layers_run, ran, strict=True)
    ]


def digest(answers: Sequence[Answer]) -> str:
    """A hash of every token and its depth, request by request."""
    return hashlib.sha256(json.dumps([[answer.tokens, answer.layers] for answer in answers]).encode()).hexdigest()[:16]


def demo_subject(slots: int, requests: int, seed: int = 17) -> Subject:
    """The demo's model and exits; answers end with an end of sequence or the end of a line."""
    from dyndepth.demo import chat, load
    from dyndepth.demo.prompts import SHOWN, calibrating

    model, tokenizer, exits = load()
    texts = (*SHOWN, *calibrating())

    def ids(number: int) -> Tensor:
        """One text, or several on top of each other: prompts of about ten to two hundred tokens."""
        several = "\n".join(texts[(number + more) % len(texts)] for more in range(1 + number % 7))
        return tokenizer(chat(tokenizer, several), return_tensors="pt", add_special_tokens=False)["input_ids"][0][-200:]

    prompts = [ids(number) for number in range(requests)]
    ends = [int(model.generation_config.eos_token_id), int(tokenizer("\n", add_special_tokens=False)["input_ids"][-1])]
    calls = [(prompts[at : at + rows], 8 + 8 * (rows % 3)) for at, rows in ((0, 1), (1, 7), (8, 16), (24, slots))]
    # Two thirds of what all slots could need: some requests wait for pages.
    capacity = 200 + 64
    pages = 2 * slots * -(-capacity // 16) // 3
    return Subject(
        model, exits, schedule(prompts, slots, seed, 64), [call for call in calls if call[0]], ends, slots, capacity, pages
    )


def write(path: Path, found: Soak, settings: dict[str, Any], machine: dict[str, Any]) -> None:
    """All of it at once or not at all."""
    everything = {
        "settings": settings, "machine": machine, "verdict": found.verdict(), "rounds": [asdict(one) for one in found.rounds],
        "samples": [asdict(one) for one in found.samples],
    }  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(everything, indent=1) + "\n")


def plot(path: Path, found: Soak) -> None:
    """Resident memory and pages in use over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (upper, lower) = plt.subplots(2, 1, figsize=(10, 6), sharex=True, constrained_layout=True)
    minutes = [sample.seconds / 60 for sample in found.samples]
    upper.plot(minutes, [sample.rss_bytes / 2**20 for sample in found.samples], linewidth=0.8)
    upper.set(ylabel="resident memory, MiB", title="a soak: requests join and leave", ylim=(0, None))
    lower.plot(minutes, [sample.pages_total - sample.pages_free for sample in found.samples], linewidth=0.6)
    lower.set(xlabel="minutes", ylabel=f"pages in use of {found.samples[-1].pages_total if found.samples else 0}")
    ended = 0.0
    for one in found.rounds:
        ended += one.seconds / 60
        for axis in (upper, lower):
            axis.axvline(ended, color="grey", linewidth=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=30, help="no round starts later; at least four run")
    parser.add_argument("--batch", type=int, default=32, help="requests at once")
    parser.add_argument("--requests", type=int, default=400, help="requests of a round")
    wish = parser.parse_args()
    if wish.batch < 1 or wish.requests < 1 or not wish.minutes >= 0:
        parser.error("--batch and --requests must be at least 1, --minutes at least 0")
    require("matplotlib", "the picture needs matplotlib: pip install 'dyndepth[demo]'")
    require("psutil", "resident memory needs psutil: pip install 'dyndepth[demo]'")
    subject = demo_subject(wish.batch, wish.requests)
    settings = {
        "model": "SmolLM2-135M-Instruct", "dtype": "bfloat16", "batch": wish.batch, "requests": wish.requests,
        "calls": [[len(prompts), new_tokens] for prompts, new_tokens in subject.calls], "pages": subject.pages,
        "capacity": subject.capacity, "threads": torch.get_num_threads(),
        "limits": {"growth_share": GROWTH_SHARE, "growth_bytes": GROWTH_BYTES},
    }  # fmt: skip
    machine = info.collect()

    def after(number: int, found: Soak) -> None:
        one = found.rounds[-1]
        same = "same" if one.digest == found.rounds[0].digest else "DIFFERENT"
        print(
            f"round {number}: {one.seconds:.1f} s, {one.tokens} tokens, {one.rows_x_layers:.1%} rows x layers, {same}, "
            f"{one.rss_bytes / 2**20:.0f} MiB, {one.pages_free} of {one.pages_total} pages free",
            flush=True,
        )
        write(wish.folder / "soak.json", found, settings, machine)

    found = soak(subject, wish.minutes, least_rounds=4, after=after)
    write(wish.folder / "soak.json", found, settings, machine)
    plot(wish.folder / "soak.png", found)
    verdict = found.verdict()
    print(json.dumps(verdict, indent=1))
    sys.exit(0 if verdict["passed"] else 1)


if __name__ == "__main__":
    main()
