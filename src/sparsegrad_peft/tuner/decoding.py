"""Decoding: within one call of `generate`, each layer's update is ready in the type to compute in.

With directions on both sides it is two thin matrices:

    x Uᵀ Sᵀ V = (x downᵀ) upᵀ        down (m, in), up (out, m), m = min(r, c)

With one token, a product costs the bytes of its matrices. `U`, `S` and `V` are c·in + r·c + r·out numbers, `down` and
`up` are m·(in + out): fewer, and one product less. A side that selects neurons copies numbers, so `U`, `S` and `V` stay
apart there; only the scaling and the change of type are done beforehand.

All of it is made when `generate` begins and dropped when it ends, so it is never older than the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..method.basis import Basis
from ..method.sides import is_selected, scaled, take

FEW = 16
"""Tokens up to which the bytes of the matrices decide, and not the multiply-adds."""

_running: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"Model -> calls of its `generate` that are running."
_lock = Lock()
"Held while the layers of a model are prepared or restored."


class Layer(Protocol):
    """An adapted layer."""

    def fold(self) -> None:
        """Prepare the update for decoding."""

    def unfold(self) -> None:
        """Drop what was prepared."""


@contextmanager
def prepared_for_decoding(model: nn.Module, layers: Sequence[Layer]) -> Iterator[None]:
    """Fold the layers of a model while `generate` runs: once, also for calls within calls and in several threads."""
    try:
        with _lock:
            _running[model] = _running.get(model, 0) + 1
            for layer in layers if _running[model] == 1 else ():
                layer.fold()
        yield
    finally:
        with _lock:
            _running[model] -= 1
            for layer in layers if _running[model] == 0 else ():
                layer.unfold()


@dataclass(frozen=True)
class Folded:
    """The update of one adapter, for decoding."""

    adapter: str
    down: Tensor
    "(m, in), or (c,) int64: the selected features"
    core: Tensor | None
    "(r, c), scaled; None: it is in `down` or `up`"
    up: Tensor
    "(out, m), or (r,) int64: the selected features"
    dtype: torch.dtype
    "type to compute in"

    def fits(self, x: Tensor) -> bool:
        """True for a few tokens of the matrices' type, without gradients."""
        few = x.shape[:-1].numel() <= FEW
        return few and x.dtype == self.dtype and x.device == self.down.device and not torch.is_grad_enabled()

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x (W + Vᵀ S U)ᵀ + b`: (..., in) -> (..., out)."""
        flat = x.reshape(-1, x.shape[-1])
        y = torch.nn.functional.linear(flat, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        z = take(flat, self.down)
        if self.core is not None:
            z = z @ self.core.T
        if is_selected(self.up):
            y.index_add_(1, self.up, z)
        else:
            y.addmm_(z, self.up.T)
        return y.view(*x.shape[:-1], len(weight))


@torch.no_grad()
def fold(adapter: str, S: Tensor, basis: Basis, dtype: torch.dtype) -> Folded | None:
    """Return an adapter's update for decoding, or None if two matrices would be no smaller than `U`, `S` and `V`."""
    U, V = basis.U, basis.V
    if U is None or V is None or S.is_meta:
        return None
    S = scaled(S, basis.scales)
    if is_selected(U) or is_selected(V):
        down = U.long() if is_selected(U) else U.to(dtype)
        up = V.long() if is_selected(V) else V.T.to(dtype)
        return Folded(adapter, down, S.to(dtype), up, dtype)
    (r, c), in_, out = S.shape, U.shape[1], V.shape[1]
    if min(r, c) * (in_ + out) >= c * in_ + r * c + r * out:
        return None
    down, up = (S @ U.to(S.dtype), V.T) if r <= c else (U, V.T.to(S.dtype) @ S)
    return Folded(adapter, down.to(dtype).contiguous(), None, up.to(dtype).contiguous(), dtype)
