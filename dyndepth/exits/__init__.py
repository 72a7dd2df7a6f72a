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
    RouterScore,
    Saturation,
    Schedule,
    TopProbability,
)
from dyndepth.exits.exits import Exits, ModelFacts
from dyndepth.exits.heads import HEADS, BlockHead, MlpHead, NormHead, TranslatorHead
from dyndepth.exits.maps import JUMPS, AdapterJump, JumpMap, KVMap, MlpJump
from dyndepth.exits.router import Router

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
    "Router",
    "RouterScore",
    "Saturation",
    "Schedule",
    "TopProbability",
    "TranslatorHead",
]
