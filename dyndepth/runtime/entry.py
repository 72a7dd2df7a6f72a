"""`dyndepth.generate`: the callable that transformers' `custom_generate` takes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dyndepth.errors import ArgumentError
from dyndepth.exits import Exits
from dyndepth.runtime.confidence import Confidence
from dyndepth.runtime.generate import decode
from dyndepth.runtime.observe import Observer
from dyndepth.runtime.session import DEFAULT_CHUNK, DEFAULT_PAGE_SIZE, DEFAULT_PENDING
from dyndepth.runtime.speculate import DEFAULT_DRAFTS


class Generate:
    """`model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits)`: generation with dynamic depth.

    Everything of transformers' generate that is not beam search works: left padding, EOS, stop strings, logits processors,
    stopping criteria, sampling, streamers, `output_scores`, `output_logits`, `inputs_embeds`. Extra arguments:

    Args:
        exits: dyndepth.Exits made for this model; None runs at full depth.
        kv: how rows that leave get K,V in the layers they skip: `predict` (fitted maps), `propagate` (CALM), `copy` (the last
            computed layer's: DYNAMAX, DREX), `recompute` (exact: they run the other layers when a later token of their
            sequence goes deeper: EE-LLM, FREE), `release` (they run them at once, only their token is out early: Apparate)
            or `none`. None takes `predict` where the exits have maps, else `propagate`.
        depth: exit point for all requests (int) or per request; None entries let the criteria decide.
        prompt: `full` runs prompts at full depth (all but their last token, which produces the first new token);
            `dynamic` lets prompt tokens leave too.
        page_size, pages: geometry of the paged K,V; by default as many pages as the call can need.
        prefill_chunk: prompt rows per pass.
        pending: with `kv="recompute"`, tokens of a sequence that may wait before its next one runs every layer with them.
        mode: `dynamic`: tokens of rows that leave are final. `lossless`: they are drafts, which the full model verifies:
            greedy tokens are the full model's own, sampled ones have its distribution (self-speculation: LayerSkip, Kangaroo;
            with bands that resume below the top, drafts skip those layers: Draft & Verify).
            `rollback`: drafts stand unless the full model is too surprised by one (FREE); greedy only.
        drafts: with `mode="lossless"` or `"rollback"`, drafts per sequence before they are verified.
        confidence: with these, a sequence drafts no more after a draft that is less likely than this;
            dyndepth.runtime.confidence.Confidence moves the threshold.
        rollback: with `mode="rollback"`, nats: the first draft to which the full model gives a probability below
            exp(-rollback) is replaced by its own token, and what follows it is dropped.
        observe: called with dyndepth.runtime.observe.Observed for every pass that finds out what the full model says of tokens
            that exits judged (`kv="recompute"`, `"release"`, or verification): for thresholds that adapt. It costs an
            exit head per judged row.
        graphs: replay decode passes as CUDA graphs (docs/gpu.md), which no hardware has shown yet, so False by default.
            `"auto"`: on CUDA devices, where K,V policy and modules are known to allow it; True: or raise with the reason.
        generator: torch.Generator for sampling.

    Returns transformers' output; with `return_dict_in_generate=True` a `DynamicDepthOutput`, which adds `exit_layers`,
    `layers_run` and `work` (rows x layers really run).
    """

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        exits: Exits | None = None,
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
        tokenizer: Any = None,
        token_streamer: Any = None,
        streamer: Any = None,
        synced_gpus: bool = False,
        assistant_model: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if generation_config is None or logits_processor is None or stopping_criteria is None:
            raise TypeError(
                "transformers calls dyndepth.generate: model.generate(..., custom_generate=dyndepth.generate, exits=exits)"
            )
        if assistant_model is not None:
            raise ArgumentError("generate: assistant_model is not supported together with dynamic depth")
        return decode(
            model, input_ids, logits_processor, stopping_criteria, generation_config,
            exits=exits, kv=kv, depth=depth, prompt=prompt, page_size=page_size, pages=pages, prefill_chunk=prefill_chunk,
            pending=pending, mode=mode, drafts=drafts, rollback=rollback, confidence=confidence, observe=observe, graphs=graphs,
            generator=generator, streamer=streamer if token_streamer is None else token_streamer, **model_kwargs,
        )  # fmt: skip

    @property
    def __signature__(self) -> inspect.Signature:
        _hand_over_dropped_arguments()
        return inspect.signature(self.__call__)


def _hand_over_dropped_arguments() -> None:
    """Keep `streamer` and `tokenizer` from being lost between transformers' generate and a `custom_generate` callable.

    transformers (seen in 5.17 to 5.23) collects both into a dictionary and, when `custom_generate` is a callable,
    replaces that dictionary by the arguments named in the callable's signature: a TextIteratorStreamer would wait for
    ever, and `stop_strings` would fail for want of a tokenizer. The signature is asked for in that very function, while
    `kwargs` can still take them. Where transformers works differently nothing happens here.
    """
    frame = sys._getframe(1)
    for _ in range(12):
        if frame is None or frame.f_code.co_name == "_extract_generation_mode_kwargs":
            break
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None or frame.f_code.co_name != "_extract_generation_mode_kwargs":
        return
    names = frame.f_locals
    kwargs, collected = names.get("kwargs"), names.get("generation_mode_kwargs")
    if not isinstance(kwargs, dict) or not isinstance(collected, dict):
        return
    if names.get("streamer") is not None:
        kwargs.setdefault("token_streamer", names["streamer"])
    if names.get("assistant_model") is not None:
        kwargs.setdefault("assistant_model", names["assistant_model"])
    if collected.get("tokenizer") is not None:
        kwargs.setdefault("tokenizer", collected["tokenizer"])


generate = Generate()
