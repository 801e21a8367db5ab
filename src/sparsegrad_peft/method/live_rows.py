"""Find the tokens that have a gradient.

A padded position takes part in no loss, so its row of `δ = ∂L/∂y` is exactly zero in every layer. Where a model reads
one position of its last block (BERT's classifier), the rows of all other positions there are zero too. Leaving these
rows out of backward's products does not change the result.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row of zeros is zero in its first columns. Looking at these alone is a cheap way to see that there are none.
_PROBE_COLUMNS = 8
_LEAST_SHARE = 1 / 16  # of rows to leave out; below it, copying the others costs more than it saves


@torch.no_grad()
def live_rows(delta: Tensor) -> Tensor | None:
    """Return the indices (ascending) of the rows of `delta` (T, out) that are not exactly zero; None means all rows.

    The answer is None if nearly all rows are live, on an accelerator (the host would wait for the device in every
    layer, since the number of rows decides on shapes), and under `torch.compile` (which needs shapes that do not depend
    on values).
    """
    if delta.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    suspects = (delta[:, :_PROBE_COLUMNS] == 0).all(1).nonzero().squeeze(1)
    least = _LEAST_SHARE * delta.shape[0]
    if suspects.numel() == 0 or suspects.numel() < least:
        return None
    zero = suspects[delta[suspects].abs().amax(1) == 0]  # NaN is not zero
    if zero.numel() == 0 or zero.numel() < least:
        return None
    live = torch.ones(delta.shape[0], dtype=torch.bool)
    live[zero] = False
    return live.nonzero().squeeze(1)
