"""When drafting stops: after a draft that its own distribution thinks little of."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dyndepth.errors import ArgumentError


@dataclass(frozen=True)
class Confidence:
    """A sequence drafts no more, until it is verified, after a draft whose probability is below a threshold.

    With `target` the threshold moves, per sequence and after each verification, so that this share of the drafts holds
    (Draft & Verify, Zhang et al. 2023, arXiv:2309.08168, adaptive draft-exiting): with a the share of the drafts that held,
    rate <- memory rate + (1 - memory) a; the threshold's aim is `step` higher where the rate is below the target, `step` lower
    where it is not and drafting stopped before the most drafts; threshold <- inertia threshold + (1 - inertia) aim.
    """

    threshold: float = 0.6
    target: float | None = None
    step: float = 0.01
    memory: float = 0.5
    inertia: float = 0.9

    def __post_init__(self) -> None:
        shares = (self.memory, self.inertia, 0.5 if self.target is None else self.target)
        if math.isnan(self.threshold) or not self.step >= 0 or not all(0 <= share <= 1 for share in shares):
            raise ArgumentError(
                "Confidence: wanted a threshold, step >= 0 and target, memory, inertia in [0, 1], got "
                f"{self.threshold}, {self.step}, {self.target}, {self.memory}, {self.inertia}"
            )

    def begin(self) -> Gate:
        """A sequence's own."""
        return Gate(self, self.threshold)


@dataclass
class Gate:
    """One sequence's threshold."""

    rule: Confidence
    threshold: float
    rate: float = field(default=0.0, init=False)

    def stops(self, probability: float) -> bool:
        return probability < self.threshold

    def verified(self, drafted: int, accepted: int, most: int) -> None:
        """Of `drafted` drafts, `accepted` held; `most` could have been drafted."""
        rule = self.rule
        if rule.target is None or drafted == 0:
            return
        self.rate = rule.memory * self.rate + (1 - rule.memory) * accepted / drafted
        aim = self.threshold
        if self.rate < rule.target:
            aim += rule.step
        elif drafted < most:
            aim -= rule.step
        self.threshold = rule.inertia * self.threshold + (1 - rule.inertia) * aim
