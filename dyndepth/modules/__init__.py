"""Modules that take the place of a model's own and call the ops."""

from dyndepth.modules.ragged_linear import RaggedLinear

__all__ = ["RaggedLinear"]
