"""What a request loses when depth is dynamic: numbers in [0, 1], one per request."""

from __future__ import annotations

from collections.abc import Sequence


def disagreement(tokens: Sequence[int], full: Sequence[int]) -> float:
    """Share of positions whose token is not the full model's; positions that only one of them has count as different."""
    length = max(len(tokens), len(full))
    if length == 0:
        return 0.0
    same = sum(a == b for a, b in zip(tokens, full, strict=False))
    return 1 - same / length


def inconsistency(tokens: Sequence[int], full: Sequence[int]) -> float:
    """1 - ROUGE-L (F measure over token ids) to the full model's text: CALM's textual consistency as a loss."""
    if not tokens or not full:
        return 0.0 if len(tokens) == len(full) else 1.0
    return 1 - 2 * _longest_common_subsequence(tokens, full) / (len(tokens) + len(full))


def excess(early: float, full: float) -> float:
    """max(0, early - full): what a request's task risk grows by against references (CALM's risk consistency)."""
    return min(1.0, max(0.0, early - full))


def _longest_common_subsequence(a: Sequence[int], b: Sequence[int]) -> int:
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]
