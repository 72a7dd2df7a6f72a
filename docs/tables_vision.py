"""Tables of docs/vision.md, part of tables.py: the image demo, three vision systems, depth efficiency of encoders."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

from table_parts import demo_rows, header, load, machine


def demo_image(results: Path) -> str:
    """What `dyndepth demo --task image` printed."""
    found = load(results / "image.json")
    lines = demo_rows(found, "images", "accuracy")
    facts = found["facts"]
    certificate = facts["record"]["certificate"]
    said = (
        f"disagreement at most {certificate['risk']:.0%} with {certificate['confidence']:.0%} confidence, certified on "
        f"{certificate['n']} other images"
        if certificate["certified"]
        else "nothing could be certified: exits are closed"
    )
    text = (
        f"{facts['model']}, exits after {', '.join(map(str, facts['exits']))}; {facts['images']['test']} test images of "
        f"{facts['data']}; {said}. {facts['threads']} threads, {facts['repetitions']} repetitions. {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


def encoder_image(results: Path) -> str:
    """What `make encoder-image` found: operating points of three systems."""
    found = load(results / "encoder_image.json")
    lines = header("system", "threshold or p", "accuracy", "agreement", "work", "images/s (p10–p90)")
    for row in found["rows"]:
        lines.append(
            f"| {row['system']} | {row['point']} | {row['accuracy']:.1%} | {row['agreement']:.1%} | {row['work']:.1%} "
            f"| {row['samples_per_s_median']:.0f} ({row['samples_per_s_p10']:.0f}–{row['samples_per_s_p90']:.0f}) |"
        )
    settings = found["settings"]
    text = (
        f"{found['rows'][0]['samples']} test images in batches of {settings['batch']}, {settings['threads']} threads, "
        f"{settings['repetitions']} repetitions in turn. Work: samples × layers; of Dyn-Perceiver operations. {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


def encoder_depth(results: Path) -> str:
    """What `make encoder-depth` found: time saved against a perfect machine's saving."""
    found = load(results / "encoder_depth_efficiency.json")
    lines = header(
        "model", "dtype", "layout", "batch", "rounds", "exits", "of live samples", "samples × layers", "full, ms",
        "by tokens, ms", "perfect, ms", "saved, ms", "depth efficiency (p25–p75)", "±", "exits nobody takes",
    )  # fmt: skip
    order = {key: number for number, key in enumerate(itertools.product(("vit", "minilm"), ("float32", "bfloat16")))}
    for row in sorted(found["rows"], key=lambda row: (order[row["model"], row["dtype"]], row["batch"])):
        for cell in row["cells"]:
            spread = 1.82 * (cell["efficiency_p75"] - cell["efficiency_p25"]) / math.sqrt(row["rounds"])
            lines.append(
                f"| {row['model']} | {row['dtype']} | {row['layout']} | {row['batch']} | {row['rounds']} "
                f"| {', '.join(map(str, cell['exits']))} "
                f"| {cell['rate']:.0%} | {cell['samples_x_layers']:.1%} | {row['full_s'] * 1e3:.0f} "
                f"| {cell['by_tokens_s'] * 1e3:.1f} | {cell['perfect_s'] * 1e3:.1f} | {cell['saved_s'] * 1e3:.1f} "
                f"| {cell['efficiency']:.0%} ({cell['efficiency_p25']:.0%}–{cell['efficiency_p75']:.0%}) | {spread * 100:.0f} "
                f"| {cell['nobody_s'] / cell['from_s'] - 1:+.1%} |"
            )
    settings = found["settings"]
    text = (
        f"{settings['threads']} threads, medians over rounds in random order; quartiles are of single rounds. By tokens: what "
        "would be saved if layers took time in proportion to them. ±: points that the median is sure to, at 95%, going by the "
        f"quartiles (1.82 (p75 − p25) / √rounds, a normal spread supposed). {machine(found)}"
    )
    return "\n".join([*lines, "", text, ""])


TABLES = {"demo_image": demo_image, "encoder_image": encoder_image, "encoder_depth": encoder_depth}
