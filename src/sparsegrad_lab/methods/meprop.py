"""Method `meprop`: the rule of MeProp, which selects the largest entries of the gradient itself."""

from __future__ import annotations

from .method import LAYERS, LOOP, SELECTION
from .sparsegrad import SparseGrad


class MeProp(SparseGrad):
    """SparseGrad's adapter in the original space: no bases, no calibration."""

    name = "meprop"
    order = 2
    summary = "the largest entries of the gradient in the original space"
    learning_rate = 1e-3
    density = 0.01
    reads = LAYERS | LOOP | SELECTION | {"adapter.prefer"}
    original_space = True


METHOD = MeProp()
