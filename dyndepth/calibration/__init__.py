"""Thresholds with a guarantee, or for a budget. docs/calibration.md says which procedure promises what."""

from dyndepth.calibration.bounds import betting, betting_bound, hoeffding, hoeffding_bentkus
from dyndepth.calibration.budget import exponential_weights, geometric_shares, thresholds_for
from dyndepth.calibration.certify import calibrate, default_path, describe
from dyndepth.calibration.losses import disagreement, excess, inconsistency
from dyndepth.calibration.reliability import BetaMixture, Reliability, brier
from dyndepth.calibration.requests import LOSSES, Lost, Requests
from dyndepth.calibration.samples import calibrate_samples
from dyndepth.calibration.selection import (
    Selection,
    conformal,
    fixed_sequence,
    learn_then_test,
    pareto_front,
    pareto_testing,
)

__all__ = [
    "LOSSES", "BetaMixture", "Lost", "Reliability", "Requests", "Selection", "betting", "betting_bound", "brier",
    "calibrate", "calibrate_samples", "conformal", "default_path", "describe", "disagreement", "excess", "exponential_weights",
    "fixed_sequence", "geometric_shares", "hoeffding", "hoeffding_bentkus", "inconsistency", "learn_then_test",
    "pareto_front", "pareto_testing", "thresholds_for",
]  # fmt: skip
