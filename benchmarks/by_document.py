"""How sure a mean over rows is, where rows of one document go together: by documents drawn anew, not by rows.

Rows of one answer share its subject and, with back-filled K,V, each other's mistakes. An interval that took them for
independent would be too narrow.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

#: Fewer documents than this show nothing of how documents differ.
_FEWEST = 10
_DRAWS = 4000


def interval(values: Tensor, document: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap of the mean of `values` [rows] (bool or a number) over whole documents.

    `document` [rows]: int64, any numbers, equal within a document. Documents are drawn with replacement, each with all of its
    rows, so that the mean is a ratio of two sums (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, ch. 8 and 13).
    The same rows give the same interval.
    """
    if values.shape != document.shape or values.dim() != 1:
        raise ValueError(f"interval: values and document must be of one length, got {values.shape} and {document.shape}")
    _, of = document.unique(return_inverse=True)
    count = int(of.max()) + 1 if len(of) else 0
    if count < _FEWEST:
        raise ValueError(f"interval: wanted rows of at least {_FEWEST} documents, got {count}")
    rows = torch.bincount(of, minlength=count).double().numpy()
    sums = torch.bincount(of, values.double(), minlength=count).numpy()
    drawn = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=_DRAWS).astype(np.float64)
    means = (drawn @ sums) / (drawn @ rows)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
