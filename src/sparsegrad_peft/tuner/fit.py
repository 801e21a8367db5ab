"""Whether weights belong to an adapter: its layers, their shapes and sizes, and the form of its bases."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..method.basis import BASIS_BUFFERS
from ..method.sides import is_selected
from ..method.sizes import Sizes
from .adapters import layers_of
from .config import SparseGradConfig
from .layer import SparseGradLayer
from .weights import AdapterWeights


def check_same_layers(weights: AdapterWeights, layers: Mapping[str, SparseGradLayer]) -> None:
    """Refuse weights with layers that the adapter does not have, or without layers that it has."""
    cores = weights.cores
    unknown = {*cores, *weights.sides} - set(layers)
    for what, which in (("has no", unknown), ("also has", set(layers) - set(cores))):
        if which:
            one = next((name for name in cores if name in which), min(which))
            shape = f" (its core there: {tuple(cores[one].shape)})" if one in cores else ""
            first = f", such as {next(iter(cores))}" if cores else ""
            raise ValueError(
                f"the adapter belongs to another model, or its file is damaged: it has cores S for {len(cores)} "
                f"layers{first}, and this model with {len(layers)} adapted layers {what} {one}{shape}"
            )


def check_fit(
    adapter_name: str,
    config: SparseGradConfig,
    name: str,
    layer: SparseGradLayer,
    core: Tensor,
    sides: Mapping[str, Tensor],
    data_free: bool,
) -> None:
    """Refuse weights of a layer that has another shape here, or with bases if the adapter has none, or without."""
    if config.calibrated and not sides:
        raise ValueError(
            f"adapter {adapter_name!r} is calibrated, the weights are of one that is not, without bases for {name}. "
            "Load them under another name (load_adapter), or into an adapter that is not calibrated"
        )
    if not config.original_space and not data_free and not {"U", "V"} <= set(sides):
        raise ValueError(f"the weights hold {' and '.join(sides) or 'no basis'} for {name}, expected both U and V")
    if config.calibrated:
        check_form(name, sides, config.sizes, config.exponent, (layer.out_features, layer.in_features))
    found = (
        _features(sides.get("V"), len(core), layer.out_features),
        _features(sides.get("U"), core.shape[1], layer.in_features),
    )
    if found != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the adapter belongs to another model: {name} has (out, in) = {found} there and "
            f"({layer.out_features}, {layer.in_features}) here"
        )


def check_form(
    name: str, sides: Mapping[str, Tensor], sizes: Sizes, exponent: float | None, shape: tuple[int, int]
) -> None:
    """Refuse a layer's basis that selects other sides than its adapter's config says, or is scaled otherwise.

    Args:
        name: of the layer.
        sides: the tensors of its basis, with `U` and `V`.
        sizes: of the config.
        exponent: of the config.
        shape: (out, in) of the layer.

    Raises:
        ValueError: they do not fit.
    """
    selected = tuple(is_selected(sides[side]) for side in "VU")
    scales = {scale for scale in ("scale_in", "scale_out") if scale in sides}
    if selected != sizes.selected(*shape) or len(scales) != (2 if exponent else 0):
        raise ValueError(
            f"the weights hold {', '.join(sides)} for {name}, of another form than the adapter's config: neurons="
            f"{sizes.neurons}, exponent={exponent}; load them with their own adapter_config.json"
        )


def check_size(adapter_name: str, name: str, layer: SparseGradLayer, core: Tensor) -> None:
    """Refuse a core of another size than that of an adapter which is no longer new."""
    here = tuple(layer.sparsegrad_S[adapter_name].shape)
    if tuple(core.shape) != here:
        raise ValueError(
            f"the weights have a core S of shape {tuple(core.shape)} for {name}, and adapter {adapter_name!r} has "
            f"{here}. Load them under another name (load_adapter), or into an adapter that is not calibrated"
        )


def _features(side: Tensor | None, rows: int, features: int) -> int:
    """The number of features that a side is for; of selected ones, at least the largest index + 1."""
    if side is None:
        return rows
    return max(int(side.max()) + 1, features) if is_selected(side) else side.shape[1]


def mixed_bases(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor], prefix: str) -> str | None:
    """Say which layers share a basis, and have different ones in a state dict of the whole model; None if none do."""
    first: dict[tuple[int, str], tuple[str, Tensor]] = {}
    for name, layer in layers_of(model, adapter_name).items():
        basis = layer.core_and_basis(adapter_name)[1]
        for side in BASIS_BUFFERS:
            value = tensors.get(f"{prefix}{name}.sparsegrad_basis.{adapter_name}.{side}")
            if value is None or value.is_meta:
                continue
            other, known = first.setdefault((id(basis), side), (name, value))
            if known is not value and not torch.equal(known, value):
                return (
                    f"{name} and {other} share a basis in adapter {adapter_name!r}, and the weights hold one for each. "
                    "Load them with PeftModel.from_pretrained, or into an adapter with shared=False"
                )
    return None
