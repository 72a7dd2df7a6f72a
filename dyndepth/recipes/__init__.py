"""Recipes: known early-exit systems, each a thin composition of heads, criteria, K,V policy, training and calibration.

A module per system, imported on first use: `dyndepth.recipes.apparate`, `balcony`, `calm`, `costeff`, `deebert`, `drex`,
`dyn_perceiver`, `ee_llm`, `ee_tuning`, `eero`, `free`, `jei_dnn`, `kangaroo`, `layerskip`, `lgvit`, `pabee`, `palbert`,
`skipdecode`, `specexit`. docs/recipes has a page for each: what the paper does, what is done here, and what differs.
"""

from __future__ import annotations

from typing import Any

_SYSTEMS = (
    "apparate", "balcony", "calm", "costeff", "deebert", "drex", "dyn_perceiver", "ee_llm", "ee_tuning", "eero", "free",
    "jei_dnn", "kangaroo", "layerskip", "lgvit", "pabee", "palbert", "skipdecode", "specexit",
)  # fmt: skip

__all__ = list(_SYSTEMS)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SYSTEMS:
        return importlib.import_module(f"dyndepth.recipes.{name}")
    raise AttributeError(f"module 'dyndepth.recipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SYSTEMS})
