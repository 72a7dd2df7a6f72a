"""The table of systems in docs/encoders.md, part of tables.py: what runs here, what differs from the paper, what is reached."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tables_encoder_text
import tables_encoders
from table_parts import header, load


def encoder_systems(results: Path) -> str:
    """A row per system of the literature; every figure is read from a file of docs/results."""
    lines = header("system", "what runs here", "what differs from the paper", "figure reached on our data")
    for system, (page, runs, differs, figure) in _systems(results).items():
        name = f"[{system}]({page})"
        lines.append(f"| {name} | {runs} | {differs} | {figure(results)} |")
    text = (
        f"Text: test accuracy at the share of samples × layers, {tables_encoder_text.SETTINGS} LGViT and Dyn-Perceiver: the "
        "point of their sweep that was chosen in the same way on calibration images. DYNAMAX: what is updated is a share of "
        "rows × layers too. Everything else about the settings stands on the systems' pages."
    )
    return "\n".join([*lines, "", text, ""])


def _systems(results: Path) -> dict[str, tuple[str, str, str, Callable[[Path], str]]]:
    """System -> (page, what runs, what differs, figure). Text systems take both from their result file."""
    return {
        **{name: _text(results, name) for name in ("PABEE", "PALBERT", "COST-EFF", "DeeBERT", "JEI-DNN", "EERO")},
        "PABEE, regression": (
            "recipes/pabee.md",
            "one pooler for all exits, answers that agree within a tolerance",
            "MiniLM; retweets of tweets, not STS-B; model frozen",
            _regression,
        ),
        "MuE": (
            "recipes/mue.md",
            "ViT and BERT streams, a BERT decoder with cross-attention; thresholds per stream and in the decoder",
            "not OFA; digits with questions, not SNLI-VE and captions",
            _mue,
        ),
        "LGViT": (
            "recipes/lgvit.md",
            "ViT of 8 layers, local perception and global aggregation heads, both stages",
            "digits, trained from nothing; one rate with a cosine",
            _image("LGViT"),
        ),
        "Dyn-Perceiver": (
            "recipes/dyn_perceiver.md",
            "convolutions and latent codes, exits on the codes",
            "residual blocks, not RegNet; digits",
            _image("Dyn-Perceiver"),
        ),
        "Early-exit ASR": (
            "recipes/asr.md",
            "Conformer with CTC exits, frame entropy and sentence posterior",
            "8 layers of 80, not 12 of 256; espeak-ng's voices; letters; no attention decoder",
            _asr,
        ),
        "Splitformer": (
            "recipes/splitformer.md",
            "half-rate layers beside the first and the last block of that Conformer",
            "layers are added to a trained Conformer, not trained with it from the start",
            _splitformer,
        ),
        "DYNAMAX": (
            "recipes/dynamax.md",
            "Mamba, three classifiers, skipped states left or updated",
            "a Mamba of 8 layers trained here on newswire, not Codestral-Mamba-7B",
            _dynamax,
        ),
        "TaoCache": (
            "utilities.md",
            "steps of a diffusion model skipped per prompt",
            "the paper's code is not public; a DiT of four layers, not video models",
            _taocache,
        ),
        "Split computing": (
            "split.md",
            "survivors of the lower layers travel to a second process",
            "no one paper's; a loopback socket, not a network",
            _split,
        ),
    }


def _text(results: Path, system: str) -> tuple[str, str, str, Callable[[Path], str]]:
    found = load(results / "encoder_text.json")
    runs, differs = tables_encoder_text.runs_here(found, system), found["about"][system][2]
    page = system.lower().replace("jei-dnn", "jei_dnn").replace("-", "")
    return f"recipes/{page}.md", runs, differs, lambda _: tables_encoder_text.figures(found, system)


def _regression(results: Path) -> str:
    found = load(results / "encoder_regression.json")
    full = next(row for row in found["rows"] if not row["patience"])
    row = next(row for row in found["rows"] if all(row[name] == value for name, value in found["best"].items()))
    setting = "full depth" if row is full else f"P = {row['patience']}, tolerance {row['tolerance']:g}"
    return (
        f"squared error {row['mse']:.3f} at {row['samples_x_layers']:.0%} ({setting}; full depth {full['mse']:.3f}, variance "
        "of the answers 1)"
    )


def _mue(results: Path) -> str:
    found = load(results / "mue.json")
    full, row = found["rows"][:2]
    work = ", ".join(f"{part} {row['work'][part]:.0%}" for part in ("image", "text", "decoder"))
    trained = f"trained for {found['steps']} steps of {found['batch']}"
    return f"{row['accuracy']:.1%} exact answers (full depth {full['accuracy']:.1%}) at layers: {work}; {trained}"


def _image(system: str) -> Callable[[Path], str]:
    def figure(results: Path) -> str:
        rows = [row for row in load(results / "encoder_image.json")["rows"] if row["system"] == system]
        full = next(row for row in rows if row["point"] == "full depth")
        near = [row for row in rows if row["calibration"]["accuracy"] >= full["calibration"]["accuracy"] - 0.01]
        row = min(near, key=lambda row: row["calibration"]["work"])
        return (
            f"{row['accuracy']:.1%} at {row['work']:.0%} of the work ({row['point']}; full depth {full['accuracy']:.1%}), "
            f"{row['samples_per_s_median'] / full['samples_per_s_median']:.1f} times the images/s"
        )

    return figure


def _asr(results: Path) -> str:
    found = load(results / "encoder_speech.json")
    parts = [
        f"{criterion.replace('_', ' ')}: WER {row['wer']:.1%} at {row['samples_x_layers']:.0%}"
        for criterion, row in tables_encoders.chosen_on_calibration(found).items()
    ]
    trained = f"trained for {found['training']['steps']} steps of {found['training']['batch']}"
    return f"{'; '.join(parts)} (full depth {found['full']['wer']:.1%}; {trained})"


def _splitformer(results: Path) -> str:
    found = load(results / "splitformer.json")
    plain, split = found["rows"][1:]
    parts = []
    for where, at in (("the first exit", 0), ("the top", -1)):
        mine, other = split["exits"][at], plain["exits"][at]
        more = mine["operations"] / other["operations"] - 1
        parts.append(f"{where} {mine['wer']:.1%} (without {other['wer']:.1%}; {more:.0%} more operations)")
    return f"WER at {', at '.join(parts)}, after {found['steps']} more steps of {found['batch']} for both"


def _dynamax(results: Path) -> str:
    found = load(results / "dynamax.json")
    parts = []
    for policy in ("leave", "update"):
        rows = [row for row in found["rows"] if row["policy"] == policy and row["wanted"] == 0.9]
        cells = [
            f"{row['kind']} {row['agreement']:.1%} at {row['rows_x_layers']:.0%}"
            + (f" (and {row['states_updated']:.0%} updated)" if row["states_updated"] else "")
            for row in rows
        ]
        parts.append(f"{policy}: {', '.join(cells)}")
    trained = f"trained for {found['steps']} steps of {found['batch']}"
    return f"agreement reached at rows × layers, 90% asked for on other documents; {'; '.join(parts)}; {trained}"


def _taocache(results: Path) -> str:
    found = load(results / "taocache.json")
    row = found["rows"][-1]
    return (
        f"{row['model_calls']:.1f} of {found['steps']} model calls, PSNR {row['psnr']:.1f} dB (as many plain steps "
        f"{row['psnr_fewer_steps']:.1f} dB)"
    )


def _split(results: Path) -> str:
    found = load(results / "split.json")
    wires = {row["wire"]: row for row in found["wires"]}
    shares = ", ".join(f"{name} {wires[name]['sent_bytes'] / found['all_fp32_bytes']:.1%}" for name in ("fp32", "fp16", "int8"))
    answers = min(row["same_answer"] for row in found["wires"])
    return f"{shares} of the bytes of all samples in fp32; {answers:.1%} of the answers are those of one process"


def text_speed(results: Path) -> str:
    """What benchmarks/encoder_text_speed.py found: the frontier of the text demo in batches."""
    found = load(results / "encoder_text_speed.json")
    lines = header("threshold", "way", "documents/s (p10–p90)", "samples × layers", "accuracy", "agreement")
    for row in found["rows"]:
        limit = "–" if row["threshold"] is None else f"{row['threshold']:.3g}"
        limit += " (certified)" if row["threshold"] == found["certified_threshold"] else ""
        way = "transformers, full depth" if row["threshold"] is None else row["mode"]
        lines.append(
            f"| {limit} | {way} | {row['samples_per_s_median']:.0f} "
            f"({row['samples_per_s_p10']:.0f}–{row['samples_per_s_p90']:.0f}) "
            f"| {row['samples_x_layers']:.1%} | {row['accuracy']:.1%} | {row['agreement']:.1%} |"
        )
    cpu = found["machine"]["cpu"]
    text = (
        f"{found['model']}, float32, {found['data']}, batches of {found['batch']}. Speed: {found['documents']} test documents, "
        f"{found['threads']} threads, {found['repetitions']} repetitions in turn, {cpu['name']} ({cpu['capability']}); "
        f"everything else: {found['judged']} test documents."
    )
    return "\n".join([*lines, "", text, ""])


TABLES: dict[str, Callable[[Path], str]] = {"encoder_systems": encoder_systems, "encoder_text_speed": text_speed}
