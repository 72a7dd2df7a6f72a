"""Launch choices: those of a model, and a search for better tile sizes, for those who ask for it (`dyndepth tune`)."""

from dyndepth.tuning.problems import OPS, Problem, problems
from dyndepth.tuning.search import Found, search

__all__ = ["OPS", "Found", "Problem", "problems", "search"]
