"""What the demo measures: speed side by side in one run, work done, agreement with full depth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from dyndepth.exits import Exits
from dyndepth.runtime.entry import generate
from dyndepth.runtime.score import score

Key = TypeVar("Key")


@dataclass(frozen=True)
class Rates:
    """Tokens per second over repetitions."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, tokens: int, seconds: Sequence[float]) -> Rates:
        """Of repetitions that each made so many tokens."""
        rates = sorted(tokens / taken for taken in seconds)
        return cls(statistics.median(rates), _quantile(rates, 0.1), _quantile(rates, 0.9))


def interleaved(
    calls: Mapping[Key, Callable[[], Any]], repetitions: int, advance: Callable[[], None]
) -> tuple[dict[Key, Any], dict[Key, list[float]]]:
    """What every call returned first (not counted), and the seconds of `repetitions` more, taken in turn.

    In turn, so that a machine that slows down slows all of them.
    """
    first = {}
    for key, run in calls.items():
        first[key] = run()
        advance()
    seconds: dict[Key, list[float]] = {key: [] for key in calls}
    for _ in range(repetitions):
        for key, run in calls.items():
            begin = time.perf_counter()
            run()
            seconds[key].append(time.perf_counter() - begin)
            advance()
    return first, seconds


@dataclass(frozen=True)
class Row:
    """One system in one setting: the schema that every comparison of ours uses."""

    system: str
    mode: str
    dtype: str
    batch: int
    #: Longest prompt plus new tokens, in tokens.
    context: int
    #: New tokens of the whole batch per second of the whole call, prompt included.
    tokens_per_s_median: float
    tokens_per_s_p10: float
    tokens_per_s_p90: float
    #: Share of rows x layers run, decode passes only.
    rows_x_layers: float
    #: Share of tokens whose arg max equals full depth's, given full depth's tokens so far (up to its end of sequence).
    agreement_teacher_forced: float
    #: Share of positions with full depth's token when each system continues its own text.
    agreement_free: float


def as_json(rows: list[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


@dataclass
class Setting:
    """Prompts decoded together, for a fixed number of new tokens so that every system does the same work."""

    model: Any
    inputs: dict[str, Tensor]
    new_tokens: int
    exits: Exits

    @property
    def batch(self) -> int:
        return self.inputs["input_ids"].shape[0]

    def systems(self) -> dict[tuple[str, str], Callable[[], Any]]:
        """(system, mode) -> a greedy generate call."""
        fixed = {
            "max_new_tokens": self.new_tokens, "min_new_tokens": self.new_tokens, "do_sample": False,
            "return_dict_in_generate": True,
        }  # fmt: skip
        call = self.model.generate
        return {
            ("transformers", "static cache"): lambda: call(**self.inputs, cache_implementation="static", **fixed),
            ("dyndepth", "full depth"): lambda: call(**self.inputs, custom_generate=generate, **fixed),
            ("dyndepth", "dynamic"): lambda: call(**self.inputs, custom_generate=generate, exits=self.exits, **fixed),
        }


@dataclass
class Measurement:
    rows: list[Row]
    #: The dynamic run: prompts' texts are shown with the depth of every token.
    dynamic: Any
    width: int


def measure(settings: list[Setting], repetitions: int, advance: Callable[[], None]) -> Measurement:
    """Runs every system of every setting `repetitions` times, interleaved, after one call that is not counted.

    The settings' prompts are one batch measured whole or in parts (batch 1): their tokens are pooled per system.
    """
    batch, model = settings[0].batch, settings[0].model
    calls = {(number, key): run for number, setting in enumerate(settings) for key, run in setting.systems().items()}
    first, seconds = interleaved(calls, repetitions, advance)
    outputs = {key: [first[number, key] for number in range(len(settings))] for key in settings[0].systems()}
    rows = []
    for key in outputs:
        rates = Rates.of(settings[0].new_tokens * batch, [s for number in range(len(settings)) for s in seconds[number, key]])
        teacher, free = agreement(settings, outputs, key)
        works = [getattr(out, "work", None) for out in outputs[key]]
        possible = sum(work.possible for work in works if work is not None)
        rows.append(
            Row(
                system=key[0],
                mode=key[1],
                dtype=str(model.dtype).removeprefix("torch."),
                batch=batch,
                context=max(s.inputs["input_ids"].shape[1] for s in settings) + settings[0].new_tokens,
                tokens_per_s_median=rates.median,
                tokens_per_s_p10=rates.p10,
                tokens_per_s_p90=rates.p90,
                rows_x_layers=sum(work.run for work in works if work is not None) / possible if possible else 1.0,
                agreement_teacher_forced=teacher,
                agreement_free=free,
            )
        )
    return Measurement(rows, outputs["dyndepth", "dynamic"][0], settings[0].inputs["input_ids"].shape[1])


def agreement(settings: list[Setting], outputs: dict[tuple[str, str], list[Any]], key: tuple[str, str]) -> tuple[float, float]:
    """(teacher-forced, free-running) agreement of a system with dyndepth at full depth.

    Both end where full depth would end its answer: every system has to make the same number of tokens, but what comes after
    the end-of-sequence token that was suppressed for it is not judged. Teacher-forced, the reference is a scoring pass at
    full depth over full depth's own text (it differs from the decoded tokens where half precision rounds differently at
    other row counts); free-running, it is the decoded text.
    """
    same_given = same_free = given = free = 0
    for number, setting in enumerate(settings):
        width = setting.inputs["input_ids"].shape[1]
        full = outputs["dyndepth", "full depth"][number].sequences
        mine = outputs[key][number].sequences
        kept = setting.inputs["attention_mask"].bool()
        prompts = [setting.inputs["input_ids"][row][kept[row]] for row in range(full.shape[0])]
        sequences = [torch.cat([prompt, full[row, width:]]) for row, prompt in enumerate(prompts)]
        start = [prompt.shape[0] - 1 for prompt in prompts]
        reference = _answers(setting, sequences, start, None)
        if key == ("transformers", "static cache"):
            answers = _transformers_answers(setting.model, sequences, start)
        else:
            answers = _answers(setting, sequences, start, setting.exits if key[1] == "dynamic" else None)
        ends = _ends(reference, setting.model.generation_config.eos_token_id)
        said = ends.cumsum(1) - ends == 0  # up to and with the row that would have ended the answer
        same_given += int((reference == answers)[said].sum())
        given += int(said.sum())
        said &= ends == 0  # that row's own token was suppressed
        same_free += int((full[:, width:] == mine[:, width:])[said].sum())
        free += int(said.sum())
    return same_given / given, same_free / free if free else 1.0


def _answers(setting: Setting, sequences: list[Tensor], start: list[int], exits: Exits | None) -> Tensor:
    """int64 [batch, new tokens]: arg max of the rows that produce new tokens (what follows the last one was not made)."""
    scored = score(setting.model, sequences, exits, start=start)
    parts = scored.argmax().split([sequence.shape[0] for sequence in sequences])
    return torch.stack([part[first:-1] for part, first in zip(parts, start, strict=True)])


def _ends(answers: Tensor, eos: int | list[int] | None) -> Tensor:
    """int64 [batch, new tokens]: 1 where the answer is an end-of-sequence token."""
    return torch.isin(answers, torch.tensor([] if eos is None else eos, dtype=torch.int64)).long()


def _transformers_answers(model: Any, sequences: list[Tensor], start: list[int]) -> Tensor:
    with torch.no_grad():
        answers = [model(input_ids=s[None]).logits[0].argmax(-1) for s in sequences]
    return torch.stack([part[first:-1] for part, first in zip(answers, start, strict=True)])


def _quantile(ordered: list[float], share: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    at = share * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
