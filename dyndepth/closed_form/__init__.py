"""Closed form first: exits by regression and measurement, without a gradient step."""

from dyndepth.closed_form.candidates import candidate_spans
from dyndepth.closed_form.fitting import fit

__all__ = ["candidate_spans", "fit"]
