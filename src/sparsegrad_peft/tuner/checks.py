"""Checks of an adapter's numbers and name: what comes from a file is not trusted."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..method.basis import BASIS_BUFFERS, ORTHOGONALITY_TOLERANCE
from ..method.precision import at_least_float32, exact_products
from ..method.processes import is_sharded
from ..method.sides import check_selected, is_selected

_PROBES = 16


def check_core(S: Tensor, name: str) -> None:
    """Check the core of a layer.

    Raises:
        TypeError: it is no matrix of floating-point numbers.
        ValueError: a number is not finite.
    """
    if S.dtype not in ORTHOGONALITY_TOLERANCE or S.dim() != 2:
        raise TypeError(
            f"{name} is damaged: expected a floating-point matrix, found {S.dtype} of shape {tuple(S.shape)}"
        )
    check_finite(S, name)


def check_finite(value: Tensor, name: str) -> None:
    """Raise `ValueError` if a number of any other tensor is not finite, such as of a trained head."""
    if value.is_floating_point() and not bool(value.isfinite().all()):
        bad = int((~value.isfinite()).sum())
        raise ValueError(f"{name} is damaged: {bad} of its {value.numel()} numbers are not finite")


@torch.no_grad()
def check_side(side: Tensor, name: str) -> None:
    """Check one side of a basis: indices of features, or rows (r, n), at the cost of a few products with vectors.

    `‖E_i‖` for the rows of `E = M Mᵀ - I` is estimated by `E z` for random vectors z.

    Raises:
        TypeError, ValueError: as in `check_core`, or the rows are not orthonormal within `ORTHOGONALITY_TOLERANCE`.
    """
    if is_selected(side):
        try:
            check_selected(side, None, name)
        except (TypeError, ValueError) as problem:
            raise type(problem)(f"{name} is damaged: {problem}") from None
        return
    check_core(side, name)
    rows = side.to(at_least_float32(side.dtype))
    generator = torch.Generator("cpu").manual_seed(0)
    z = torch.randn(len(rows), _PROBES, generator=generator, device="cpu").to(rows)
    with exact_products(rows.device):
        residual = rows @ (rows.T @ z) - z
    error, tolerance = float(residual.square().mean(1).sqrt().max()), ORTHOGONALITY_TOLERANCE[side.dtype]
    if not error <= tolerance:
        raise ValueError(
            f"{name} is damaged: its rows are not orthonormal, by {error:.2g} where {side.dtype} allows {tolerance:g}"
        )


def check_scale(scale: Tensor, name: str) -> None:
    """Check the scales of one side of a core.

    Raises:
        TypeError, ValueError: they are no vector of positive, finite floating-point numbers.
    """
    if scale.dim() != 1 or not scale.is_floating_point():
        raise TypeError(
            f"{name} is damaged: expected a floating-point vector, found {scale.dtype} of shape {tuple(scale.shape)}"
        )
    if not bool((scale.isfinite() & (scale > 0)).all()):
        raise ValueError(f"{name} is damaged: expected positive, finite numbers")


def check_buffer(buffer: Tensor, name: str) -> None:
    """Check a tensor of a basis, `U`, `V`, `scale_in` or `scale_out`, by the end of its name."""
    (check_scale if name.rpartition(".")[2].startswith("scale") else check_side)(buffer, name)


def check_adapter_name(name: str) -> None:
    """Refuse a name that PyTorch's containers cannot hold.

    Raises:
        ValueError: the name is empty or no text, has a dot, or is an attribute of `torch.nn.ModuleDict` or
            `ParameterDict`; or a basis's tensor has it, which PEFT would take for another adapter's when it saves.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"expected a text as the name of an adapter, found {name!r}")
    if name in BASIS_BUFFERS:
        raise ValueError(f"{name!r} cannot be the name of an adapter: a tensor of its bases has this name")
    if "." in name or any(hasattr(container, name) for container in (nn.ModuleDict(), nn.ParameterDict())):
        raise ValueError(
            f"{name!r} cannot be the name of an adapter: PyTorch's ModuleDict and ParameterDict use it for themselves, "
            "or it has a dot. Choose another adapter_name"
        )


def check_whole(weight: Tensor, layer: str) -> None:
    """Raise ValueError if a weight that is to be adapted is already cut into parts, one for each process."""
    if is_sharded(weight):
        raise ValueError(
            f"{layer} is already sharded ({weight.placements}): make the adapter before fully_shard (FSDP2), "  # type: ignore[attr-defined]
            "and load the model without distributed_config or tp_plan"
        )
