"""The planner: what a step of dynamic depth will cost on a machine, and whether it pays (docs/plan.md)."""

from dyndepth.plan.advice import Advice, Option, advise
from dyndepth.plan.costs import CostTable
from dyndepth.plan.graph_passes import graph_calls
from dyndepth.plan.leaving import Leaving, leavings
from dyndepth.plan.machine import Machine, Timing
from dyndepth.plan.passes import Call, calls
from dyndepth.plan.predict import POLICIES, Step, full_depth, predict
from dyndepth.plan.rates import Exit, curve, exits_of, parse_rates
from dyndepth.plan.rebatch import art, best_flush, flushed, rebatch
from dyndepth.plan.shape import Shape
from dyndepth.plan.sheets import peak
from dyndepth.plan.sizes import Sizes
from dyndepth.plan.times import HEADS

__all__ = [
    "HEADS", "POLICIES", "Advice", "Call", "CostTable", "Exit", "Leaving", "Machine", "Option", "Shape", "Sizes", "Step",
    "Timing", "advise", "art", "best_flush", "calls", "curve", "exits_of", "flushed", "full_depth", "graph_calls",
    "leavings", "parse_rates", "peak", "predict", "rebatch",
]  # fmt: skip
