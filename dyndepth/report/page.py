"""The report as one HTML page: nothing is loaded from anywhere, and nothing runs."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from dyndepth.calibration import describe
from dyndepth.report.measure import GIVEN

#: Longer lists of a record are counted, not listed.
_LISTED = 6
#: A browser refuses what a page like this never needs.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1c1c1c; --soft: #555b62; --line: #d5d8dc; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e6e6e6; --soft: #a9b0b8; --line: #3a3f45; --band: #1f2327; }
}
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
img { display: block; width: 100%; height: auto; }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; margin: 0.75rem 0; }
caption { text-align: left; color: var(--soft); padding-bottom: 0.25rem; }
th, td { padding: 0.2rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; font-variant-numeric: tabular-nums; }
th { font-weight: 600; }
tbody th, th:first-child { text-align: left; font-weight: 400; }
tr.marked { background: var(--band); font-weight: 600; }
table.facts td { text-align: left; overflow-wrap: anywhere; }
.notes { background: var(--band); border-left: 4px solid var(--line); padding: 0.5rem 1rem 0.5rem 2rem; }
.soft { color: var(--soft); }
"""


def render(report: dict[str, Any], light: dict[str, bytes], dark: dict[str, bytes]) -> str:
    """The page; `light` and `dark` are PNGs of the sections for either colour scheme."""
    title = f"Depth report: {report['model']['name']}"
    pictures = {name: _picture(light[name], dark[name], _ALT[name]) for name in light}
    counts = {name: value for name, value in report["prompts"].items() if name != "first"}
    first = report["prompts"]["first"]
    parts = [
        f"<h1>{_safe(title)}</h1>",
        f"<p>{_safe(_lead(report))}</p>",
        _notes(report["notes"]),
        "<h2>Risk, work and speed</h2>",
        pictures["frontier"],
        _frontier(report),
        "<h2>How true the scores are</h2>",
        pictures["reliability"],
        *_reliability(report["reliability"]),
        "<h2>Which tokens leave</h2>",
        pictures["histogram"],
        _histogram(report["histogram"]),
        "<h2>Certificate</h2>",
        f"<p>{_safe(_certificate(report['exits']['certificate']))}</p>",
        "<h2>The exits</h2>",
        _bands(report["exits"]["bands"]),
        _facts("How they were made", _flat(report["exits"]["record"])),
        "<h2>This measurement</h2>",
        _facts("Settings", {**_flat(report["settings"]), **_flat(counts, "prompts.")}),
        _facts("First prompts", {str(number): text for number, text in enumerate(first, 1)}),
        _facts("Versions and machine", _flat(_machine(report["machine"]))),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_safe(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


_ALT = {
    "frontier": "Disagreement with full depth against rows × layers and against tokens per second; numbers in the table below.",
    "reliability": "Per band, share of rows that agree with full depth against their score; numbers in the tables below.",
    "histogram": "Shares of tokens by layers run, per kind of token; numbers in the table below.",
}


def _lead(report: dict[str, Any]) -> str:
    frontier, model = report["frontier"], report["model"]
    text = (
        f"{report['prompts']['count']} prompts, up to {report['settings']['new_tokens']} new tokens each; {model['type']} of "
        f"{model['layers']} layers in {model['dtype']}. "
    )
    given = next((point for point in frontier["points"] if point["name"] == GIVEN), None)
    if given is None:
        return text + "No row leaves with these exits as they come."
    ratio = given["tokens_per_s"]["median"] / frontier["full_depth"]["median"]
    return text + (
        f"As they come, the exits run {given['rows_x_layers']:.1%} of rows × layers, {given['disagreement']:.2%} of tokens "
        f"differ from full depth's (rounding alone: {frontier['rounding_floor']:.2%}), and {ratio:.2f} times full depth's "
        "tokens per second come out."
    )


def _frontier(report: dict[str, Any]) -> str:
    frontier = report["frontier"]
    rows = [
        ("full depth, no exits", "", _share(0.0, 2), "", _share(1.0), _number(frontier["full_depth"]["median"]),
         _range(frontier["full_depth"]))
    ]  # fmt: skip
    marked = None
    for point in frontier["points"]:
        if point["name"] == GIVEN:
            marked = len(rows)
        thresholds = ", ".join(f"{float(value):.3f}" for value in point["thresholds"])
        rows.append(
            (point["name"], thresholds, _share(point["disagreement"], 2), _share(point["standard_error"], 2),
             _share(point["rows_x_layers"]), _number(point["tokens_per_s"]["median"]), _range(point["tokens_per_s"]))
        )  # fmt: skip
    heads = ("point", "thresholds", "differ", "std. error", "rows × layers", "tokens/s", "p10–p90")
    text = (
        "Differ: share of tokens unlike full depth's, given full depth's text so far, as a mean over prompts with its standard "
        "error. Rows × layers: the share of full depth's work that was run. Tokens per second: "
        f"{frontier['timed_prompts']} prompts decoded as one batch for a fixed number of new tokens, prompt included, all "
        "points in turn. The points lie on the path from strict to free that calibrate tests. Rounding alone: tokens on "
        f"which decoding and scoring at full depth differ ({_share(frontier['rounding_floor'], 2)})."
    )
    note = "" if frontier["note"] is None else f"<p>{_safe(frontier['note'])}</p>"
    return note + _table("The frontier", heads, rows, marked) + f'<p class="soft">{_safe(text)}</p>'


def _reliability(bands: list[dict[str, Any]]) -> Iterable[str]:
    heads = ("band", "criterion", "threshold", "rows", "agree", "reach it", "agree then", "ECE", "Brier", "without score")
    yield _table(
        "Per band",
        heads,
        [
            (_span(band), band["criterion"], _number(band["threshold"], 3), str(band["rows"]), _share(band["agreement"]),
             _share(band["reaching"]), _share(band["agreement_reaching"]), _number(band["calibration_error"], 3),
             _number(band["brier"], 3), str(band["silent"]))
            for band in bands
        ],
    )  # fmt: skip
    text = (
        "Agree: rows that, taking this band and no other, say what the full model says. Reach it: rows whose score reaches the "
        "threshold. ECE (expected calibration error) and Brier score only where the score is a probability; lower is better; "
        "in the figure thresholds are dotted, and a calibrated probability lies on the dashed line."
    )
    yield f'<p class="soft">{_safe(text)}</p>'
    for band in bands:
        yield f"<p>{_safe(_span(band))}: {_safe(band['note'])}</p>"
        if band["bins"]:
            rows = [(_number(b["score"], 3), _share(b["agreement"]), str(b["rows"])) for b in band["bins"]]
            bins = _table(f"Bins of {_span(band)}, equal in rows", ("mean score", "agree", "rows"), rows)
            yield f"<details><summary>Bins of {_safe(_span(band))}</summary>{bins}</details>"


def _histogram(histogram: dict[str, Any]) -> str:
    heads = ("kind", "rows", *(f"{layers} layers" for layers in histogram["layers"]))
    rows = []
    everything = [sum(column) for column in zip(*histogram["rows"].values(), strict=True)]
    for name, counted in (("all tokens", everything), *histogram["rows"].items()):
        total = sum(counted)
        rows.append((name, str(total), *(_share(count / total) if total else "" for count in counted)))
    text = (
        "Rows that produce tokens, by the kind of the token they emit with the thresholds as they come. A word starts with its "
        "leading space; what comes first in a line has none and counts as a continuation."
    )
    return _table("Share of rows by layers run", heads, rows) + f'<p class="soft">{_safe(text)}</p>'


def _certificate(certificate: dict[str, Any] | None) -> str:
    if certificate is None:
        return "None: nothing is promised of these thresholds (dyndepth calibrate certifies some)."
    text = describe(certificate)
    return text[0].upper() + text[1:] + "."


def _bands(bands: list[dict[str, Any]]) -> str:
    heads = ("band", "criterion", "threshold", "head or jump", "K,V maps", "shortlist")
    rows = [
        (_span(band), band["criterion"]["kind"], _number(band["threshold"], 4),
         "jump" if band["jump"] else (band["head"] or {}).get("kind", "norm or identity"), "yes" if band["kv"] else "no",
         str(band["shortlist"] or ""))
        for band in bands
    ]  # fmt: skip
    return _table("Bands", heads, rows)


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name != "ops"}


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts as dotted names and short texts."""
    found: dict[str, str] = {}
    for name, part in value.items():
        if isinstance(part, dict):
            found.update(_flat(part, f"{prefix}{name}."))
        elif isinstance(part, list):
            plain = len(part) <= _LISTED and not any(isinstance(each, dict | list) for each in part)
            found[prefix + name] = ", ".join(map(str, part)) if plain else f"{len(part)} entries"
        elif part is not None:
            found[prefix + name] = f"{part:.4g}" if isinstance(part, float) else str(part)
    return found


def _facts(caption: str, facts: dict[str, str]) -> str:
    if not facts:
        return ""
    rows = "".join(f'<tr><th scope="row">{_safe(name)}</th><td>{_safe(value)}</td></tr>' for name, value in facts.items())
    return f'<div class="scroll"><table class="facts"><caption>{_safe(caption)}</caption><tbody>{rows}</tbody></table></div>'


def _table(caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], marked: int | None = None) -> str:
    """The first cell of every row names it."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{_safe(name)}</th>' for name in heads)
    body = ""
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{_safe(cell)}</td>" for cell in row[1:])
        kind = ' class="marked"' if number == marked else ""
        body += f'<tr{kind}><th scope="row">{_safe(row[0])}</th>{cells}</tr>\n'
    return (
        f'<div class="scroll"><table><caption>{_safe(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def _notes(notes: list[str]) -> str:
    items = "".join(f"<li>{_safe(note)}</li>" for note in notes)
    return f'<ul class="notes">{items}</ul>' if notes else ""


def _picture(light: bytes, dark: bytes, alternative: str) -> str:
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{_uri(dark)}">'
        f'<img src="{_uri(light)}" alt="{_safe(alternative)}"></picture></figure>'
    )


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _safe(text: Any) -> str:
    return html.escape(str(text))


def _span(band: dict[str, Any]) -> str:
    return f"[{band['leave']}, {band['resume']})"


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _number(value: float | str | None, digits: int = 1) -> str:
    return "" if value is None else f"{float(value):.{digits}f}"


def _range(rates: dict[str, float]) -> str:
    return f"{rates['p10']:.1f}–{rates['p90']:.1f}"
