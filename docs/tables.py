"""Writes the tables of README.md and docs/*.md from the files in docs/results, so that no number is typed by hand. Those of
docs/roofline.md are the planner's arithmetic.

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; NAME is a function of TABLES.
`make results` measures and then runs this; `tests/test_docs.py` fails when a page and its files differ.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables_training
from table_parts import header, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str, results: Path = RESULTS) -> str:
    """The page with every table written anew."""

    def block(match: re.Match[str]) -> str:
        return match[1] + TABLES[match[2]](results) + match[3]

    return _BLOCK.sub(block, text)


def demo(results: Path) -> str:
    """What `make demo` printed."""
    lines = header("batch", "system", "tokens/s (p10–p90)", "rows × layers", "agreement", "free-running")
    for row in load(results / "demo.json"):
        lines.append(
            f"| {row['batch']} | {row['system']}, {row['mode']} | {row['tokens_per_s_median']:.1f} "
            f"({row['tokens_per_s_p10']:.1f}–{row['tokens_per_s_p90']:.1f}) | {row['rows_x_layers']:.1%} "
            f"| {row['agreement_teacher_forced']:.1%} | {row['agreement_free']:.1%} |"
        )
    return "\n".join([*lines, "", f"`make demo` on {_machine(results)}.", ""])


def bench(results: Path) -> str:
    """What `make bench` printed: per op, case and dtype, every provider beside the reference."""
    found = load(results / "bench.json")
    lines = header("op", "case", "dtype", "provider", "median µs", "p90 µs", "KiB", "GB/s", "of copy roof")
    for row in found["rows"]:
        rate, share = row["bytes_per_s"] / 1e9, row["share_of_copy_roof"]
        lines.append(
            f"| `{row['op']}` | {row['case']} | {row['dtype']} | {row['provider']} | {row['median_us']:.1f} "
            f"| {row['p90_us']:.1f} | {row['bytes'] / 1024:.0f} | {rate:.1f} | {share:.1%} |"
        )
    roof = f"Copy roof in the same run: {found['copy_roof_bytes_per_s'] / 1e9:.1f} GB/s, read and write counted."
    return "\n".join([*lines, "", f"`make bench` on {_machine(results)}; cold caches. {roof}", ""])


def calibration(results: Path) -> str:
    """What `make calibrate-demo` found: the path, then certificates."""
    found = load(results / "calibration.json")
    bands = ", ".join(f"[{leave}, {resume})" for leave, resume in found["bands"])
    lines = header("point of the path", "thresholds", "disagreement", "rows × layers")
    for number, point in enumerate(found["path"]):
        thresholds = ", ".join(f"{value:.3f}" for value in point["thresholds"])
        lines.append(f"| {number} | {thresholds} | {point['disagreement']:.2%} | {point['rows_x_layers']:.1%} |")
    lines += ["", *header("risk", "confidence", "bound", "certified point", "measured", "rows × layers")]
    for entry in found["certified"]:
        if entry["point"] is None:
            held = "none: closed | – | 100.0%"
        else:
            held = f"{entry['point']} | {entry['measured_risk']:.2%} | {entry['rows_x_layers']:.1%}"
        lines.append(f"| {entry['risk']:.0%} | {entry['confidence']:.0%} | {entry['bound']} | {held} |")
    text = (
        f"`make calibrate-demo`: SmolLM2-135M-Instruct, {found['dtype']}, bands {bands}, {found['requests']} requests of up to "
        f"{found['new_tokens']} tokens; rounding alone makes {found['rounding_floor']:.2%} of tokens differ."
    )
    return "\n".join([*lines, "", text, ""])


def static(results: Path) -> str:
    """What `make static-report` found: per kernel and target the worst over the bfloat16 cases."""
    every = load(results / "static_report.json")["rows"]
    rows = [row for row in every if row["dtype"] == "bfloat16"]
    targets = list(dict.fromkeys(row["target"] for row in rows))
    worst: dict[tuple[str, str, str], tuple[float, ...]] = {}
    for row in rows:
        key = row["op"], row["kernel"], row["target"]
        found = row["registers"], row["shared"], row["spilled"], -row["occupancy"]
        worst[key] = tuple(map(max, worst.get(key, found), found))
    lines = header("op", "kernel", *targets)
    for op, kernel in dict.fromkeys((op, kernel) for op, kernel, _ in worst):
        cells = []
        for target in targets:
            registers, shared, spilled, occupied = worst[op, kernel, target]
            cells.append(f"{registers} · {shared / 1024:.0f} · {-occupied:.0%}" + (f" · spills {spilled} B" if spilled else ""))
        lines.append(f"| `{op}` | `{kernel}` | {' | '.join(cells)} |")
    text = (
        "bfloat16: registers per thread · KiB of shared memory per program, the most over the cases · warps that a processor "
        f"holds at once of all it could, the least over the cases. {_spills(every)} {_counters(every)}"
    )
    return "\n".join([*lines, "", text, ""])


def _spills(rows: list[dict[str, Any]]) -> str:
    """By dtype how many entries spill, and how much."""
    told = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        own = [row for row in rows if row["dtype"] == dtype]
        spilt = [row for row in own if row["spilled"]]
        if not spilt:
            told.append(f"In {dtype} none of the {len(own)} entries spills.")
            continue
        least, most = (choose(row["spilled"] for row in spilt) for choose in (min, max))
        kernels = ", ".join(f"`{name}`" for name in sorted({row["kernel"] for row in spilt}))
        where = ", ".join(dict.fromkeys(row["target"] for row in spilt))
        size = f"{least} bytes a thread" if least == most else f"{least} to {most} bytes a thread"
        told.append(f"In {dtype} {len(spilt)} of the {len(own)} entries spill {size}: {kernels} ({where}).")
    return " ".join(told)


def _counters(rows: list[dict[str, Any]]) -> str:
    """Whether the run compiled what passes in graph style launch."""
    kernels = sorted({row["kernel"] for row in rows if row.get("counter")})
    if not kernels:
        return "This run is of before kernels were compiled with a counter on the device, as passes in graph style launch them."
    return f"With a counter on the device, as passes in graph style launch them, and without: {len(kernels)} kernels."


def nvcc(results: Path) -> str:
    """What `make nvcc-check` found, per kernel and target."""
    found = load(results / "nvcc_check.json")
    targets = list(dict.fromkeys(row["target"] for row in found["rows"]))
    cells: dict[str, dict[str, str]] = {}
    for row in found["rows"]:
        text = f"{row['registers']} · {row['shared']} · {row['occupancy']:.0%} ({row['limiter']})"
        cells.setdefault(row["kernel"], {})[row["target"]] = text + (f" · spills {row['spilled']} B" if row["spilled"] else "")
    lines = header("kernel", *targets)
    lines += [f"| `{kernel}` | {' | '.join(by[target] for target in targets)} |" for kernel, by in cells.items()]
    text = (
        f"nvcc {found['nvcc']}: registers per thread · bytes of shared memory per block · warps that a processor holds at once "
        "of all it could, and what limits them."
    )
    return "\n".join([*lines, "", text, ""])


def exit_heads(results: Path) -> str:
    """What `make exit-heads` found: heads after the same training, then mean layers at three agreements."""
    found = load(results / "exit_heads.json")
    lines = header(
        "exit", "head", "agreement: start", "trained", "leaves at 99% (top-1)", "98%", "95%", "95% (margin)", "MiB",
        "ms per 16 rows", "rows/s in training",
    )  # fmt: skip
    for row in sorted(found["heads"], key=lambda row: row["exit"]):
        shares = [f"{row['selective_top1'][share]:.1%}" for share in ("99%", "98%", "95%")]
        rate = "–" if row["training_rows_per_s"] is None else f"{row['training_rows_per_s']:.0f}"
        cells = [
            row["exit"], row["kind"], f"{row['agreement_at_start']:.1%}", f"{row['agreement']:.1%}", *shares,
            f"{row['selective_margin']['95%']:.1%}", f"{row['mib']:.2f}", f"{row['ms_per_16_rows']:.2f}", rate,
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", *header("head", "confidence", "wanted agreement", "reached", "mean layers run")]
    for kind, scores in found["frontier"].items():
        for score, points in scores.items():
            for share, point in points.items():
                reached = tables_training.within(point, "agreement", lambda value: f"{value:.1%}")
                layers = tables_training.within(point, "mean_layers", lambda value: f"{value:.2f}")
                lines.append(f"| {kind} | {score} | {share} | {reached} | {layers} |")
    sizes, rows = found["corpus"], max(row["rows"] for row in found["heads"])
    text = (
        f"{found['model']}, {found['dtype']}; {found['rows_shown']} rows shown of {sizes['fit']} tokens, thresholds set on "
        f"{sizes['tune']}, all figures from {rows} judged rows of {sizes['test']} others. Milliseconds are the head alone, "
        f"without judging. "
        f"{tables_training.floor(results)}"
    )
    return "\n".join([*lines, "", text, ""])


def kv_maps(results: Path) -> str:
    """What `make kv-maps` found: per exit and policy the KL and agreement of the tokens that stay."""
    found = load(results / "kv_maps.json")
    cells = {(r["text"], r["exit"], r["share"], r["policy"]): r for r in found["rows"]}
    policies = list(dict.fromkeys(row["policy"] for row in found["rows"]))
    lines = header("text", "exit", "share gone", *policies, "maps, of the model")
    for text, leave, share in dict.fromkeys((r["text"], r["exit"], r["share"]) for r in found["rows"]):
        row = [cells.get((text, leave, share, policy)) for policy in policies]
        shown = ["–" if cell is None else f"{cell['kl']:.3f} · {cell['agreement']:.1%}" for cell in row]
        lines.append(f"| {text} | {leave} | {share:.0%} | {' | '.join(shown)} | {found['share_of_model'][str(leave)]:.1%} |")
    text = (
        f"KL(full ‖ dynamic) in nats · agreement with full depth, of the tokens that stay; {found['model']}, {found['dtype']}."
    )
    return "\n".join([*lines, "", text, ""])


TABLES: dict[str, Callable[[Path], str]] = {
    "demo": demo,
    "bench": bench,
    "calibration": calibration,
    "static": static,
    "nvcc": nvcc,
    "exit_heads": exit_heads,
    "kv_maps": kv_maps,
}


for _page in sorted(Path(__file__).parent.glob("tables_*.py")):
    TABLES |= importlib.import_module(_page.stem).TABLES


def _machine(results: Path) -> str:
    """From `dyndepth info --json`, kept beside the figures."""
    facts = load(results / "machine.json")
    cpu = facts["cpu"]
    return f"{cpu['name']} ({cpu['capability']}), {facts['threads']} threads, torch {facts['packages']['torch']}"


if __name__ == "__main__":
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = rendered(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(f"wrote the tables of {page.relative_to(ROOT)}")
