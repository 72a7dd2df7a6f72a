"""Exits: heads, maps, routers, criteria and the container that is saved and loaded."""

from dyndepth.exits.band import Band
from dyndepth.exits.criteria import (
    CRITERIA,
    Always,
    Criterion,
    Decay,
    Entropy,
    FixedDepth,
    Margin,
    Never,
    Patience,
    PromptRouter,
    RouterScore,
    Saturation,
    Schedule,
    TopProbability,
)
from dyndepth.exits.exits import Exits
from dyndepth.exits.heads import HEADS, BlockHead, MlpHead, NormHead, TranslatorHead
from dyndepth.exits.maps import JUMPS, AdapterJump, JumpMap, KVMap, MlpJump
from dyndepth.exits.router import Router
from dyndepth.exits.store import ModelFacts

__all__ = [
    "CRITERIA",
    "HEADS",
    "JUMPS",
    "AdapterJump",
    "Always",
    "Band",
    "BlockHead",
    "Criterion",
    "Decay",
    "Entropy",
    "Exits",
    "FixedDepth",
    "JumpMap",
    "KVMap",
    "Margin",
    "MlpHead",
    "MlpJump",
    "ModelFacts",
    "Never",
    "NormHead",
    "Patience",
    "PromptRouter",
    "Router",
    "RouterScore",
    "Saturation",
    "Schedule",
    "TopProbability",
    "TranslatorHead",
]
