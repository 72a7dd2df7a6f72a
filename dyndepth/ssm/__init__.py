"""State-space models: Mamba decoding whose rows leave at their own depth, and what becomes of the states they skip."""

from dyndepth.ssm.classifiers import CLASSIFIERS, Classifier, FfnClassifier, LinearClassifier, MambaClassifier
from dyndepth.ssm.exits import SsmExit, SsmExits
from dyndepth.ssm.generate import POLICIES, MambaDecoder, SsmDecoded, SsmScored
from dyndepth.ssm.mixer import State

__all__ = [
    "CLASSIFIERS", "POLICIES", "Classifier", "FfnClassifier", "LinearClassifier", "MambaClassifier", "MambaDecoder",
    "SsmDecoded", "SsmExit", "SsmExits", "SsmScored", "State",
]  # fmt: skip
