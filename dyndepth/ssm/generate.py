"""Mamba decoding where every token leaves at its own depth, in a batch."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.ops import compact_rows
from dyndepth.runtime.session import Work
from dyndepth.ssm import mixer as mixing
from dyndepth.ssm.exits import SsmExit, SsmExits, check_facts
from dyndepth.ssm.mixer import State

#: What becomes of the states of layers that a token skips: they stay as they were, or they take in the residual it left with.
POLICIES = ("leave", "update")


@dataclass(frozen=True)
class SsmDecoded:
    """What was generated."""

    #: int64 [n, t + new]: the prompts as given and the new tokens; after its end a sequence repeats the end token.
    sequences: Tensor
    #: int32 [n, new]: layers that each new token ran; 0 after the end.
    layers_run: Tensor
    #: Rows x layers of the steps that made the new tokens.
    work: Work
    #: Rows x layers whose state alone was moved on (`update`).
    updated: int


@dataclass(frozen=True)
class SsmScored:
    """What was said of given tokens, one column per token from `begin` on."""

    #: int64 [n, t - begin]: the most likely token there, given those before it.
    tokens: Tensor
    #: fp32 [n, t - begin], nats: log-probability of the token that stands there.
    log_probs: Tensor
    #: int32 [n, t - begin]: layers run to say so.
    layers_run: Tensor
    #: Rows x layers of these steps.
    work: Work
    #: Rows x layers whose state alone was moved on (`update`).
    updated: int


class MambaDecoder:
    """Greedy decoding of a MambaForCausalLM with exits.

        out = MambaDecoder(model, exits).generate(**inputs, max_new_tokens=64, policy="update")

    Args:
        model: in eval mode; it stays as it is.
        exits: made for it.

    The residuals of rows that run on are compacted; states stay where they are and are found by a sequence's number, so rows
    that left or ended cost nothing and their states are not touched. Arithmetic is that of transformers' slow path.
    """

    def __init__(self, model: Any, exits: SsmExits) -> None:
        check_facts(exits, model)
        if model.training:
            raise ArgumentError("MambaDecoder: the model must be in eval mode, got training mode (call model.eval())")
        self.model = model
        # Module.to moves in place: the caller's exits stay where they are.
        stays = all(part.device == model.device for part in (*exits.parameters(), *exits.buffers()))
        self.exits = exits if stays else copy.deepcopy(exits).to(model.device)
        self.layers = list(model.backbone.layers)
        #: Boundary -> its exit, and where its state stands among those of `_prefill`.
        self._at = {point.leave: (number, point) for number, point in enumerate(self.exits)}

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        policy: str = "leave",
        repetition_penalty: float = 1.0,
        end: int | None = None,
    ) -> SsmDecoded:
        """Continue prompts.

        Args:
            input_ids: int64 [n, t], padded on the left where `attention_mask` [n, t] is 0.
            max_new_tokens: at most.
            policy: `leave` or `update`.
            repetition_penalty: at least 1: logits of tokens that a sequence has already are divided by it, negative ones
                multiplied (CTRL; DYNAMAX adds it because exits repeat more).
            end: a sequence ends with it; the model's eos token by default, -1 for none.

        The last prompt token is the first that may leave: it makes a token.
        """
        mask = self._checked(input_ids, attention_mask, max_new_tokens, policy, repetition_penalty)
        n, given = input_ids.shape
        if end is None:
            end = self.model.config.eos_token_id
        end = -1 if end is None else end
        states, judges = self._prefill(input_ids[:, :-1], mask[:, :-1])
        device = input_ids.device
        tokens = torch.full((n, given + max_new_tokens), max(end, 0), dtype=torch.int64, device=device)
        tokens[:, :given] = input_ids
        seen = torch.cat([mask.bool(), torch.ones(n, max_new_tokens, dtype=torch.bool, device=device)], 1)
        depths_of = torch.zeros(n, max_new_tokens, dtype=torch.int32)
        work, updated = Work([0] * len(self.layers)), 0
        running = torch.arange(n, device=device)
        for new in range(max_new_tokens):
            at = given + new
            last, depths = self._step(tokens[running, at - 1], running, states, judges, policy)
            depths_of[running.cpu(), new] = depths
            updated += self._count(work, depths, policy)
            logits = self._said(last, new)
            if repetition_penalty != 1.0:
                logits = penalised(logits, tokens[running, :at], seen[running, :at], repetition_penalty)
            chosen = logits.argmax(-1)
            tokens[running, at] = chosen
            running = running[chosen != end]
            if len(running) == 0:
                tokens, depths_of = tokens[:, : at + 1], depths_of[:, : new + 1]
                break
        return SsmDecoded(tokens, depths_of, work, updated)

    @torch.no_grad()
    def score(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, begin: int = 1, policy: str = "leave"
    ) -> SsmScored:
        """Teacher-forced: what generation would say of tokens `begin` to the last, each given those that stand before it.

        Args:
            input_ids, attention_mask: as for `generate`; every sequence has a token before `begin`.
            begin: first column that is predicted; the row of the token before it is the first that may leave.
            policy: `leave` or `update`.

        Judging, states and depths are those of decoding these very tokens.
        """
        mask = self._checked(input_ids, attention_mask, 1, policy, 1.0)
        n, given = input_ids.shape
        if not 1 <= begin < given or not bool(mask[:, begin - 1].all()):
            raise ArgumentError(
                f"MambaDecoder.score: begin must be a column 1 to {given - 1} that is no sequence's first token, got {begin}"
            )
        states, judges = self._prefill(input_ids[:, : begin - 1], mask[:, : begin - 1])
        rows = torch.arange(n, device=input_ids.device)
        work, updated = Work([0] * len(self.layers)), 0
        said, chances, ran = [], [], []
        for at in range(begin, given):
            last, depths = self._step(input_ids[:, at - 1], rows, states, judges, policy)
            updated += self._count(work, depths, policy)
            logits = self._said(last, at - begin)
            said.append(logits.argmax(-1))
            chances.append(logits.log_softmax(-1).gather(1, input_ids[:, at : at + 1])[:, 0])
            ran.append(depths)
        return SsmScored(torch.stack(said, 1), torch.stack(chances, 1), torch.stack(ran, 1), work, updated)

    def _count(self, work: Work, depths: Tensor, policy: str) -> int:
        """Add one step's rows x layers; returns those whose state alone is moved on."""
        work.rows += len(depths)
        for layer in range(len(self.layers)):
            work.layers[layer] += int((depths > layer).sum())
        return int((len(self.layers) - depths).sum()) if policy == "update" else 0

    def _said(self, hidden: Tensor, new: int) -> Tensor:
        logits = self.logits(hidden)
        if bool(torch.isnan(logits).any()):
            raise ArgumentError(f"MambaDecoder: logits of new token {new + 1} hold NaN")
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 [m, vocabulary] of residuals [m, d] at any boundary: the final norm and the LM head, shared by all exits."""
        return self.model.lm_head(self.model.backbone.norm_f(hidden).to(self.model.lm_head.weight.dtype)).float()

    def _prefill(self, prompts: Tensor, mask: Tensor) -> tuple[list[State], list[State | None]]:
        """States of all layers and classifiers after all but the last prompt token, every layer run."""
        n = len(prompts)
        states = [State.zeros(layer.mixer, n) for layer in self.layers]
        judges = [point.classifier.state(n) for point in self.exits]
        remember = any(point.classifier.remembers for point in self.exits)
        lengths = mask.sum(1)
        # Prompts of one length at a time: padding would reach the states of models whose input projection has a bias.
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()[:, 0]
            if length == 0:
                continue
            out = self.model.backbone(prompts[rows, -length:], use_cache=True, output_hidden_states=remember)
            for state, layer in zip(states, out.cache_params.layers, strict=True):
                state.take(layer, rows)
            if remember:
                for point, judge in zip(self.exits, judges, strict=True):
                    point.classifier.fill(out.hidden_states[point.leave - 1], judge, rows)
        return states, judges

    def _step(
        self, tokens: Tensor, seq: Tensor, states: list[State], judges: list[State | None], policy: str
    ) -> tuple[Tensor, Tensor]:
        """One token of each running sequence: (residuals they leave with [m, d], layers run int32 [m] on the CPU)."""
        hidden = self.model.backbone.embeddings(tokens)
        if self.layers[0].residual_in_fp32:
            hidden = hidden.float()
        depths = torch.full((len(tokens),), len(self.layers), dtype=torch.int32)
        x, rows = hidden, torch.arange(len(tokens), device=tokens.device)
        gone = rows[:0]
        for number, layer in enumerate(self.layers):
            if number in self._at:
                place, point = self._at[number]
                if policy == "update" and len(gone):
                    point.classifier.update(hidden[gone], judges[place], seq[gone])
                leaves = self._leave(point, x, judges[place], seq[rows])
                if bool(leaves.any()):
                    depths[rows[leaves].cpu()] = number
                    hidden = hidden.index_copy(0, rows, x)
                    (x, rows), _, counts = compact_rows(leaves.to(torch.int8), [x.contiguous(), rows])
                    live = int(counts[0])
                    gone = torch.cat([gone, rows[live:]])
                    x, rows = x[:live], rows[:live]
            if policy == "update" and len(gone):
                mixing.update(layer.mixer, _normed(layer, hidden[gone]), states[number], seq[gone])
            if len(rows):
                out = layer.mixer.out_proj(mixing.step(layer.mixer, _normed(layer, x), states[number], seq[rows]))
                x = x + out
        return hidden.index_copy(0, rows, x), depths

    @staticmethod
    def _leave(point: SsmExit, x: Tensor, state: State | None, seq: Tensor) -> Tensor:
        """bool [m]: which of the rows x [m, d] leave; NaN never does."""
        if len(x) == 0:
            return torch.zeros(0, dtype=torch.bool, device=x.device)
        return torch.sigmoid(point.classifier.step(x, state, seq)) >= point.threshold

    def _checked(self, ids: Tensor, mask: Tensor | None, new: int, policy: str, penalty: float) -> Tensor:
        if ids.dim() != 2 or 0 in ids.shape or ids.dtype != torch.int64:
            raise ArgumentError(f"MambaDecoder: input_ids must be int64 [n, t], not empty, got {ids.dtype} {list(ids.shape)}")
        if new < 1:
            raise ArgumentError(f"MambaDecoder: max_new_tokens must be at least 1, got {new}")
        if policy not in POLICIES:
            raise ArgumentError(f"MambaDecoder: policy must be one of {', '.join(POLICIES)}, got {policy!r}")
        if not penalty >= 1:
            raise ArgumentError(f"MambaDecoder: repetition_penalty must be at least 1, got {penalty}")
        mask = torch.ones_like(ids) if mask is None else mask.long()
        if mask.shape != ids.shape or not bool(mask[:, -1].all()) or bool((mask.diff(dim=1) < 0).any()):
            raise ArgumentError("MambaDecoder: attention_mask must be [n, t] like input_ids and padded on the left")
        return mask


def _normed(layer: Any, x: Tensor) -> Tensor:
    return layer.norm(x.to(layer.norm.weight.dtype))


def penalised(logits: Tensor, tokens: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [m, vocabulary] with those of `tokens` int64 [m, t] (where `seen`) divided, or multiplied if negative."""
    have = torch.zeros_like(logits, dtype=torch.bool)
    have = have.scatter_reduce(1, tokens, seen, "amax") if tokens.shape[1] else have
    return torch.where(have, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
