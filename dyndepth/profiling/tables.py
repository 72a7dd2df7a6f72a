"""A profile as rich tables and lines."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Column, Table


def render(facts: dict[str, Any]) -> Iterator[Table | str]:
    """What to print, in order; `facts` as `profile` gives them."""
    step, setting, work = facts["step"], facts["setting"], facts["work"]
    yield (
        f"batch {setting['batch']}, prompts of {max(setting['prompt_tokens'])} tokens, {setting['new_tokens']} new ones each, "
        f"{setting['dtype']}, {setting['threads']} threads; layers: {setting['layers']}"
    )
    yield (
        f"a decode step takes {_ms(step['median_s'])} ms, {step['tokens_per_s']:.1f} tokens/s; with timers "
        f"{_ms(step['with_timers_median_s'])} ms ({step['cost_of_timers']:+.1%}); {step['steps']} steps, "
        f"{step['preempted_steps']} preempted ones dropped"
    )
    yield _parts(facts)
    yield _spans(facts)
    yield f"{work['rows_x_layers']} of {work['of']} rows x layers ({work['share']:.1%}), K,V policy {setting['kv']}"
    weights = facts["weights"]
    yield (
        f"weights read per step: {weights['bytes_per_step'] / 1e6:.1f} MB, {_rate(weights['bytes_per_s'])} GB/s "
        f"({weights['share_of_roof']:.0%} of the read roof of {_rate(weights['read_roof_bytes_per_s'])} GB/s); "
        f"in layers {_rate(weights['in_layers_bytes_per_s'])}, in the LM head {_rate(weights['in_head_bytes_per_s'])}"
    )
    alone = facts["alone"]
    yield (
        f"measured apart, all rows: all layers in one span {_ms(alone['span_s'])} ms, one by one "
        f"{_ms(alone['layer_by_layer_s'])} ms"
    )
    yield _layers(facts)
    yield _ops(facts)
    if facts["untimed"]:
        yield f"not in this runtime, so untimed: {', '.join(facts['untimed'])}"


def _parts(facts: dict[str, Any]) -> Table:
    table = Table("part", *_right("median ms", "mean ms", "share"), title="a decode step by part (timed from outside)")
    for part in facts["parts"]:
        table.add_row(part["part"], _ms(part["median_s"]), _ms(part["mean_s"]), f"{part['share']:.1%}")
    return table


def _spans(facts: dict[str, Any]) -> Table:
    names = _right("runs per step", "rows", "median ms", "ms per layer")
    table = Table("layers", *names, title="spans of layers as they ran")
    for span in facts["spans"]:
        place = f"[{span['begin']}, {span['end']})"
        cells = [f"{span['runs_per_step']:.2f}", f"{span['rows']:.1f}", _ms(span["median_s"]), _ms(span["per_layer_s"])]
        table.add_row(place, *cells)
    return table


def _layers(facts: dict[str, Any]) -> Table:
    table = Table("layer", *_right("ms, all rows", "rows run while decoding"), title="layer by layer, measured apart")
    for layer, seconds in enumerate(facts["alone"]["layers_s"]):
        table.add_row(str(layer), _ms(seconds), str(facts["work"]["by_layer"][layer]))
    return table


def _ops(facts: dict[str, Any]) -> Table:
    """Shares are of the three lines of layers: calls one by one pay Python and dispatch that a span does not."""
    names = _right("calls", "rows", "ms per step", "of the layers' ops")
    table = Table("op", "where", *names, title="single ops at the same shapes, measured apart")
    ops = facts["alone"]["ops"]
    together = sum(op["seconds"] for op in ops if op["where"] == "layers")
    for op in ops:
        share = f"{op['seconds'] / together:.1%}" if op["where"] == "layers" else ""
        table.add_row(op["name"], op["where"], str(op["calls"]), str(op["rows"]), _ms(op["seconds"]), share)
    return table


def _right(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.1f}"
