"""A report's figures, drawn from its numbers alone: light ones for the PNG, both kinds for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dyndepth.report.kinds import KINDS
from dyndepth.report.measure import CLOSED, GIVEN

_DPI = 130
_WIDTH = 11.0
#: Panels of the reliability section side by side.
_COLUMNS = 4
#: From few layers (bright) to many (dark).
_MAP = "viridis"


@dataclass(frozen=True)
class Theme:
    """Colours."""

    paper: str
    ink: str
    faint: str
    line: str
    marked: str


LIGHT = Theme("#ffffff", "#1c1c1c", "#a8a8a8", "#2b6ca3", "#c2410c")
DARK = Theme("#16181b", "#e6e6e6", "#6a6f76", "#7ab8ea", "#fb923c")


def draw(report: dict[str, Any], theme: Theme = LIGHT) -> Any:
    """All panels as one matplotlib Figure."""
    heights = [height(report) for _, height in _SECTIONS.values()]
    with _drawing(theme, (_WIDTH, sum(heights) + 0.6)) as figure:
        exits = report["exits"]
        name = f"{report['model']['name']}, exits {', '.join(_span(band) for band in exits['bands']) or 'none'}"
        figure.suptitle(name, parse_math=False)  # a name may hold a dollar sign
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, (fill, _) in zip(parts, _SECTIONS.values(), strict=True):
            fill(part, report, theme)
    return figure


def sections(report: dict[str, Any], theme: Theme) -> dict[str, bytes]:
    """PNG of each section: frontier, reliability, histogram."""
    found = {}
    for name, (fill, height) in _SECTIONS.items():
        with _drawing(theme, (_WIDTH, height(report))) as figure:
            fill(figure, report, theme)
        found[name] = png(figure)
    return found


def png(figure: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=_DPI)
    return content.getvalue()


@contextmanager
def _drawing(theme: Theme, size: tuple[float, float]) -> Iterator[Any]:
    """A figure of its own: no pyplot, so that nobody's backend, style or current figure changes."""
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.labelcolor", "axes.titlecolor", "axes.edgecolor", "xtick.color", "ytick.color")
    paper = ("figure.facecolor", "axes.facecolor", "legend.facecolor")
    settings: dict[str, Any] = {
        **dict.fromkeys(ink, theme.ink), **dict.fromkeys(paper, theme.paper), "font.size": 9, "axes.titlesize": 10,
        "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "legend.fontsize": 8,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        figure.draw_without_rendering()  # ticks are made when they are drawn, and would miss these settings


def _frontier(figure: Any, report: dict[str, Any], theme: Theme) -> None:
    """Disagreement against work, and against speed."""
    frontier = report["frontier"]
    points, full = frontier["points"], frontier["full_depth"]
    y = [100 * point["disagreement"] for point in points]
    spread = [100 * (point["standard_error"] or 0.0) for point in points]
    work, speed = figure.subplots(1, 2, sharey=True)
    style = {"color": theme.line, "marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8, "capsize": 2}
    work.errorbar([100 * point["rows_x_layers"] for point in points], y, yerr=spread, label="path of thresholds", **style)
    rates = [point["tokens_per_s"] for point in points]
    median = [rate["median"] for rate in rates]
    sides = [[r["median"] - r["p10"] for r in rates], [r["p90"] - r["median"] for r in rates]]
    speed.errorbar(median, y, xerr=sides, yerr=spread, **style)
    speed.axvspan(full["p10"], full["p90"], color=theme.faint, alpha=0.25, linewidth=0)
    speed.axvline(full["median"], color=theme.ink, linewidth=1, linestyle="--", label="full depth, without exits")
    for name, marker, colour in ((CLOSED, "s", theme.ink), (GIVEN, "*", theme.marked)):
        for point, rate, height in zip(points, median, y, strict=True):
            if point["name"] == name:
                look = {"marker": marker, "color": colour, "markersize": 12 if marker == "*" else 6}
                look |= {"linestyle": "none", "clip_on": False}
                work.plot(100 * point["rows_x_layers"], height, label=name, zorder=3, **look)
                speed.plot(rate, height, zorder=3, **look)
    floor = 100 * frontier["rounding_floor"]
    certificate = report["exits"]["certificate"]
    for axis in (work, speed):
        axis.axhline(floor, color=theme.faint, linewidth=1, linestyle=":", label="rounding alone" if axis is work else None)
        if certificate and certificate["certified"] and certificate["loss"] == "disagreement":
            label = f"certified bound, {certificate['confidence']:.0%}" if axis is work else None
            axis.axhline(100 * certificate["risk"], color=theme.marked, linewidth=1, linestyle="-.", label=label)
        axis.grid(color=theme.faint, alpha=0.25, linewidth=0.6)
        axis.set_ylim(bottom=0)
    low = min(100 * point["rows_x_layers"] for point in points)
    work.set_xlim(low - max(0.5, 0.08 * (100 - low)), 100 + max(0.2, 0.05 * (100 - low)))
    work.set(title="risk and work", xlabel="rows × layers run (%)", ylabel="tokens unlike full depth's (%)")
    speed.set(title="risk and speed, median and p10-p90", xlabel="new tokens per second, prompt included")
    figure.legend(loc="outside lower center", ncols=6)  # beside the panels: bounds and floors cross them anywhere


def _reliability(figure: Any, report: dict[str, Any], theme: Theme) -> None:
    """Per band, agreement against score; the threshold is dotted, and a calibrated score would lie on the dashed line."""
    drawn = [band for band in report["reliability"] if band["bins"]]
    if not drawn:
        _say(figure, "reliability of scores", "no band has scores to show")
        return
    columns = min(_COLUMNS, max(2, len(drawn)))
    axes = figure.subplots(-(-len(drawn) // columns), columns, squeeze=False).flatten()
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for axis, band in zip(axes, drawn, strict=False):
        x = [each["score"] for each in band["bins"]]
        axis.plot(x, [100 * each["agreement"] for each in band["bins"]], color=theme.line, marker="o", markersize=4)
        threshold = float(band["threshold"])
        title = f"{_span(band)} by {band['criterion'].replace('_', ' ')}\nthreshold {threshold:.3f}"
        if band["calibration_error"] is not None:
            axis.plot([0, 1], [0, 100], color=theme.faint, linewidth=1, linestyle="--")
            axis.set_xlim(0, 1.02)
            title += f", ECE {band['calibration_error']:.3f}"
        left, right = axis.get_xlim()
        if left <= threshold <= right:
            axis.axvline(threshold, color=theme.marked, linewidth=1, linestyle=":")
        axis.set(title=title, xlabel="score", ylabel="rows that agree (%)", ylim=(0, 103))
        axis.grid(color=theme.faint, alpha=0.25, linewidth=0.6)


def _histogram(figure: Any, report: dict[str, Any], theme: Theme) -> None:
    """Stacked bars: per kind of token, shares by layers run."""
    import matplotlib

    layers, rows = report["histogram"]["layers"], report["histogram"]["rows"]
    everything = [sum(column) for column in zip(*rows.values(), strict=True)]
    bars = [("all tokens", everything), *((name, rows[name]) for name in KINDS if sum(rows[name]))]
    axis = figure.subplots()
    colours = matplotlib.colormaps[_MAP]
    depth = report["model"]["layers"]
    left = [0.0] * len(bars)
    for place, count in enumerate(layers):
        # Full depth is the ordinary case, and grey.
        colour = theme.faint if count == depth else colours(0.15 + 0.75 * (1 - place / max(1, len(layers) - 1)))
        widths = [100 * counted[place] / sum(counted) for _, counted in bars]
        axis.barh(range(len(bars)), widths, 0.72, left=left, color=colour, label=str(count), edgecolor=theme.paper)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(range(len(bars)), [f"{name} ({sum(counted)})" for name, counted in bars])
    axis.invert_yaxis()
    axis.set(title="layers run, by kind of token (rows in brackets)", xlabel="share of rows (%)", xlim=(0, 100))
    figure.legend(loc="outside right upper", title="layers run", ncols=1 + len(layers) // 16)


def _say(figure: Any, title: str, text: str) -> None:
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_title(title)
    axis.text(0, 0.9, text, transform=axis.transAxes, va="top")


def _span(band: dict[str, Any]) -> str:
    return f"[{band['leave']}, {band['resume']})"


def _rows_of_panels(report: dict[str, Any]) -> int:
    return -(-sum(bool(band["bins"]) for band in report["reliability"]) // _COLUMNS)


def _bars(report: dict[str, Any]) -> int:
    return 1 + sum(any(rows) for rows in report["histogram"]["rows"].values())


#: Per section, what fills a figure and how many inches high it is.
_SECTIONS: dict[str, tuple[Callable[[Any, dict[str, Any], Theme], None], Callable[[dict[str, Any]], float]]] = {
    "frontier": (_frontier, lambda report: 4.2),
    "reliability": (_reliability, lambda report: 3.2 * _rows_of_panels(report) or 0.8),
    "histogram": (_histogram, lambda report: 1.2 + 0.34 * _bars(report)),
}
