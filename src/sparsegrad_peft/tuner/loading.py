"""Weights from a file: checked before anything changes, then made to fit the adapter that they are loaded into."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from torch import Tensor, nn

from ..method.basis import BASIS_BUFFERS
from ..method.sides import is_selected
from ..method.sizes import DEFAULT_EXPONENT
from .adapters import BASIS, ROOT, config_of, groups_of, layer_key, layers_of
from .bases import empty_basis, set_bases
from .config import SparseGradConfig
from .fit import check_fit, check_same_layers, check_size
from .layer import SparseGradLayer, check_unmerged
from .weights import AdapterWeights

logger = logging.getLogger(__name__)


def make_room(
    model: nn.Module, config: SparseGradConfig, adapter_name: str, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Check that weights belong to an adapter. Give a new adapter bases and cores of the weights' sizes.

    A trainer that resumes needs the latter: it loads a checkpoint into the adapter that the script has just made.

    Args:
        model: the model with the adapter.
        config: of the adapter.
        adapter_name: which adapter.
        tensors: of an adapter's file.

    Returns:
        The tensors of all bases, under the key of every layer that uses them.

    Raises:
        TypeError, ValueError: the weights are damaged, incomplete or of another model; or they are calibrated and the
            adapter cannot be, or the other way round; or the adapter is merged. Nothing has been changed then.
    """
    weights = AdapterWeights.read(tensors)
    if not weights.cores and not weights.sides:  # modules_to_save only
        return {}
    named = layers_of(model, adapter_name)
    layers = {layer_key(model, name): layer for name, layer in named.items()}
    check_same_layers(weights, layers)
    check_unmerged(layers.values(), adapter_name)
    if config.original_space and weights.sides:
        raise ValueError(
            f"adapter {adapter_name!r} trains in the original space (original_space=True), the weights come with "
            "bases; make the adapter with original_space=False to load them"
        )
    is_new = not config.calibrated and not config.original_space
    data_free = is_new and weights.are_data_free(layers)
    groups = _groups(model, config, named, as_calibrated=is_new and not data_free)
    sides = {group: weights.basis_of(members, shared=config.shared) for group, members in groups.items()}
    for group, members in groups.items():
        for layer in members:
            check_fit(adapter_name, config, layer, layers[layer], weights.cores[layer], sides[group], data_free)
            if not is_new:
                check_size(adapter_name, layer, layers[layer], weights.cores[layer])
    same = all(
        weights.cores[layer].shape == layers[layer].sparsegrad_S[adapter_name].shape
        and _kinds(_tensors_of(layers[layer], adapter_name)) == _kinds(sides[group])
        for group, members in groups.items()
        for layer in members
    )
    if is_new and not (data_free and same):
        _warn_of_other_form(adapter_name, config, layers, weights, groups, sides, data_free)
        _replace_bases(model, adapter_name, config, weights, groups, sides, data_free)
    expanded = {}
    for group, members in groups.items():
        for layer in members:
            basis = layers[layer].core_and_basis(adapter_name)[1]
            for side, value in sides[group].items():  # not to be rounded to the type that the room was made in
                setattr(basis, side, getattr(basis, side).to(value.dtype))
                expanded[f"{ROOT}{layer}{BASIS}{side}"] = value
    return expanded


def _groups(
    model: nn.Module, config: SparseGradConfig, layers: Mapping[str, SparseGradLayer], *, as_calibrated: bool
) -> dict[str, list[str]]:
    """Return group -> keys of its layers: as calibration would group them, or as the configuration says."""
    groups: dict[str, list[str]] = {}
    if as_calibrated:
        for group, names in groups_of(model, layers, shared=config.shared).items():
            groups[group] = [layer_key(model, name) for name in names]
    else:
        for key in (layer_key(model, name) for name in layers):
            groups.setdefault((config.core_shapes or {}).get(key, [key])[0], []).append(key)
    return groups


def _replace_bases(
    model: nn.Module,
    adapter_name: str,
    config: SparseGradConfig,
    weights: AdapterWeights,
    groups: Mapping[str, list[str]],
    sides: Mapping[str, Mapping[str, Tensor]],
    data_free: bool,
) -> None:
    """Give a new adapter room for the bases of the weights, and cores of their sizes."""
    named = layers_of(model, adapter_name)
    name_of = {layer_key(model, name): name for name in named}
    bases = {}
    for group, members in groups.items():
        layer, (r, c) = named[name_of[members[0]]], weights.cores[members[0]].shape
        tensors = sides[group]
        matrices = [tensors[side] for side in ("U", "V") if side in tensors and not is_selected(tensors[side])]
        bases[group] = empty_basis(
            r, c, layer.out_features, layer.in_features, matrices[0].dtype if matrices else config.dtype_of_bases,
            data_free=data_free, selected=(is_selected(tensors.get("V")), is_selected(tensors.get("U"))),
            scales="scale_in" in tensors,
        )  # fmt: skip
    names = {group: [name_of[key] for key in members] for group, members in groups.items()}
    set_bases(model, adapter_name, names, bases, data_free=data_free)
    made = config_of(model, adapter_name)  # a copy of the caller's: from here on it says what the weights are
    made.neurons = any(is_selected(side) for basis in bases.values() for side in (basis.U, basis.V))
    is_scaled = any(basis.is_scaled for basis in bases.values())
    if not data_free and is_scaled is not bool(made.exponent):
        made.exponent = DEFAULT_EXPONENT if is_scaled else 0.0


def _warn_of_other_form(
    adapter_name: str,
    config: SparseGradConfig,
    layers: Mapping[str, SparseGradLayer],
    weights: AdapterWeights,
    groups: Mapping[str, list[str]],
    sides: Mapping[str, Mapping[str, Tensor]],
    data_free: bool,
) -> None:
    """Say what a new adapter's configuration asks for and the weights do not have: the weights decide."""
    ignored = {}
    for group, members in groups.items():
        layer, core = layers[members[0]], weights.cores[members[0]]
        neurons, is_scaled = any(map(is_selected, sides[group].values())), "scale_in" in sides[group]
        if neurons is not config.neurons:
            ignored["neurons"] = f"neurons={config.neurons}"
        if not data_free and is_scaled is not bool(config.exponent):
            ignored["exponent"] = f"exponent={config.exponent}"
        counts = config.sizes.counts(layer.out_features, layer.in_features)
        if None not in counts and counts != tuple(core.shape):
            ignored["size"] = f"cores of shape {counts} for {members[0]}, where the weights have {tuple(core.shape)}"
    if ignored:
        logger.warning(
            "adapter %r: the loaded weights have another form than its config. The weights are used. These settings "
            "have no effect: %s", adapter_name, ", ".join(ignored.values()),
        )  # fmt: skip


def _tensors_of(layer: SparseGradLayer, adapter_name: str) -> dict[str, Tensor]:
    basis = layer.core_and_basis(adapter_name)[1]
    return {name: tensor for name in BASIS_BUFFERS if (tensor := getattr(basis, name)) is not None}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Which tensors a basis has -> whether each holds indices."""
    return {name: is_selected(tensor) for name, tensor in tensors.items()}
