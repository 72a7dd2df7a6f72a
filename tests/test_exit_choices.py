"""benchmarks/exit_choices.py: layers at a wanted agreement, differences on the same draws of documents."""

from __future__ import annotations

import exit_choices
import numpy as np
import pytest
import torch
from exit_choices import Curve, compared

DEPTH = 10


def _split(agrees: dict[int, list[bool]], document: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    return {leave: {"agrees": torch.tensor(right), "document": torch.tensor(document)} for leave, right in agrees.items()}


def test_a_curve_is_what_a_walk_at_every_price_adds_up_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: exits 4 and 6 of 10 layers; prices at which nobody, the surest row, and everybody leave."""
    monkeypatch.setattr(exit_choices, "_PRICES", np.array([0.0, 0.02, 1.0]))
    chance = {4: torch.tensor([0.9, 0.5, 0.1]), 6: torch.tensor([0.5, 0.93, 0.2])}
    split = _split({4: [True, False, False], 6: [True, True, True]}, [7, 7, 3])
    curve = Curve.of(DEPTH, chance, split)
    # at .02 exit 4 allows .12 and exit 6 .08: rows 0 and 1 leave there; at 1 everybody leaves at 4
    assert curve.rows.tolist() == [1, 2]  # documents 3 and 7
    assert curve.layers.tolist() == [[10, 20], [10, 10], [4, 8]]
    assert curve.right.tolist() == [[1, 2], [1, 2], [0, 1]]
    assert curve.judgements.tolist() == [[2, 4], [2, 3], [1, 2]]
    ones = np.ones((1, 2))
    layers, asked = curve.at(0.9, ones)
    part = (1 - 0.9) / (1 - 1 / 3)  # agreement falls from 1 to 1/3 between the last two prices
    assert layers == pytest.approx([20 / 3 + part * (4 - 20 / 3)])
    assert asked == pytest.approx([5 / 3 + part * (1 - 5 / 3)])
    assert curve.at(0.2, ones)[0] == pytest.approx([4.0])  # everybody leaves and still enough agree
    assert curve.at(0.9, np.array([[0.0, 1.0]]))[0] == pytest.approx([5 + (0.1 / 0.5) * (4 - 5)])  # document 7 alone


def test_differences_are_of_the_same_documents() -> None:
    """A choice that always runs one layer less differs by one, surely, however much documents differ among themselves."""
    documents, rows = 30, 20
    generator = torch.Generator().manual_seed(2)
    hard = torch.rand(documents, generator=generator).repeat_interleave(rows)
    agrees = torch.rand(documents * rows, generator=generator) > 0.3 * hard
    document = torch.arange(documents).repeat_interleave(rows).tolist()
    curves = {}
    for leave in (6, 5):
        split = _split({leave: agrees.tolist()}, document)
        curves[str(leave)] = Curve.of(DEPTH, {leave: 1 - 0.3 * hard}, split)
    curves["itself"] = curves["6"]
    base, other, same = compared(curves)
    assert base["95%"]["more"] == same["95%"]["more"] == 0
    assert same["95%"]["more_95"] == [0, 0]
    assert 6 < base["95%"]["mean_layers"] < base["98%"]["mean_layers"] < DEPTH
    low, high = other["95%"]["more_95"]
    assert low <= other["95%"]["more"] <= high < 0
    saved = DEPTH - base["95%"]["mean_layers"]
    assert other["95%"]["more"] == pytest.approx(-saved / 4, abs=0.15)  # five layers saved where four were
