"""Recipes: known early-exit systems, each a thin composition of heads, criteria, K,V policy, training and calibration.

A module per system, imported on first use: `dyndepth.recipes.apparate`, `asr`, `balcony`, `calm`, `costeff`, `deebert`,
`draft_verify`, `drex`, `dyn_perceiver`, `dynamax`, `ee_llm`, `ee_tuning`, `eero`, `first`, `flexidepth`, `free`, `hsd`,
`jei_dnn`, `kangaroo`, `layerskip`, `lgvit`, `mue`, `pabee`, `palbert`, `skipdecode`, `specexit`, `splitformer`. docs/recipes
has a page for each: what the paper does, what is done here, and what differs.
"""

from __future__ import annotations

from typing import Any

_SYSTEMS = (
    "apparate", "asr", "balcony", "calm", "costeff", "deebert", "draft_verify", "drex", "dyn_perceiver", "dynamax",
    "ee_llm", "ee_tuning", "eero", "first", "flexidepth", "free", "hsd", "jei_dnn", "kangaroo", "layerskip", "lgvit",
    "mue", "pabee", "palbert", "skipdecode", "specexit", "splitformer",
)  # fmt: skip

__all__ = list(_SYSTEMS)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _SYSTEMS:
        return importlib.import_module(f"dyndepth.recipes.{name}")
    raise AttributeError(f"module 'dyndepth.recipes' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SYSTEMS})
