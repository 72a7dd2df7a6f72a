"""The decoding loop, shaped like transformers' own so that processors, criteria and streamers mean the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.exits.criteria import HOLE_FREE
from dyndepth.runtime.bind import bind, most_likely
from dyndepth.runtime.confidence import Confidence
from dyndepth.runtime.decoding import Decoding
from dyndepth.runtime.inputs import real_tokens
from dyndepth.runtime.observe import Observer, check_observer, observed
from dyndepth.runtime.pages import Indices
from dyndepth.runtime.parked import Parked
from dyndepth.runtime.policies import EXACT
from dyndepth.runtime.result import Result
from dyndepth.runtime.session import DEFAULT_CHUNK, DEFAULT_PAGE_SIZE, DEFAULT_PENDING, Session, Work, default_policy
from dyndepth.runtime.speculate import DEFAULT_DRAFTS, Speculation, drafts_from
from dyndepth.runtime.stops import has_eos

PROMPTS = ("full", "dynamic")
MODES = ("dynamic", "lossless", "rollback")
#: New tokens that K,V pages are taken for at once; more come when they are needed, so a high max_new_tokens costs nothing.
_ROOM = 256


def decode(
    causal_lm: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    exits: Exits | None,
    kv: str | None = None,
    depth: int | Sequence[int | None] | None = None,
    prompt: str = "full",
    page_size: int = DEFAULT_PAGE_SIZE,
    pages: int | None = None,
    prefill_chunk: int = DEFAULT_CHUNK,
    pending: int = DEFAULT_PENDING,
    mode: str = "dynamic",
    drafts: int = DEFAULT_DRAFTS,
    rollback: float | None = None,
    confidence: float | Confidence | None = None,
    observe: Observer | None = None,
    graphs: bool | str = False,
    generator: torch.Generator | None = None,
    streamer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy search or sampling with dynamic depth; arguments are prepared by transformers (see `dyndepth.generate`)."""
    _refuse(generation_config, model_kwargs, prompt)
    verified = _verified(mode, drafts, rollback, exits, kv, bool(generation_config.do_sample))
    if graphs is True and verified and exits is not None and drafts_from(exits) is not None:
        raise ArgumentError("generate: graphs=True: drafts that skip layers keep residuals, which graphs do not; use 'auto'")
    if confidence is not None and not verified:
        raise ArgumentError(f"generate: confidence stops drafting, which mode={mode!r} does not do")
    model = bind(causal_lm)
    batch, width = input_ids.shape
    prompts, embedded = _prompts(input_ids, model_kwargs)
    limit = generation_config.max_length - width
    # The last new token is not run: nothing follows it.
    lengths = [prompt_rows.shape[0] + max(limit, 1) - 1 for prompt_rows in prompts]
    session = Session(
        model,
        lengths,
        exits,
        kv=_drafts_policy(exits, kv) if verified and exits is not None else kv,
        depth=_per_sequence(depth, batch, generation_config.num_return_sequences or 1),
        page_size=page_size,
        pages=pages,
        chunk=prefill_chunk,
        pending=pending,
        observed=observe is not None,
        graphs=graphs,
        first=[min(length, prompt_rows.shape[0] + _ROOM) for length, prompt_rows in zip(lengths, prompts, strict=True)],
    )
    check_observer(observe, session.kv_policy)
    prompt_work, work = session.work(), session.work()
    if prompt == "dynamic" and session.kv_policy == "recompute":
        raise ArgumentError("generate: prompt must be 'full' with kv='recompute' (prompt rows run together), got 'dynamic'")
    if prompt == "dynamic" and verified:
        raise ArgumentError(f"generate: prompt must be 'full' with mode={mode!r}, which verifies no prompt, got 'dynamic'")
    if prompt == "dynamic" and session.plan.votes:
        raise ArgumentError("generate: prompt must be 'full' with bands that prompts decide (prompt_router), got 'dynamic'")
    opening: Tensor | None = None
    if exits is None and observe is None and session.kv_policy not in EXACT and batch:
        opening = session.open(prompts, prompt_work, work, embeds=embedded)
    else:
        # The last prompt row is the first decode row: it produces a token, so it may leave like any other.
        session.prefill([rows[:-1] for rows in prompts], prompt_work, embeds=embedded, may_leave=prompt == "dynamic")
    parts = (model, session, generation_config, logits_processor, stopping_criteria, generator, streamer, work, observe)
    if not verified:
        return _Loop(*parts, opening=opening).run(input_ids, prompts, embedded, prompt_work)
    gate = Confidence(float(confidence)) if isinstance(confidence, int | float) else confidence
    return Speculation(*parts, drafts, rollback or 0.0, gate).run(input_ids, prompts, embedded, prompt_work)


def _verified(mode: str, drafts: int, rollback: float | None, exits: Exits | None, kv: str | None, sampled: bool) -> bool:
    """Early exits draft. Raises for what does not go together."""
    if mode not in MODES:
        raise ArgumentError(f"generate: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if (mode == "rollback") != (rollback is not None) or not (rollback is None or rollback >= 0):
        raise ArgumentError(
            f"generate: mode='rollback' wants rollback in nats from 0 up, and only it, got {mode!r}, {rollback}"
        )
    if mode == "dynamic":
        return False
    if exits is None:
        raise ArgumentError(f"generate: mode={mode!r} drafts with early exits, got exits=None")
    if drafts_from(exits) is None:
        if kv not in (None, "recompute"):
            raise ArgumentError(f"generate: mode={mode!r} works with kv='recompute' only, got kv={kv!r}")
    elif kv in EXACT:
        raise ArgumentError(
            f"generate: mode={mode!r} with bands that resume verifies from the lowest one on; kv says what drafts leave each "
            f"other in the layers they skip and may not be {' or '.join(EXACT)}, got kv={kv!r}"
        )
    if mode == "rollback" and sampled:
        raise ArgumentError("generate: mode='rollback' is greedy, got do_sample=True; mode='lossless' samples")
    if not isinstance(drafts, int) or drafts < 1:
        raise ArgumentError(f"generate: drafts must be at least 1, got {drafts}")
    return True


def _drafts_policy(exits: Exits, kv: str | None) -> str:
    """What drafts leave later drafts in the layers they skip, until verification writes over it."""
    if drafts_from(exits) is None:
        return "recompute"
    if kv is not None:
        return kv
    return "none" if all(band.criterion.kind in HOLE_FREE for band in exits) else default_policy(exits)


@dataclass
class _Loop(Decoding):
    """State of one generation: which sequences still run, what was recorded."""

    #: Head-ready rows of the first tokens, where the prompts' passes made them.
    opening: Tensor | None = None
    #: Under `recompute`, the tokens that left and whose other layers nobody has needed yet.
    parked: Parked | None = field(init=False, default=None)
    #: int64 [3, batch] per step: exit layers, layers run, bands taken.
    went: list[Tensor] = field(init=False, default_factory=list)
    #: The last pass, and sequence and step of its rows.
    seen: tuple[Result, tuple[Tensor, Tensor]] = field(init=False)

    def run(self, input_ids: Tensor, prompts: list[Tensor], embedded: bool, prompt_work: Work) -> Any:
        config, session = self.config, self.session
        batch = input_ids.shape[0]
        pad = config._pad_token_tensor
        ends, forbidden = has_eos(self.criteria), self.forbidden
        unfinished = torch.ones(batch, dtype=torch.long, device=input_ids.device)
        lengths = [rows.shape[0] for rows in prompts]
        content = torch.stack([rows[-1] for rows in prompts]) if batch else input_ids.new_empty(0)
        scores: list[Tensor] = []
        raw_logits: list[Tensor] = []
        step = 0
        while True:
            # Without an EOS token transformers goes on writing sequences that a stop string or criterion ended: so do we.
            running = (unfinished if ends else torch.ones_like(unfinished)).nonzero()[:, 0].cpu()
            if self.opening is not None and step == 0:
                ready, top = self.opening, self.model.depth
                self.went.append(torch.tensor([top, top, 0])[:, None].repeat(1, batch))
            else:
                ready = self._pass(running, lengths, content, embedded and step == 0, step, batch)
            if forbidden is not None:
                best = self.model.argmax(ready)
                self._observe(best)
                best = self._allowed(best, forbidden, ready, input_ids, running)
                tokens = self._everyone(best, running, batch).to(input_ids.device)
            else:
                logits = self.model.logits(ready)
                if self.observer is not None:
                    self._observe(most_likely(logits))
                logits = self._everyone(logits, running, batch).to(input_ids.device)
                next_scores = self.processor(input_ids, logits)
                if self.keep:
                    if config.output_scores:
                        scores.append(next_scores)
                    if config.output_logits:
                        raw_logits.append(logits)
                if config.do_sample:
                    probabilities = torch.softmax(next_scores, dim=-1)
                    tokens = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
                else:
                    tokens = most_likely(next_scores)
            if ends:
                tokens = tokens * unfinished + pad.to(tokens.device) * (1 - unfinished)
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            if self.streamer is not None:
                self.streamer.put(tokens.cpu())
            stopped = self.criteria(input_ids, tuple(scores) if self.keep and config.output_scores else None)
            unfinished = unfinished & ~stopped
            for sequence in running.tolist():
                lengths[sequence] += 1
                if ends and not unfinished[sequence]:
                    session.pages.release(sequence)
                    if self.parked is not None:  # nobody will need their K,V
                        self.parked = self.parked.where(self.parked.seq != sequence)
            content = tokens
            step += 1
            if not bool(unfinished.any()):
                break
        if self.streamer is not None:
            self.streamer.end()
        if not self.keep:
            return input_ids
        from dyndepth.runtime.output import DynamicDepthOutput

        exit_layers, layers_run, bands_taken = torch.stack(self.went, dim=-1)
        return DynamicDepthOutput(
            sequences=input_ids,  # type: ignore[arg-type]
            scores=tuple(scores) if config.output_scores else None,  # type: ignore[arg-type]
            logits=tuple(raw_logits) if config.output_logits else None,  # type: ignore[arg-type]
            exit_layers=exit_layers.int(),
            layers_run=layers_run.int(),
            bands_taken=bands_taken,
            work=self.work,
            prompt_work=prompt_work,
            kv=session.kv_policy,
        )

    def _pass(self, running: Tensor, lengths: list[int], content: Tensor, embedded: bool, step: int, batch: int) -> Tensor:
        """Head-ready rows of the running sequences; notes where they went, (-1, -1, 0) for those that have ended."""
        positions = [lengths[sequence] - 1 for sequence in running.tolist()]
        mine = content[running.to(content.device)]
        source: dict[str, Any] = {"embeds": mine} if embedded else {"tokens": mine}
        steps = torch.full_like(running, step)
        count, parked = running.shape[0], self.parked
        if parked is not None and len(parked):
            # A sequence with too many tokens parked takes them to the top with its next one.
            waiting = torch.from_numpy(parked.counts(batch))[running]
            source["may_leave"] = waiting < self.session.pending
            if self.session.plan.depth is not None:
                # None of its rows ever goes deeper than the exit it names, so nothing that waits will be wanted.
                asked = self.session.plan.depth.cpu()[running]
                source["may_leave"] |= (asked >= 0) & (asked < self.model.depth)
        result = self.session.run(running, positions, step=steps, parked=parked, **source)
        self.work.add(result, count)
        went = torch.stack([result.exit_layer.long(), result.layers_run.long(), result.bands_taken]).cpu()
        if self.session.kv_policy == "recompute":
            if parked is not None:
                for sequence, at, ran in zip(parked.seq.tolist(), parked.step.tolist(), went[1, count:].tolist(), strict=True):
                    self.went[at][1, sequence] += ran
            self.parked = self.session.left(result, running, positions, steps, parked)
        whose = (running, steps) if parked is None else (_joined(running, parked.seq), _joined(steps, parked.step))
        self.seen = result, whose
        if count == batch:
            self.went.append(went[:, :count].clone())
        else:
            self.went.append(torch.tensor([-1, -1, 0])[:, None].repeat(1, batch))
            self.went[-1][:, running] = went[:, :count]
        return result.ready[:count]

    def _allowed(self, best: Tensor, forbidden: Tensor, ready: Tensor, input_ids: Tensor, running: Tensor) -> Tensor:
        """Where the best word may be forbidden, what processors make of that row's scores; all others keep theirs."""
        asked = torch.isin(best.cpu(), forbidden).nonzero()[:, 0] if len(forbidden) else forbidden
        if len(asked):
            text, at = input_ids[running[asked].to(input_ids.device)], asked.to(best.device)
            scores = self.processor(text, self.model.logits(ready[at]).to(text.device))
            best = best.index_copy(0, at, most_likely(scores).to(best.device))
        return best

    @staticmethod
    def _everyone(found: Tensor, running: Tensor, batch: int) -> Tensor:
        """[batch, ...] of what was found for the running sequences; zeros for those that have ended."""
        if running.shape[0] == batch:
            return found
        everyone = found.new_zeros(batch, *found.shape[1:])
        everyone[running.to(found.device)] = found
        return everyone

    def _observe(self, best: Tensor) -> None:
        """Tell the observer of the rows whose truth this pass found: all under `release`, else those that reached the top.

        `best` is what the pass's own tokens say, whatever processors make of it.
        """
        if self.observer is None:
            return
        model, (result, whose) = self.model, self.seen
        assert result.hidden is not None
        if self.session.kv_policy == "release":
            rows, full = torch.arange(len(best)), model.argmax(model.finish(result.hidden))
        else:
            rows = (result.exit_layer.cpu() == model.depth).nonzero()[:, 0]
            fresh, others = rows[rows < len(best)], rows[rows >= len(best)]
            full = best[fresh.to(best.device)]
            if len(others):
                full = torch.cat([full, model.argmax(result.ready[others.to(full.device)])])
        if len(rows):
            self.observer(observed(list(self.session.plan.bands), result.carried, rows, full, *(each[rows] for each in whose)))


def _joined(fresh: Tensor, parked: Indices) -> Tensor:
    return torch.cat([fresh, torch.from_numpy(parked)])


def _prompts(input_ids: Tensor, model_kwargs: dict[str, Any]) -> tuple[list[Tensor], bool]:
    """Per sequence, its token ids [t] or (True) embeddings [t, d], padding removed."""
    embeds = model_kwargs.get("inputs_embeds")
    content = input_ids if embeds is None else embeds
    sequences, kept = real_tokens("generate", content, model_kwargs.get("attention_mask"), model_kwargs.get("position_ids"))
    if content.shape[1] == 0:
        raise ArgumentError("generate: every prompt must have at least one token, got none")
    if not bool(kept[:, -1:].all()):
        raise ArgumentError("generate: attention_mask must be 1 in the last column (pad on the left), got a masked last token")
    return sequences, embeds is not None


def _per_sequence(depth: int | Sequence[int | None] | None, batch: int, repeats: int) -> list[int | None] | None:
    """One entry per sequence; requests are repeated as transformers repeats prompts for num_return_sequences."""
    if depth is None:
        return None
    if not isinstance(depth, Sequence):
        return [_depth(depth)] * batch
    values = [None if value is None else _depth(value) for value in depth]
    return [value for value in values for _ in range(repeats)] if len(values) * repeats == batch else values


def _depth(value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ArgumentError(f"generate: depth must be an int or one int or None per request, got {value!r}") from None


def _refuse(config: Any, model_kwargs: dict[str, Any], prompt: str) -> None:
    if (config.num_beams or 1) > 1:
        raise ArgumentError(f"generate: beam search is not supported (num_beams must be 1, got {config.num_beams})")
    if prompt not in PROMPTS:
        raise ArgumentError(f"generate: prompt must be one of {', '.join(PROMPTS)}, got {prompt!r}")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name, False):
            raise ArgumentError(f"generate: {name} is not supported: rows that left have none in the layers they skipped")
    for name in ("penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit", "constraints"):
        if getattr(config, name, None):
            raise ArgumentError(
                f"generate: {name} is another way of decoding and is not supported, got {getattr(config, name)}"
            )
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise ArgumentError("generate: past_key_values with content is not supported; pass the whole prompt")
    known = {
        "attention_mask",
        "position_ids",
        "inputs_embeds",
        "past_key_values",
        "use_cache",
        "logits_to_keep",
        "cache_position",
    }
    unknown = [name for name, value in model_kwargs.items() if name not in known and value is not None]
    if unknown:
        raise ArgumentError(f"generate: model arguments {', '.join(sorted(unknown))} are not supported")
