"""Weights from a file: checked before anything changes, then made to fit the adapter that they are loaded into.

A file holds a core for each layer, `LAYER.sparsegrad_S`, and each basis once, with the first layer of its group:
`LAYER.sparsegrad_basis.U`, `.V`, `.scale_in` and `.scale_out`. What is None in a `Basis` is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..method.basis import BASIS_BUFFERS
from ..method.data_free import is_data_free
from ..method.sides import is_selected
from .adapters import BASIS, CORE, ROOT, config_of, groups_of, layer_key, layers_of
from .bases import empty_basis, set_bases
from .checks import check_buffer, check_core
from .config import SparseGradConfig
from .layer import SparseGradLayer


@dataclass
class AdapterWeights:
    """The tensors of an adapter's file, by layer."""

    cores: dict[str, Tensor] = field(default_factory=dict)
    "layer -> `S` (r, c)"
    sides: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    "first layer of a group -> the tensors of its basis, by name: `U`, `V`, `scale_in`, `scale_out`"

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> AdapterWeights:
        """Sort the tensors of a file, and check their numbers.

        Raises:
            TypeError, ValueError: a tensor has another type, is not finite, or a basis is not orthonormal.
        """
        weights = cls()
        for key, value in tensors.items():
            if BASIS in key:
                layer, _, side = key.removeprefix(ROOT).partition(BASIS)
                check_buffer(value, key)
                weights.sides[layer][side] = value
            elif key.endswith(CORE):
                check_core(value, key)
                weights.cores[key.removeprefix(ROOT).removesuffix(CORE)] = value
        return weights

    def are_data_free(self, layers: Mapping[str, SparseGradLayer]) -> bool:
        """True if all bases are data-free, or there are none."""
        return all(
            side in ("U", "V")  # scales come from calibration
            and is_data_free(matrix, layers[layer].in_features if side == "U" else layers[layer].out_features)
            for layer, sides in self.sides.items()
            for side, matrix in sides.items()
        )

    def basis_of(self, members: list[str], *, shared: bool) -> dict[str, Tensor]:
        """Return the sides of the one basis that belongs to a group of layers; none if the weights have no bases.

        Raises:
            ValueError: the weights share their bases otherwise than the adapter, or a shape does not fit the cores.
        """
        holders = [self.sides[layer] for layer in members if layer in self.sides]
        if len(holders) > 1 or (self.sides and not holders):
            raise ValueError(
                f"the weights hold {len(holders) or 'no'} bases for the layers {', '.join(members[:3])}, and the "
                f"adapter has shared={shared}: make it with shared={not shared} to load them"
            )
        found = holders[0] if holders else {}
        for layer in members:
            r, c = self.cores[layer].shape
            for side, rows in (("U", c), ("V", r), ("scale_in", c), ("scale_out", r)):
                if side in found and len(found[side]) != rows:
                    raise ValueError(
                        f"{layer}: its core has shape {(r, c)}, and {side} has {len(found[side])} rows; the tensors of "
                        "the file do not belong together"
                    )
        return found


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
            adapter cannot be, or the other way round. Nothing has been changed then.
    """
    weights = AdapterWeights.read(tensors)
    if not weights.cores and not weights.sides:  # modules_to_save only
        return {}
    named = layers_of(model, adapter_name)
    layers = {layer_key(model, name): layer for name, layer in named.items()}
    _check_same_layers(weights, layers)
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
            _check_fit(adapter_name, config, layer, layers[layer], weights.cores[layer], sides[group], data_free)
    same = all(
        weights.cores[layer].shape == layers[layer].sparsegrad_S[adapter_name].shape
        and _kinds(_tensors_of(layers[layer], adapter_name)) == _kinds(sides[group])
        for group, members in groups.items()
        for layer in members
    )
    if is_new and not (data_free and same):
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
    if not data_free and not any(basis.is_scaled for basis in bases.values()):
        made.exponent = 0.0


def _check_fit(
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
        expected = dict(zip("VU", config.sizes.selected(layer.out_features, layer.in_features), strict=True))
        found_kinds = {side: is_selected(sides[side]) for side in expected}
        if found_kinds != expected or ("scale_in" in sides) is not bool(config.exponent):
            raise ValueError(
                f"the weights hold {', '.join(sides)} for {name}, of another form than the adapter's config: neurons="
                f"{config.neurons}, exponent={config.exponent}; load them with their own adapter_config.json"
            )
    found = (
        _features(sides.get("V"), len(core), layer.out_features),
        _features(sides.get("U"), core.shape[1], layer.in_features),
    )
    if found != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the adapter belongs to another model: {name} has (out, in) = {found} there and "
            f"({layer.out_features}, {layer.in_features}) here"
        )


def _features(side: Tensor | None, rows: int, features: int) -> int:
    """The number of features that a side is for; of selected ones, at least the largest index + 1."""
    if side is None:
        return rows
    return max(int(side.max()) + 1, features) if is_selected(side) else side.shape[1]


def _tensors_of(layer: SparseGradLayer, adapter_name: str) -> dict[str, Tensor]:
    basis = layer.core_and_basis(adapter_name)[1]
    return {name: tensor for name in BASIS_BUFFERS if (tensor := getattr(basis, name)) is not None}


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, bool]:
    """Which tensors a basis has -> whether each holds indices."""
    return {name: is_selected(tensor) for name, tensor in tensors.items()}


def _check_same_layers(weights: AdapterWeights, layers: Mapping[str, SparseGradLayer]) -> None:
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
