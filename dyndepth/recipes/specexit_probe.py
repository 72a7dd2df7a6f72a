"""Signals for SpecExit without a draft head: a linear probe of each new token's logits, fitted in closed form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dyndepth.closed_form.ridge import NormalEquations, solve_best
from dyndepth.data import encode
from dyndepth.errors import ArgumentError, NotEnoughDataError
from dyndepth.exits.router import STAT_FEATURES, stat_features
from dyndepth.files import replacing
from dyndepth.ops.exit_stats import stats_of_logits
from dyndepth.runtime.entry import generate
from dyndepth.runtime.score import HEAD_ROWS, score

SIGNALS = ("confidence", "progress", "remain")
#: Log-probabilities below this, -inf of a processor included, count as this.
_LEAST = -50.0
#: Shares are kept off 0 and 1, where their log-odds end.
_EDGE = 0.01
#: Every so many traces one is held out.
_HELD_OUT = 5


class Probe(nn.Module):
    """Three linear outputs, read as SpecExit reads its draft head's: sigmoid, sigmoid, exp.

    They see the log-probabilities of `words` (a linear image of the row that the LM head reads, but for one shift), four
    statistics of the distribution, the log-probability of `end`, and how many tokens were made.

    Args:
        words: int64 [w], vocabulary words that are looked at.
        end: the token that ends thinking.
        weight, bias: float32 [3, w + 6], [3]; a fresh probe says 0.5, 0.5 and one token.
    """

    def __init__(self, words: Tensor, end: int, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        width = words.numel() + STAT_FEATURES + 2
        self.words: Tensor
        self.end: Tensor
        self.register_buffer("words", words.long())
        self.register_buffer("end", torch.tensor([end]))
        self.weight = nn.Parameter(torch.zeros(3, width) if weight is None else weight.float(), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(3) if bias is None else bias.float(), requires_grad=False)
        if tuple(self.weight.shape) != (3, width) or tuple(self.bias.shape) != (3,):
            raise ArgumentError(
                f"specexit.Probe: weight must be [3, {width}] and bias [3], got {list(self.weight.shape)}, "
                f"{list(self.bias.shape)}"
            )

    @torch.no_grad()
    def features(self, logits: Tensor, made: Tensor) -> Tensor:
        """float32 [n, w + 6] of logits [n, V] and, per row, the tokens made before."""
        stats = stats_of_logits(logits)
        seen = torch.cat([self.words, self.end]).to(logits.device)
        chances = (logits[:, seen].float() - stats.logsumexp[:, None]).clamp_min(_LEAST)
        return torch.cat([chances, stat_features(stats), torch.log1p(made.float())[:, None]], dim=1)

    def forward(self, logits: Tensor, made: Tensor) -> Tensor:
        """float32 [n, 3]: confidence, progress, tokens that remain."""
        x = self.features(logits, made)
        # Not one product for all rows: libraries add in another order when there are more of them.
        y = (x[:, None] * self.weight.to(x.device)).sum(-1) + self.bias.to(x.device)
        return torch.cat([torch.sigmoid(y[:, :2]), torch.exp(y[:, 2:].clamp_max(20))], dim=1)

    def save(self, path: str | Path) -> None:
        """As a safetensors file, whole or not at all."""
        from safetensors.torch import save_file

        with replacing(Path(path)) as temporary:
            save_file({name: value.cpu().contiguous() for name, value in self.state_dict().items()}, temporary)

    @classmethod
    def load(cls, path: str | Path) -> Probe:
        """What `save` wrote; ArgumentError for anything else."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            found = load_file(path)
            return cls(found["words"], int(found["end"]), found["weight"], found["bias"])
        except (SafetensorError, KeyError) as error:
            raise ArgumentError(f"specexit.Probe: {path} is no probe: {error}") from error


@dataclass(frozen=True)
class Trace:
    """A sequence int64 [t] that thinks: tokens `[start, stop)` are its thoughts, `tokens[stop]` ends them."""

    tokens: Tensor
    start: int
    stop: int


def traces(
    model: Any,
    prompts: Sequence[str | Tensor],
    tokenizer: Any = None,
    *,
    end: int,
    max_new_tokens: int = 2048,
    batch: int = 8,
    **options: Any,
) -> list[Trace]:
    """The model's own answers to prompts, at full depth, up to the token `end`; those that never make it are left out.

    Strings need a tokenizer, and stand as they are: put them into the chat template first. `options` go to generate.
    """
    given = encode(prompts, tokenizer, "specexit.traces: prompts", special=True)
    found = []
    for first in range(0, len(given), batch):
        part = given[first : first + batch]
        ids, mask = _padded(part)
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), custom_generate=generate,
            max_new_tokens=max_new_tokens, **options,
        ).cpu()  # fmt: skip
        for prompt, row in zip(part, out, strict=True):
            made = row[ids.shape[1] :]
            at = (made == end).nonzero()[:, 0]
            if len(at) and int(at[0]):
                stop = prompt.shape[0] + int(at[0])
                found.append(Trace(torch.cat([prompt, made[: int(at[0]) + 1]]), prompt.shape[0], stop))
    return found


def fit(
    model: Any,
    traces: Sequence[Trace],
    separators: Iterable[int],
    *,
    words: int = 256,
    answers: int = 8,
    answer_tokens: int = 16,
    batch: int = 8,
    seed: int = 0,
) -> tuple[Probe, dict[str, dict[str, float]]]:
    """A probe by ridge regression on traces, and its mean absolute errors on every fifth one, which it was not shown.

    Labels of the row that chose thought k of T: progress k / T; T - k tokens remain; confidence is that of an answer forced
    at the end of its step: the geometric mean of the probabilities of the `answer_tokens` likeliest tokens after `end`.

    Args:
        separators: token ids that end a step.
        words: vocabulary words that the probe looks at, drawn by `seed`.
        answers: steps per trace at which an answer is forced, evenly spread; others take the next one's confidence.
        batch: answers generated together.

    Returns the probe and, by signal, `error` and `error_of_constant` in the signal's own unit. All traces must end with the
    same token. NotEnoughDataError for fewer than two traces.
    """
    if len(traces) < 2:
        raise NotEnoughDataError(f"specexit.fit: wanted at least two traces that end, got {len(traces)}")
    ends = {int(trace.tokens[trace.stop]) for trace in traces}
    if len(ends) > 1:
        raise ArgumentError(f"specexit.fit: traces must end with one token, got {sorted(ends)}")
    chosen = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(seed))[:words].sort().values
    probe = Probe(chosen, ends.pop())
    labels = _labels(model, traces, set(separators), answers, answer_tokens, batch)
    features = torch.cat([_features(model, probe, trace) for trace in traces])
    wanted = torch.cat(labels)
    held = torch.cat([torch.full((len(y),), i % _HELD_OUT == min(_HELD_OUT, len(traces)) - 1) for i, y in enumerate(labels)])
    middle, spread = features[~held].mean(0), features[~held].std(0).clamp_min(1e-4)
    shown, kept = (NormalEquations(features.shape[1], len(SIGNALS)) for _ in range(2))
    for equations, rows in ((shown, ~held), (kept, held)):
        equations.add((features[rows] - middle) / spread, _open(wanted[rows]))
    found = solve_best(shown, kept, {name: slice(at, at + 1) for at, name in enumerate(SIGNALS)})
    for at, name in enumerate(SIGNALS):
        weights = found[name][0][:, 0]
        probe.weight[at] = weights[:-1] / spread
        probe.bias[at] = weights[-1] - (weights[:-1] * middle / spread).sum()
    said = _closed(features[held] @ probe.weight.T + probe.bias)
    constant = _closed(_open(wanted[~held]).mean(0, keepdim=True))
    errors = {
        name: {
            "error": float((said[:, at] - wanted[held, at]).abs().mean()),
            "error_of_constant": float((constant[:, at] - wanted[held, at]).abs().mean()),
        }
        for at, name in enumerate(SIGNALS)
    }
    return probe, errors


def _open(signals: Tensor) -> Tensor:
    """What a linear map learns: log-odds of shares, logarithm of tokens."""
    return torch.cat([torch.logit(signals[:, :2].clamp(_EDGE, 1 - _EDGE)), signals[:, 2:].clamp_min(1).log()], dim=1)


def _closed(y: Tensor) -> Tensor:
    return torch.cat([torch.sigmoid(y[:, :2]), torch.exp(y[:, 2:])], dim=1)


def _features(model: Any, probe: Probe, trace: Trace) -> Tensor:
    """Of the rows that chose the thoughts."""
    scored = score(model, [trace.tokens[: trace.stop]])
    rows = scored.ready[trace.start - 1 : trace.stop - 1]
    made = torch.arange(len(rows)).split(HEAD_ROWS)
    return torch.cat([
        probe.features(scored.model.logits(part).cpu(), at) for part, at in zip(rows.split(HEAD_ROWS), made, strict=True)
    ])  # fmt: skip


def _labels(
    model: Any, traces: Sequence[Trace], separators: set[int], answers: int, answer_tokens: int, batch: int
) -> list[Tensor]:
    """Per trace float32 [thoughts, 3]."""
    asked: list[Tensor] = []
    places: list[list[int]] = []
    for trace in traces:
        thoughts = trace.tokens[trace.start : trace.stop].tolist()
        steps = [at + 1 for at, token in enumerate(thoughts) if token in separators and at + 1 < len(thoughts)]
        every = max(1, math.ceil((len(steps) + 1) / answers))
        # From the last one down: the answer that the trace itself goes on to is always among them.
        kept = [*steps, len(thoughts)][::-1][::every][::-1]
        places.append(kept)
        asked += [torch.cat([trace.tokens[: trace.start + at], trace.tokens[trace.stop : trace.stop + 1]]) for at in kept]
    sure = iter(_confidence(model, asked, answer_tokens, batch))
    found = []
    for trace, kept in zip(traces, places, strict=True):
        count = trace.stop - trace.start
        number = torch.arange(1, count + 1)
        confidence = torch.tensor([next(sure) for _ in kept])
        step = torch.bucketize(number, torch.tensor(kept))
        found.append(torch.stack([confidence[step], number / count, (count - number).float()], dim=1))
    return found


def _confidence(model: Any, sequences: Sequence[Tensor], tokens: int, batch: int) -> list[float]:
    """Geometric mean of the probabilities of the likeliest next tokens of each sequence, up to the end of its text."""
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    found = []
    for first in range(0, len(sequences), batch):
        ids, mask = _padded(sequences[first : first + batch])
        out = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), custom_generate=generate,
            max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        made = out.sequences[:, ids.shape[1] :].cpu()
        chances = torch.stack([logits.float().log_softmax(-1).amax(-1).cpu() for logits in out.logits], dim=1)
        for row, logs in zip(made.tolist(), chances, strict=True):
            count = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
            found.append(float(logs[:count].mean().exp()))
    return found


def _padded(sequences: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """int64 [n, longest] ids and mask, padded on the left."""
    longest = max(len(each) for each in sequences)
    ids = torch.stack([nn.functional.pad(each, (longest - len(each), 0)) for each in sequences])
    mask = torch.stack([nn.functional.pad(torch.ones_like(each), (longest - len(each), 0)) for each in sequences])
    return ids, mask
