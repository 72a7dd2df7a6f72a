"""Lossless generation: tokens of early exits are drafts, and the rows that made them verify them when they go on.

Self-speculation (LayerSkip, Elhoushi et al. 2024, arXiv:2404.16710; Kangaroo, Liu et al. 2024, arXiv:2404.18911) on the row
machine: a row that leaves early parks with its residual, its token is a draft and the sequence's next row. When a row goes to
the top, the parked rows of its sequence go with it from where they are, so no layer runs twice for a row, and their logits
say what the full model would have said. Drafting ends where a row does not leave (it is not confident) or at a number of
drafts. Where most sequences of a batch go on drafting, they do so together, and rows that need the other layers wait for each
other at the last exit point; elsewhere one pass drafts for some and verifies for others. Neither changes what is drafted.

Where a band resumes below the top, drafts skip layers (Draft & Verify, Zhang et al. 2023, arXiv:2309.08168): a drafting row
runs what its bands leave of the model, to the head. What layers above the lowest band's boundary make of it is not the full
model's, so the row parks with the residual that it had at that boundary, and verification begins there: it runs those layers
for every drafted row and writes its K,V over the draft's. Layers below that boundary run once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dyndepth.exits import Band, Exits
from dyndepth.ops import accept_drafts
from dyndepth.runtime.bind import most_likely
from dyndepth.runtime.confidence import Confidence, Gate
from dyndepth.runtime.decoding import Decoding
from dyndepth.runtime.observe import observed
from dyndepth.runtime.parked import Parked
from dyndepth.runtime.result import Result
from dyndepth.runtime.session import Work
from dyndepth.runtime.stops import Processed, Stops

#: Drafts per sequence before they are verified.
DEFAULT_DRAFTS = 4


@dataclass
class _Sequence:
    """One request."""

    number: int
    #: What processors and criteria see: the prompt as given (padding included), then the tokens; int64 [longest].
    ids: Tensor
    #: Columns of `ids` that the prompt takes, and real tokens in it.
    width: int
    prompt: int
    #: Tokens that are final.
    made: int = 0
    #: Tokens not verified yet, and the boundary and distribution [V] that each was drawn at (None: it is the likeliest).
    drafts: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    drawn: list[Tensor | None] = field(default_factory=list)
    #: Bands that each draft took, as bits.
    took: list[int] = field(default_factory=list)
    #: When it stops drafting, and whether it has.
    gate: Gate | None = None
    unsure: bool = False
    #: Its newest row waits at the last exit point for the layers above.
    held: bool = False
    ended: bool = False
    #: Tokens until it ended, with an end-of-sequence token or without.
    length: int | None = None
    exits: list[int] = field(default_factory=list)
    bands: list[int] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0

    @property
    def position(self) -> int:
        """Of the first row that is not final: that of the newest final token."""
        return self.prompt - 1 + self.made

    def prefix(self, drafts: int) -> tuple[int, Tensor]:
        """The request's number, and its ids with the first `drafts` drafts."""
        ids = self.ids[: self.width + self.made]
        return self.number, ids if drafts == 0 else torch.cat([ids, ids.new_tensor(self.drafts[:drafts])])


def drafts_from(exits: Exits) -> int | None:
    """Boundary up to which drafts that skip layers are the full model's rows; None where exits only leave for good."""
    if all(band.resume == exits.model.layers for band in exits):
        return None
    return min(band.leave for band in exits)


@dataclass
class Speculation(Decoding):
    """State of one lossless generation."""

    #: Drafts per sequence before they are verified.
    most: int
    #: Nats that a draft may be less likely than certain and stand nevertheless; 0 is lossless.
    rollback: float
    #: When drafting stops, beside criteria and `most`; None: never.
    confidence: Confidence | None
    streamed: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        model = self.model
        self.parked = Parked.nothing(torch.empty(0, model.hidden_size, dtype=model.dtype, device=model.device))
        exits = self.session.plan.exits
        #: Where verification of drafts that skip layers begins; None where drafts are early exits.
        self.again = None if exits is None else drafts_from(exits)
        #: Rows that might leave early so far, and those that did.
        self.asked, self.left = 0, 0

    def run(self, input_ids: Tensor, prompts: list[Tensor], embedded: bool, prompt_work: Work) -> Any:
        self.limit = max(self.config.max_length - input_ids.shape[1], 1)
        self.processed = Processed(self.processor, len(prompts), self._text)
        self.stops = Stops(self.criteria, len(prompts), self._text)
        self.sequences: list[_Sequence] = []
        for number, (ids, rows) in enumerate(zip(input_ids.cpu(), prompts, strict=True)):
            room = torch.cat([ids, ids.new_zeros(self.limit)])
            gate = None if self.confidence is None else self.confidence.begin()
            self.sequences.append(_Sequence(number, room, ids.shape[0], rows.shape[0], gate=gate))
        first = torch.stack([rows[-1] for rows in prompts]) if prompts else input_ids.new_empty(0)
        while running := [each for each in self.sequences if not each.ended]:
            self._round(running, first if embedded else None)
        if self.streamer is not None:
            self.streamer.end()
        return self._output(input_ids, prompt_work)

    def _text(self, request: int) -> Tensor:
        each = self.sequences[request]
        return each.ids[: each.width + each.made]

    # -- passes -------------------------------------------------------------------------------------------------------

    def _round(self, running: list[_Sequence], embeds: Tensor | None) -> None:
        """One pass: sequences that may draft do; those that wait go to the top when none may, or when few would."""
        drafting = [each for each in running if self._drafts(each)]
        last = max((band.leave for band in self.session.plan.bands.values()), default=0)
        alone = bool(drafting) and (self.again is not None or self._apart(len(drafting), len(running), last))
        # Of one sequence nobody waits for the others: a row that does not leave goes on at once.
        hold = frozenset([last]) if alone and len(running) > 1 and self.again is None else frozenset()
        fresh = drafting if alone else [each for each in running if not each.held]
        present = np.ones(len(self.parked), dtype=np.bool_)
        if alone:
            present = np.isin(self.parked.seq, [each.number for each in drafting]) & (self.again is None)
        if hold:  # nobody passes there, so nobody who waits there can follow
            present &= self.parked.at < last
        taken, others = self.parked.where(present), self.parked.where(~present)
        seq = [each.number for each in fresh]
        pos = [each.position + len(each.drafts) for each in fresh]
        step = [each.made + len(each.drafts) for each in fresh]
        newest = [each.drafts[-1] if each.drafts else int(each.ids[each.width + each.made - 1]) for each in fresh]
        source: dict[str, Any] = {"tokens": torch.tensor(newest, dtype=torch.int64)}
        if embeds is not None and fresh and fresh[0].made == 0 and not fresh[0].drafts:  # all sequences begin together
            source = {"embeds": embeds[seq]}
        keep = self.again if drafting else None
        # One bool for all rows where they are alike: a closed pass does not judge.
        free: bool | torch.Tensor = alone or (bool(drafting) and torch.tensor([self._drafts(each) for each in fresh]))
        result = self.session.run(seq, pos, step=step, parked=taken, hold=hold, may_leave=free, keep=keep, **source)
        self.work.add(result, 0)
        if self.again is None:
            self.asked += len(drafting)
            self.parked = self.session.left(result, seq, pos, step, taken) + others
            self._drafted(fresh, result)
        else:
            self.parked = others
            if drafting:
                assert result.kept is not None
                self.parked += Parked.following(result.kept, seq, pos, step, self.again)
                self._drafted(fresh, result)
                return
        self._verify(seq + taken.seq.tolist(), pos + taken.pos.tolist(), result)

    def _drafts(self, each: _Sequence) -> bool:
        """Its next row may make a draft."""
        return not (each.held or each.unsure) and len(each.drafts) < min(self.most, self._left(each) - 1)

    def _apart(self, drafting: int, running: int, last: int) -> bool:
        """A pass of the drafting sequences alone, to the last exit point, is worth its while.

        It runs a share of the layers; a pass of everybody gets a token from each. So the share of all sequences that will
        leave, at the rate seen so far, must be as large (at first everybody is hoped to).
        """
        rate = (self.left + 1) / (self.asked + 1)
        return drafting * rate >= running * last / self.model.depth

    def _left(self, each: _Sequence) -> int:
        """Tokens that a sequence may still make."""
        return self.limit - each.made

    def _drafted(self, fresh: list[_Sequence], result: Result) -> None:
        """Tokens of the rows that left or, where drafts skip layers, of all."""
        depths = result.exit_layer[: len(fresh)].tolist()
        held = [False] * len(fresh) if result.held is None else result.held.tolist()
        for each, waits in zip(fresh, held, strict=False):
            each.held = waits
        # A row that came to the top after it had skipped layers drafts with the model's own head.
        everywhere: dict[int, Band | None] = {**self.session.plan.bands}
        if self.again is not None:
            everywhere[self.model.depth] = None
        for leave, band in everywhere.items():
            rows = [at for at, depth in enumerate(depths) if depth == leave and not held[at]]
            if not rows:
                continue
            ready = result.ready[torch.tensor(rows, device=result.ready.device)]
            mine = [fresh[at] for at in rows]
            drawn: list[Tensor | None] = [None] * len(rows)
            if self.processed.empty and not self.config.do_sample and self.confidence is None:
                tokens = self.model.argmax(ready) if band is None else self.session.plan.stats(band, ready).argmax
                sure = None
            else:
                logits = self.model.logits(ready) if band is None else self.session.plan.logits(band, ready)
                scores = self.processed([each.prefix(len(each.drafts)) for each in mine], logits)
                tokens = most_likely(scores)
                sure = torch.softmax(scores.float(), dim=-1)
                if self.config.do_sample:
                    chances = sure
                    # Where processors forbid all that the shortlist has, the draft is any token, for certain; it will not hold.
                    nothing = ~(chances.sum(-1) > 0)
                    certain = torch.nn.functional.one_hot(tokens, chances.shape[1]).to(chances.dtype)
                    chances = torch.where(nothing[:, None], certain, chances)
                    tokens = torch.multinomial(chances, 1, generator=self.generator)[:, 0]
                    drawn = list(chances)
            self.left += len(rows)
            took = result.bands_taken.tolist()
            for each, row, token, chance in zip(mine, rows, tokens.tolist(), drawn, strict=True):
                each.drafts.append(token)
                each.at.append(leave)
                each.drawn.append(chance)
                each.took.append(took[row])
            if sure is not None:
                for each, chance in zip(mine, sure.gather(1, tokens[:, None])[:, 0].tolist(), strict=True):
                    each.unsure = each.gate is not None and each.gate.stops(chance)

    # -- verification -------------------------------------------------------------------------------------------------

    def _verify(self, seq: list[int], pos: list[int], result: Result) -> None:
        """Accept the drafts of sequences whose rows reached the top, as far as the full model agrees, and one token more."""
        depth = self.model.depth
        rows = {
            (s, p): row
            for row, (s, p, layer) in enumerate(zip(seq, pos, result.exit_layer.tolist(), strict=True))
            if layer == depth
        }
        there = [self.sequences[number] for number in sorted({s for s, _ in rows})]
        if not there:
            return
        places = [(each, j) for each in there for j in range(len(each.drafts) + 1)]
        chosen = torch.tensor([rows[each.number, each.position + j] for each, j in places], device=result.ready.device)
        logits = self.model.logits(result.ready[chosen])
        scores = self.processed([each.prefix(j) for each, j in places], logits)
        accepted, tokens = self._accepted(there, scores)
        before = {each.number: each.made for each in there}
        begin = 0
        for each, count, token in zip(there, accepted, tokens, strict=True):
            each.bands += [*each.took[:count], 0]
            self._extend(each, [*each.drafts[:count], token], [*each.at[:count], depth], scores[begin:], logits[begin:])
            if each.gate is not None:
                each.gate.verified(len(each.drafts), count, self.most)
            each.accepted += min(count, each.made - before[each.number])
            each.drafted += len(each.drafts)
            begin += len(each.drafts) + 1
            each.drafts, each.at, each.drawn, each.took, each.held, each.unsure = [], [], [], [], False, False
            self.session.pages.truncate(each.number, each.position)
        if self.observer is not None:
            self._observe(result, chosen, logits, places, before)
        for each in self.sequences:
            if not each.ended and self._over(each):
                each.ended = True
                self.parked = self.parked.where(self.parked.seq != each.number)
                self.session.pages.release(each.number)
        self._stream()

    def _accepted(self, there: list[_Sequence], scores: Tensor) -> tuple[list[int], list[int]]:
        """Per sequence, how many drafts hold and the token after them."""
        device = scores.device
        counts = [len(each.drafts) for each in there]
        most = max(counts)
        drafts = torch.full((len(there), most), -1, dtype=torch.int64, device=device)
        where = torch.tensor([(row, j) for row, count in enumerate(counts) for j in range(count + 1)], device=device).T
        for row, each in enumerate(there):
            drafts[row, : counts[row]] = torch.tensor(each.drafts, dtype=torch.int64)
        lengths = torch.tensor(counts, dtype=torch.int32, device=device)
        if not self.config.do_sample:
            best = torch.zeros(len(there), most + 1, dtype=torch.int64, device=device)
            best[where[0], where[1]] = most_likely(scores)
            if self.rollback > 0:  # what the full model can live with counts as its own word
                chances = scores.new_full((len(there), most + 1, scores.shape[1]), -torch.inf)
                chances[where[0], where[1]] = torch.log_softmax(scores.float(), dim=-1)
                likely = chances[:, :most].gather(2, drafts.clamp_min(0)[..., None])[..., 0] >= -self.rollback
                best[:, :most] = torch.where(likely & (drafts >= 0), drafts, best[:, :most])
            accepted, tokens = accept_drafts(drafts, lengths, best)
            return accepted.tolist(), tokens.tolist()
        wanted = scores.new_zeros(len(there), most + 1, scores.shape[1], dtype=torch.float32)
        wanted[where[0], where[1]] = torch.softmax(scores.float(), dim=-1)
        had = wanted.new_zeros(len(there), most, scores.shape[1])
        for row, each in enumerate(there):
            for j, chance in enumerate(each.drawn):
                assert chance is not None
                had[row, j] = chance
        luck = torch.rand(len(there), most + 1, generator=self.generator, device=device)
        accepted, tokens = accept_drafts(drafts, lengths, wanted, draft_probs=had, uniforms=luck)
        return accepted.tolist(), tokens.tolist()

    def _observe(
        self, result: Result, chosen: Tensor, logits: Tensor, places: list[tuple[_Sequence, int]], before: dict[int, int]
    ) -> None:
        """Tell the observer of the rows behind the tokens that became final; sequences had made `before` tokens."""
        assert self.observer is not None
        kept = torch.tensor([at for at, (each, j) in enumerate(places) if j < each.made - before[each.number]])
        seq = [places[at][0].number for at in kept.tolist()]
        step = [before[places[at][0].number] + places[at][1] for at in kept.tolist()]
        full = logits[kept.to(logits.device)].argmax(-1)
        self.observer(observed(list(self.session.plan.bands), result.carried, chosen.cpu()[kept], full, seq, step))

    def _extend(self, each: _Sequence, tokens: list[int], at: list[int], scores: Tensor, logits: Tensor) -> None:
        """Make tokens final, up to the one that ends the sequence."""
        for j, (token, leave) in enumerate(zip(tokens, at, strict=True)):
            each.ids[each.width + each.made] = token
            each.made += 1
            each.exits.append(leave)
            if self.keep and self.config.output_scores:
                each.scores.append(scores[j].clone())
            if self.keep and self.config.output_logits:
                each.logits.append(logits[j].clone())
            self.work.rows += 1
            if each.length is None and self.stops(each.number, self._text(each.number), scores[j] if self.keep else None):
                each.length = each.made
            if each.made == self.limit or (self.stops.has_eos and each.length is not None):
                return

    def _over(self, each: _Sequence) -> bool:
        """No more tokens are wanted. Without an end token transformers goes on until every sequence has met a criterion."""
        if each.made == self.limit or (self.stops.has_eos and each.length is not None):
            return True
        lengths = [other.length for other in self.sequences]
        return None not in lengths and each.made >= max(length or 0 for length in lengths)

    # -- what comes out -------------------------------------------------------------------------------------------------

    def _columns(self) -> int:
        return max((each.length or each.made for each in self.sequences), default=0)

    def _stream(self) -> None:
        """Columns that every sequence has reached, or has ended before."""
        if self.streamer is None:
            return
        done = min((each.made for each in self.sequences if not each.ended), default=self._columns())
        for column in range(self.streamed, done):
            self.streamer.put(torch.tensor([self._token(each, column) for each in self.sequences]))
        self.streamed = max(self.streamed, done)

    def _token(self, each: _Sequence, column: int) -> int:
        return int(each.ids[each.width + column]) if column < each.made else int(self.config._pad_token_tensor)

    def _output(self, input_ids: Tensor, prompt_work: Work) -> Any:
        columns = self._columns()
        made = torch.tensor([[self._token(each, column) for column in range(columns)] for each in self.sequences])
        ids = torch.cat([input_ids, made.reshape(len(self.sequences), columns).to(input_ids)], dim=-1)
        if not self.keep:
            return ids
        from dyndepth.runtime.output import DynamicDepthOutput

        depths = torch.full((len(self.sequences), columns), -1, dtype=torch.int32)
        taken = torch.zeros(len(self.sequences), columns, dtype=torch.int64)
        for row, each in enumerate(self.sequences):
            depths[row, : min(each.made, columns)] = torch.tensor(each.exits[:columns], dtype=torch.int32)
            taken[row, : min(each.made, columns)] = torch.tensor(each.bands[: min(each.made, columns)], dtype=torch.int64)
        return DynamicDepthOutput(
            sequences=ids,  # type: ignore[arg-type]
            scores=self._steps("scores", columns) if self.config.output_scores else None,  # type: ignore[arg-type]
            logits=self._steps("logits", columns) if self.config.output_logits else None,  # type: ignore[arg-type]
            exit_layers=depths,
            layers_run=torch.where(depths >= 0, self.model.depth, -1).int(),
            bands_taken=taken,
            work=self.work,
            prompt_work=prompt_work,
            kv=self.session.kv_policy,
            drafted=torch.tensor([each.drafted for each in self.sequences]),
            accepted=torch.tensor([each.accepted for each in self.sequences]),
        )

    def _steps(self, name: str, columns: int) -> tuple[Tensor, ...]:
        """Per new token, fp32 [batch, V]; zero after the end of a sequence."""
        nothing = torch.zeros(self.model.vocab_size, device=self.model.device)
        kept = [getattr(each, name) for each in self.sequences]
        return tuple(torch.stack([rows[c] if c < len(rows) else nothing for rows in kept]) for c in range(columns))
