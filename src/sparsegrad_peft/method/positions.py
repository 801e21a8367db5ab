"""Choose the entries that a packed core trains: those with the most gradient energy over a few batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from .basis import Basis
from .config import CalibrationConfig, resolve_config
from .gradients import Step, default_loss, stream_gradients
from .groups import check_same_groups, linear_shape
from .precision import at_least_float32
from .processes import broadcast_from_rank0
from .selection import resolve_k, topk_positions

_TEN_STEPS = CalibrationConfig.paper(n_steps=10)


def select_positions(
    model: nn.Module,
    groups: Mapping[str, Sequence[str]],
    bases: Mapping[str, Basis],
    batches: Iterable[Any] | None = None,
    *,
    k: int | None = None,
    density: float | None = None,
    step: Step | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    config: CalibrationConfig | None = None,
    progress: bool = True,
    **fields: Any,
) -> dict[str, Tensor]:
    """Return positions for `SparseGradLinear.pack` or `renew_positions`: the `k` largest entries of `Σ G_tilde²`.

    The layers may be plain linear layers or SparseGrad layers in training. One float32 matrix (r, c) is held for each
    layer. The model does not change. Several processes choose together, from the gradients of the whole batches.

    Args:
        model: see `stream_gradients`, as for `batches`, `step` and `loss_fn`.
        groups: group name -> layer names.
        bases: group name -> basis in which the entries are chosen.
        batches: inputs of `loss_fn`.
        k: entries for each layer.
        density: the same as a share of `r * c`.
        step: in place of `batches`.
        loss_fn: (model, batch) -> scalar loss.
        config: `n_steps`, `training` and `trajectory` are used; None takes 10 steps.
        progress: show a progress bar.
        fields: in place of `config`, single fields of `CalibrationConfig`.

    Returns:
        Layer name -> (k,) flat row-major positions in (r, c), int32, ascending.

    Raises:
        ValueError: a group has no basis, or one of another shape; whatever `stream_gradients` and `resolve_k` refuse.
    """
    config = resolve_config(config, fields, _TEN_STEPS)
    check_same_groups(groups, bases)
    basis_of = {layer: bases[group] for group, layers in groups.items() for layer in layers}
    _check_k(model, basis_of, k, density)
    squares: dict[str, Tensor] = {}
    on_device = cache(Basis.on_device)

    def add(layer: str, G: Tensor) -> None:
        G_tilde = on_device(basis_of[layer], G.device).to_basis(G.to(at_least_float32(G.dtype)))
        squares[layer] = squares[layer].addcmul_(G_tilde, G_tilde) if layer in squares else G_tilde.square()

    stream_gradients(
        model, basis_of, add, batches, step=step, loss_fn=loss_fn, config=config,
        progress="Choosing positions" if progress else None,
    )  # fmt: skip
    chosen = {
        layer: topk_positions(squares[layer].reshape(-1), resolve_k(squares[layer].numel(), k, density)).int()
        for layer in basis_of
    }
    return {layer: broadcast_from_rank0(positions) for layer, positions in chosen.items()}


def _check_k(model: nn.Module, basis_of: Mapping[str, Basis], k: int | None, density: float | None) -> None:
    for layer, module in model.named_modules():
        if layer in basis_of:  # stream_gradients refuses unknown ones, all at once
            r, c = basis_of[layer].core_shape(*linear_shape(module, layer))
            resolve_k(r * c, k, density)
