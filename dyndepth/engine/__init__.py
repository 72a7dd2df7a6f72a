"""Serving with dynamic depth: requests come and go, rows that must go deeper wait until a deep pass is worth it."""

from dyndepth.engine.engine import Counts, Engine, Event
from dyndepth.engine.request import Request
from dyndepth.engine.rules import Filled, Immediate, Moment, Planned, Rule, Waiting

__all__ = ["Counts", "Engine", "Event", "Filled", "Immediate", "Moment", "Planned", "Request", "Rule", "Waiting"]
