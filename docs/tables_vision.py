"""Tables of docs/vision.md, part of tables.py: the image demo, three vision systems, depth efficiency of encoders."""

from __future__ import annotations

from pathlib import Path

from table_parts import header, load, machine


def demo_image(results: Path) -> str:
    """What `dyndepth demo --task image` printed."""
    found = load(results / "image.json")
    lines = header("batch", "system", "images/s (p10–p90)", "samples × layers", "accuracy", "agreement")
    for row in found["rows"]:
        lines.append(
            f"| {row['batch']} | {row['system']}, {row['mode']} | {row['samples_per_s_median']:.0f} "
            f"({row['samples_per_s_p10']:.0f}–{row['samples_per_s_p90']:.0f}) | {row['samples_x_layers']:.1%} "
            f"| {row['quality']:.1%} | {row['agreement']:.1%} |"
        )
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
        "model", "dtype", "layout", "batch", "rounds", "exits", "of live samples", "samples × layers", "full, ms", "saved, ms",
        "perfect, ms", "depth efficiency (p25–p75)", "exits nobody takes",
    )  # fmt: skip
    for row in found["rows"]:
        for cell in row["cells"]:
            lines.append(
                f"| {row['model']} | {row['dtype']} | {row['layout']} | {row['batch']} | {row['rounds']} "
                f"| {', '.join(map(str, cell['exits']))} "
                f"| {cell['rate']:.0%} | {cell['samples_x_layers']:.1%} | {row['full_s'] * 1e3:.0f} "
                f"| {cell['saved_s'] * 1e3:.0f} | {cell['perfect_s'] * 1e3:.0f} | {cell['efficiency']:.0%} "
                f"({cell['efficiency_p25']:.0%}–{cell['efficiency_p75']:.0%}) | {cell['nobody_s'] / cell['from_s'] - 1:+.1%} |"
            )
    settings = found["settings"]
    text = f"{settings['threads']} threads, medians over rounds in random order. {machine(found)}"
    return "\n".join([*lines, "", text, ""])


TABLES = {"demo_image": demo_image, "encoder_image": encoder_image, "encoder_depth": encoder_depth}
