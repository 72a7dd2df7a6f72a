"""The demo's model (SmolLM2-135M-Instruct from PyPI) and the demo's own code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_exits
import tiny_models
import torch

import dyndepth
from dyndepth.demo import measure, plot, prompts, run, show
from dyndepth.runtime.score import score


@pytest.mark.demo_model
def test_invariant_1_on_smollm2() -> None:
    """Nobody exits, fp32, sixteen ragged prompts: transformers' tokens and, within its own error, its logits."""
    from dyndepth.demo import chat, load_model

    model, tokenizer = load_model(torch.float32)
    texts = [chat(tokenizer, prompt) for prompt in prompts.SHOWN]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    assert len({int(row.sum()) for row in inputs["attention_mask"]}) > 8, "ragged"
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    theirs = model.generate(**inputs, **options)
    ours = model.generate(**inputs, custom_generate=dyndepth.generate, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    for step, (mine, reference) in enumerate(zip(ours.logits, theirs.logits, strict=True)):
        alive = ours.exit_layers[:, step] >= 0
        torch.testing.assert_close(mine[alive], reference[alive], rtol=1e-3, atol=1e-3)
    alone = {name: value[3:4] for name, value in inputs.items()}
    first = int((alone["attention_mask"] == 0).sum())
    alone = {name: value[:, first:] for name, value in alone.items()}
    single = model.generate(**alone, custom_generate=dyndepth.generate, max_new_tokens=24, do_sample=False)
    width = inputs["input_ids"].shape[1]
    assert torch.equal(
        single[0, alone["input_ids"].shape[1] :],
        ours.sequences[3, width : width + single.shape[1] - alone["input_ids"].shape[1]],
    )


def test_prompts_to_calibrate_with_and_to_show_are_apart() -> None:
    calibrating = prompts.calibrating()
    assert len(set(calibrating)) == len(calibrating) == 300
    assert not set(calibrating) & set(prompts.SHOWN)
    assert len(prompts.SHOWN) >= 16


@pytest.mark.demo_model
def test_the_shipped_exits_are_this_models() -> None:
    """Fingerprint, trained heads, a certificate that still speaks for the thresholds; unseen prompts stay unseen."""
    from dyndepth.data import document, encode
    from dyndepth.demo import chat, load_exits, load_model
    from dyndepth.runtime.bind import bind
    from dyndepth.runtime.fingerprint import check_exits

    model, tokenizer = load_model(torch.bfloat16)
    exits = load_exits()
    check_exits(exits, bind(model))
    assert exits.record["training"]["rows_shown"] > 100_000
    assert exits.certificate is not None
    assert exits.certificate["certified"]
    assert exits.certificate["measured_risk"] <= exits.certificate["risk"] == 0.05
    ids = encode([chat(tokenizer, prompt) for prompt in prompts.calibrating()], tokenizer, special=True)
    assert not {document(tokens) for tokens in ids} & set(exits.record["documents"])


def _settings() -> list[measure.Setting]:
    model = tiny_models.tiny("llama")
    inputs = tiny_models.prompts(3)
    free = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None)
    model.generation_config.eos_token_id = int(free[0, -1])  # full depth would end the first answer in the middle
    return [measure.Setting(model, tiny_models.prompts(3), 5, tiny_exits.mixed(model))]


def test_measured_rows_are_true() -> None:
    """Work and agreement of the demo's table, recomputed from scratch."""
    settings = _settings()
    found = measure.measure(settings, 2, lambda: None)
    assert [(row.system, row.mode) for row in found.rows] == [
        ("transformers", "static cache"),
        ("dyndepth", "full depth"),
        ("dyndepth", "dynamic"),
    ]
    baseline, full, dynamic = found.rows
    assert full.rows_x_layers == full.agreement_teacher_forced == full.agreement_free == 1.0
    assert baseline.agreement_teacher_forced == baseline.agreement_free == 1.0, "fp32"
    assert all(row.tokens_per_s_p10 <= row.tokens_per_s_median <= row.tokens_per_s_p90 for row in found.rows)
    model, inputs, exits = settings[0].model, settings[0].inputs, settings[0].exits
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    reference = model.generate(**inputs, **options)[:, 13:]
    mine = model.generate(**inputs, custom_generate=dyndepth.generate, exits=exits, return_dict_in_generate=True, **options)
    assert dynamic.rows_x_layers == pytest.approx(float(mine.layers_run.float().mean()) / 6)
    given, free, ended = [], [], 0
    for row in range(3):
        prompt = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        tokens = torch.cat([prompt, reference[row]])
        whole, left = (score(model, [tokens], e, start=[len(prompt) - 1]).argmax()[len(prompt) - 1 : -1] for e in (None, exits))
        for position in range(5):
            given.append(bool(left[position] == whole[position]))
            if int(whole[position]) == model.generation_config.eos_token_id:  # full depth would have stopped here
                ended += 1
                break
            free.append(bool(mine.sequences[row, 13 + position] == reference[row, position]))
    assert ended, "some answer must end early for this to test anything"
    assert dynamic.agreement_teacher_forced == pytest.approx(sum(given) / len(given))
    assert dynamic.agreement_free == pytest.approx(sum(free) / len(free))


def test_schema_of_demo_json() -> None:
    row = measure.Row("a", "b", "c", 1, 2, 3.0, 4.0, 5.0, 0.6, 0.7, 0.8)
    assert list(measure.as_json([row])[0]) == [
        "system",
        "mode",
        "dtype",
        "batch",
        "context",
        "tokens_per_s_median",
        "tokens_per_s_p10",
        "tokens_per_s_p90",
        "rows_x_layers",
        "agreement_teacher_forced",
        "agreement_free",
    ]


class Bytes:
    """One byte of UTF-8 per token."""

    eos_token_id = 0

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


def test_characters_of_several_tokens_stay_whole() -> None:
    tokens = torch.tensor(list("a日本é!".encode()))
    text = show.coloured(Bytes(), tokens, torch.full((len(tokens),), 3), 6)
    assert text.plain == "a日本é!"
    assert plot._printable("a\tb\n日$") == "a\\tb\\n□\\$"


def test_the_table_fits_eighty_columns() -> None:
    from rich.console import Console

    rows = [
        measure.Row("transformers", "static cache", "bfloat16", 16, 128, 1234.5, 1111.1, 1345.6, 1.0, 0.981, 0.823),
        measure.Row("dyndepth", "dynamic", "bfloat16", 16, 128, 1234.5, 1111.1, 1345.6, 0.951, 0.955, 0.723),
    ]
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(show.table(rows, "a title"))
    printed = capture.get()
    assert "…" not in printed
    for wanted in ("transformers, static cache", "1111-1346", "95.1%", "72.3%"):
        assert wanted in printed


class Letters:
    """One letter per token."""

    eos_token_id = 2

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(0x61 + i % 26) for i in ids)


def test_picture_and_colours(tmp_path: Path) -> None:
    settings = _settings()
    found = measure.measure(settings, 1, lambda: None)
    plot.draw(tmp_path / "demo.png", found.rows, settings[0].exits, Letters(), found.dynamic, found.width, 6, shown=0)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    text = show.coloured(Letters(), found.dynamic.sequences[0, found.width :], found.dynamic.layers_run[0], 6)
    assert len(text.plain) == 5
    assert show.colour(6, 6) != show.colour(2, 6)
    json.dumps(measure.as_json(found.rows))
    assert run.run.__doc__
