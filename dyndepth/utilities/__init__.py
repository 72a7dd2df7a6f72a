"""Utilities in the same vocabulary that are no layer exits: skipped denoising steps, conditions that switch, a stop rule."""

from dyndepth.utilities.condition import ConditionSwitch
from dyndepth.utilities.darts import DartsPlus, derived
from dyndepth.utilities.taocache import TaoCache, TaoTable, calibrate_tao, moments

__all__ = ["ConditionSwitch", "DartsPlus", "TaoCache", "TaoTable", "calibrate_tao", "derived", "moments"]
