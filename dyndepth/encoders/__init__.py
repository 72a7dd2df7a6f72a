"""Encoders: whole samples that leave early. A row is a sample with its own length, and its answer a class or a transcript."""

from dyndepth.encoders.criteria import (
    SAMPLE_CRITERIA,
    ExitGate,
    FrameEntropy,
    LambdaHead,
    PatientConfidence,
    PonderDraw,
    QExit,
    RegressionPatience,
    SampleCriterion,
    SampleView,
    register_criterion,
)
from dyndepth.encoders.ctc import SentencePosterior
from dyndepth.encoders.encoder import Departure, DynamicEncoder
from dyndepth.encoders.exits import EncoderFacts, SampleExit, SampleExits
from dyndepth.encoders.facts import facts_of
from dyndepth.encoders.family import FAMILIES, Embedded, EncoderFamily, bind, register
from dyndepth.encoders.grid_heads import GlobalAggregationHead, LocalPerceptionHead
from dyndepth.encoders.heads import HEADS, CtcHead, LinearHead, ModelHead, SampleHead, register_head
from dyndepth.encoders.samples import Samples
from dyndepth.encoders.stream import Answer, SampleStream

__all__ = [
    "FAMILIES",
    "HEADS",
    "SAMPLE_CRITERIA",
    "Answer",
    "CtcHead",
    "Departure",
    "DynamicEncoder",
    "Embedded",
    "EncoderFacts",
    "EncoderFamily",
    "ExitGate",
    "FrameEntropy",
    "GlobalAggregationHead",
    "LambdaHead",
    "LinearHead",
    "LocalPerceptionHead",
    "ModelHead",
    "PatientConfidence",
    "PonderDraw",
    "QExit",
    "RegressionPatience",
    "SampleCriterion",
    "SampleExit",
    "SampleExits",
    "SampleHead",
    "SampleStream",
    "SampleView",
    "Samples",
    "SentencePosterior",
    "bind",
    "facts_of",
    "register",
    "register_criterion",
    "register_head",
]
