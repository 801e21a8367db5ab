"""Which tokens have a gradient at all.

A padded position takes part in no loss, so its row of `δ = ∂L/∂y` is exactly zero in every layer; and where a model
reads one position of its last block (BERT's classifier), so are all the others there. Backward's products over these
rows are zero, and leaving them out changes nothing but the time.
"""

from __future__ import annotations

import torch
from torch import Tensor

# A row of zeros is zero in its first columns; looking at these alone shows at next to no cost that there are none.
_PROBE = 8
_LEAST = 1 / 16  # share of rows to leave out below which copying the others is not worth it


@torch.no_grad()
def live_rows(delta: Tensor) -> Tensor | None:
    """Ascending indices of the rows of `delta` (T, out) that are not exactly zero; None: take all, (nearly) all are.

    On an accelerator the answer is None: how many rows there are decides on shapes, so the host would have to wait for
    the device in every layer. The same under `torch.compile`, which wants shapes that do not depend on values.
    """
    if delta.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    suspects = (delta[:, :_PROBE] == 0).all(1).nonzero().squeeze(1)
    least = _LEAST * delta.shape[0]
    if suspects.numel() == 0 or suspects.numel() < least:
        return None
    dead = suspects[delta[suspects].abs().amax(1) == 0]  # NaN is not zero
    if dead.numel() == 0 or dead.numel() < least:
        return None
    alive = torch.ones(delta.shape[0], dtype=torch.bool)
    alive[dead] = False
    return alive.nonzero().squeeze(1)
