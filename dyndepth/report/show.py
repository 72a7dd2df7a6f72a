"""What a report prints: the frontier as a table of eighty columns."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table


def table(report: dict[str, Any]) -> Table:
    """The frontier's points, full depth first."""
    frontier = report["frontier"]
    title = (
        f"{report['prompts']['count']} prompts x up to {report['settings']['new_tokens']} new tokens; rounding alone makes "
        f"{frontier['rounding_floor']:.2%} of tokens differ"
    )
    result = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("thresholds", "differ", "std. error", "work", "tokens/s", "p10-p90"):
        result.add_column(heading, justify="left" if heading == "thresholds" else "right", no_wrap=True)
    result.add_row("none: full depth", "0.00%", "-", "100.0%", *_speed(frontier["full_depth"]), end_section=True)
    for point in frontier["points"]:
        error = point["standard_error"]
        result.add_row(
            point["name"],
            f"{point['disagreement']:.2%}",
            "-" if error is None else f"{error:.2%}",
            f"{point['rows_x_layers']:.1%}",
            *_speed(point["tokens_per_s"]),
        )
    return result


def _speed(rates: dict[str, float]) -> tuple[str, str]:
    return f"{rates['median']:.1f}", f"{rates['p10']:.0f}-{rates['p90']:.0f}"
