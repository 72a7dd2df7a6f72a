"""Renderers of tables of docs/training.md, part of tables.py: rows shown, jumps, the frontier of bands, K,V weighting."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from table_parts import header, load


def head_tokens(results: Path) -> str:
    """What `make head-tokens` found: agreement and KL of translators by the rows they were shown."""
    found = load(results / "head_tokens.json")
    exits = list(found["runs"][-1]["agreement"])
    columns = [f"exit {leave}: {name}" for leave in exits for name in ("agreement", "KL")]
    lines = header("rows shown", *columns)
    for run in found["runs"]:
        cells = []
        for leave in exits:
            kl = run.get("kl", {}).get(leave)
            cells += [f"{run['agreement'][leave]:.1%}", "–" if kl is None else f"{kl:.3f}"]
        lines.append(f"| {run['rows']} | {' | '.join(cells)} |")
    text = (
        f"Translators from ridge starts, a run of its own (warm-up and cosine) for every count, on a corpus of "
        f"{found['judged_rows_of_the_corpus']} rows; measured on {found['measured_on']} rows of unseen answers. "
        f"{floor(results)}"
    )
    return "\n".join([*lines, "", text, ""])


def floor(results: Path) -> str:
    """How often rounding alone leaves the arg max alone: the most that any agreement can mean."""
    found = load(results / "head_tokens.json")["rounding_floor"]
    return (
        f"The noise floor: the bfloat16 model's own arg max is that of the same weights in float32 on "
        f"{found['agreement']:.1%} of {found['rows']} rows."
    )


def jump_maps(results: Path) -> str:
    """What `make jump-maps` found: kinds of jump after equally many rows."""
    found = load(results / "jump_maps.json")
    lines = header(
        "band", "jump", "weights", "rows shown", "KL, of all rows", "those that skip agree", "disagreements per skip"
    )
    starts = {tuple(row["span"]): row["kl_at_start"] for row in found["rows"] if row["jump"] == "linear"}
    for row in found["rows"]:
        leave, resume = row["span"]
        kl = row.get("kl", starts.get((leave, resume)))
        lines.append(
            f"| [{leave}, {resume}) | {row['jump']} | {row['jump_weights'] / 1e6:.2f} M | {row.get('rows_shown', 0)} "
            f"| {'–' if kl is None else f'{kl:.3f}'} | {row['agreement']:.1%} | {row['harm']:.3f} |"
        )
    text = (
        f"{found['share']:.0%} of the rows skip by lot; KL on {_looked(found)} rows of the validation split, the rest in real "
        f"passes over {found['rows'][0]['judged']} rows of unseen answers, where *disagreements per skip* are those of rows "
        "that stayed and see predicted K,V. K,V maps are trained along."
    )
    return "\n".join([*lines, "", text, ""])


def _looked(found: dict[str, Any]) -> int:
    return next(row["looked_at"] for row in found["rows"] if "looked_at" in row)


def band_frontier(results: Path) -> str:
    """What `make band-frontier` found: agreement and layers at prices set elsewhere, then what routers know of each band."""
    found = load(results / "band_frontier.json")
    lines = header(
        "what rows may take", "confidence", "wanted agreement", "reached", "mean layers run", "taken by", "read at the wish"
    )
    families = ("exits", "bands", "bands and exits")
    for row in sorted(found["frontier"], key=lambda row: families.index(row["family"])):
        for share, point in row["at"].items():
            taken = [
                f"[{leave}, {resume}) {part:.1%}"
                for (leave, resume), part in zip(point["spans"], point["taken"], strict=True)
                if part >= 0.0005
            ]
            read = row["between"][share]
            cells = [
                row["family"], row["confidence"], share, within(point, "agreement", lambda value: f"{value:.1%}"),
                within(point, "mean_layers", lambda value: f"{value:.2f}"), ", ".join(taken) or "nobody",
                "–" if read is None else f"{read:.2f}",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *header("band", "by lot: agree", "disagreements per skip", "router: AUC", "blind to what was skipped",
                           "with a readout too")]  # fmt: skip
    for band in found["bands"]:
        leave, resume = band["span"]
        auc = [band["router"].get(f"{name}: auc") for name in ("router", "router, blind to what was skipped", "with a readout")]
        shown = ["–" if value is None else f"{value:.3f}" for value in auc]
        lines.append(f"| [{leave}, {resume}) | {band['agreement']:.1%} | {band['harm']:.3f} | {' | '.join(shown)} |")
    rows, documents = found["rows"], found["documents"]
    trained = ", ".join(f"[{leave}, {resume})" for leave, resume in found["trained_maps"])
    maps = f"maps from ridge, but for {trained} trained by KL" if trained else "maps from ridge alone"
    text = (
        f"{found['model']}, {found['dtype']}; real passes, predicted K,V included; {maps}. Routers from {rows['fit']} rows; "
        f"how true scores are, which set and which price from {rows['tune']} ({documents['tune']} answers); reached and run on "
        f"{rows['test']} rows of {documents['test']} other answers, which chose nothing, with 95 % intervals over answers. "
        f"*Read at the wish*: on the line between those points, for comparison only. Layers of heads and shortlists that judge "
        f"are not counted. {floor(results)}"
    )
    return "\n".join([*lines, "", text, ""])


def within(point: dict[str, Any], name: str, shown: Callable[[float], str]) -> str:
    """A figure and its interval; no interval where nobody leaves."""
    low, high = point.get(f"{name}_95", (None, None))
    return shown(point[name]) if low is None else f"{shown(point[name])} ({shown(low)}–{shown(high)})"


def kv_weighting(results: Path) -> str:
    """What `make kv-weighting` found."""
    found = load(results / "kv_weighting.json")
    lines = header("exit", "rows count", "squared error, every row alike", "KL of those that stay", "agreement")
    for row in found["rows"]:
        lines.append(f"| {row['exit']} | {row['weighting']} | {row['error']:.4f} | {row['kl']:.4f} | {row['agreement']:.1%} |")
    text = (
        f"{found['share']:.0%} of the rows gone by lot, maps from {found['fitted_rows']} rows, own answers, {found['dtype']}."
    )
    return "\n".join([*lines, "", text, ""])


def exit_choices(results: Path) -> str:
    """What `make exit-choices` found: layers at two agreements, one choice changed at a time."""
    found = load(results / "exit_choices.json")
    more = "more than the first"
    lines = header("changed", "to", "layers at 98%", more, "layers at 95%", more, "judgements")
    for group, rows in found["groups"].items():
        for number, row in enumerate(rows):
            cells = [group if number == 0 else "", row["choice"]]
            for share in ("98%", "95%"):
                point = row[share]
                low, high = point["more_95"]
                difference = f"{point['more']:+.2f} ({low:+.2f} to {high:+.2f})"
                cells += [f"{point['mean_layers']:.2f}", "–" if number == 0 else difference]
            cells.append(f"{row['95%']['judgements']:.2f}")
            lines.append(f"| {' | '.join(cells)} |")
    sizes = found["corpus"]
    text = (
        f"{found['model']}, {found['dtype']}; unless said otherwise translators after layers 20 and 25 that were shown "
        f"{found['rows_shown']} rows of the model's own answers ({sizes['fit']} tokens) and judge by top-1 probability. How "
        f"true scores are comes from {sizes['tune']} other tokens; all figures from {found['judged_rows']} rows of "
        f"{found['documents']} answers that nothing learned from, at the price where the wished share of them agrees: for "
        f"comparison only. Differences with 95 % intervals over {found['draws']} draws of these answers, the same for both. "
        "Past tokens exact; layers of heads and judges are not counted, *judgements* are boundaries at which a token is judged "
        "at 95 %."
    )
    return "\n".join([*lines, "", text, ""])


TABLES = {
    "head_tokens": head_tokens, "jump_maps": jump_maps, "band_frontier": band_frontier, "kv_weighting": kv_weighting,
    "exit_choices": exit_choices,
}  # fmt: skip
