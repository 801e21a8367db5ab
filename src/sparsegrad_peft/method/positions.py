"""Which entries a packed core trains: those with the most gradient energy over a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .basis import Basis
from .gradients import Step, Trajectory, default_loss, stream_gradients
from .groups import linear_shape
from .processes import sum_over_processes
from .selection import resolve_k, topk_positions


def select_positions(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    bases: Mapping[str, Basis],
    batches: Iterable[Any] | None = None,
    *,
    k: int | None = None,
    density: float | None = None,
    n_steps: int = 10,
    step: Step | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    training: bool | None = True,
    trajectory: Trajectory | None = None,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Positions for `SparseGradLinear.pack` or `renew_positions`: the `k` largest entries of `Σ G_tilde²` in a layer.

    The layers may be linear ones still to be replaced, or SparseGrad layers in training. One matrix (r, c) is kept
    for each layer, in float32; the model is left as it was. Under `torch.distributed` the sums are all-reduced.

    Args:
        model: see `stream_gradients`, as for `batches`, `step`, `loss_fn`, `n_steps`, `training` and `trajectory`.
        groups: group name -> layer names.
        bases: group name -> basis in which the entries are chosen.
        batches: what `loss_fn` takes.
        k: entries for each layer.
        density: the same as a share of `r * c`.
        n_steps: backward passes.
        step: in place of `batches`.
        loss_fn: (model, batch) -> scalar loss.
        training: train mode, eval mode, or as the model is.
        trajectory: None takes every gradient at the present weights.
        progress: show a progress bar.

    Returns:
        Layer name -> (k,) flat row-major positions in (r, c), int32, ascending.

    Raises:
        ValueError: a group has no basis, or one of another shape; whatever `stream_gradients` and `resolve_k` refuse.
    """
    if set(groups) != set(bases):
        raise ValueError(f"expected a basis for each group, found groups {sorted(groups)} and bases {sorted(bases)}")
    basis_of = {layer: bases[group] for group, layers in groups.items() for layer in layers}
    modules = dict(model.named_modules())
    for layer in basis_of.keys() & modules.keys():  # unknown ones are refused by stream_gradients, all at once
        r, c = basis_of[layer].core_shape(*linear_shape(modules[layer], layer))
        resolve_k(r * c, k, density)
    squares: dict[str, Tensor] = {}

    def add(layer: str, G: Tensor) -> None:
        G_tilde = basis_of[layer].to_basis(G.to(torch.promote_types(G.dtype, torch.float32)))
        squares[layer] = squares[layer].addcmul_(G_tilde, G_tilde) if layer in squares else G_tilde.square()

    stream_gradients(
        model, basis_of, add, batches, step=step, loss_fn=loss_fn, n_steps=n_steps, training=training,
        trajectory=trajectory, progress="Choosing positions" if progress else None,
    )  # fmt: skip
    positions = {}
    for layer in basis_of:  # the same order on every process, unlike that in which gradients arrive
        sum_over_processes(squares[layer])
        flat = squares[layer].reshape(-1)
        positions[layer] = topk_positions(flat, resolve_k(flat.numel(), k, density)).to(torch.int32)
    return positions
