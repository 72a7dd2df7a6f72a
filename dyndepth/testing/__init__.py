"""For tests and benchmarks of dyndepth and of providers others write: cases per op, and fair comparisons."""

from dyndepth.testing.cases import CASES, Case
from dyndepth.testing.compare import assert_as_exact_as, assert_same

__all__ = ["CASES", "Case", "assert_as_exact_as", "assert_same"]
