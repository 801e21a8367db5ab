"""Weights from a file: checked before anything changes, then made to fit the adapter that they are loaded into.

A file holds a core for each layer, `LAYER.sparsegrad_S`, and each basis once, with the first layer of its group:
`LAYER.sparsegrad_basis.U` and `.V`. Sides that are the identity are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..method.data_free import is_data_free
from .adapters import BASIS, CORE, ROOT, layer_key, layers_of, wrapped_groups
from .bases import empty_basis, set_bases
from .checks import check_core, check_side
from .config import SparseGradConfig
from .layer import SparseGradLayer


@dataclass
class AdapterWeights:
    """The tensors of an adapter's file, by layer."""

    cores: dict[str, Tensor] = field(default_factory=dict)
    "layer -> `S` (r, c)"
    sides: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    "first layer of a group -> `U` (c, in) and `V` (r, out)"

    @classmethod
    def read(cls, tensors: Mapping[str, Tensor]) -> AdapterWeights:
        """Sort the tensors of a file, and check their numbers.

        Raises:
            TypeError, ValueError: a tensor is not floating-point or not finite, or a basis is not orthonormal.
        """
        weights = cls()
        for key, value in tensors.items():
            if BASIS in key:
                layer, _, side = key.removeprefix(ROOT).partition(BASIS)
                check_side(value, key)
                weights.sides[layer][side] = value
            elif key.endswith(CORE):
                check_core(value, key)
                weights.cores[key.removeprefix(ROOT).removesuffix(CORE)] = value
        return weights

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
            for side, rows in (("U", c), ("V", r)):
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
    layers = {layer_key(model, name): layer for name, layer in layers_of(model, adapter_name).items()}
    _check_same_layers(weights.cores, layers)
    if config.original_space and weights.sides:
        raise ValueError(
            f"adapter {adapter_name!r} trains in the original space (original_space=True), the weights come with "
            "bases; make the adapter with original_space=False to load them"
        )
    if config.calibrated or config.original_space:
        groups = _groups_of(config, layers)
    else:
        groups = _replace_data_free(model, config, adapter_name, weights, layers)
    expanded = {}
    for members in groups.values():
        sides = weights.basis_of(members, shared=config.shared)
        for layer in members:
            basis = layers[layer].core_and_basis(adapter_name)[1]
            if {name for name, _ in basis.named_buffers()} & {"U", "V"} != set(sides):
                raise ValueError(_mismatch(adapter_name, config, layer, sides))
            _check_shapes(layer, layers[layer], weights.cores[layer], sides)
        for layer in members:
            basis = layers[layer].core_and_basis(adapter_name)[1]
            for side, value in sides.items():  # not to be rounded to the type that the room was made in
                setattr(basis, side, getattr(basis, side).to(value.dtype))
                expanded[f"{ROOT}{layer}{BASIS}{side}"] = value
    return expanded


def _groups_of(config: SparseGradConfig, layers: Mapping[str, SparseGradLayer]) -> dict[str, list[str]]:
    """Group -> its layers, as the configuration says."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        groups.setdefault((config.core_shapes or {}).get(layer, [layer])[0], []).append(layer)
    return groups


def _replace_data_free(
    model: nn.Module,
    config: SparseGradConfig,
    adapter_name: str,
    weights: AdapterWeights,
    layers: Mapping[str, SparseGradLayer],
) -> dict[str, list[str]]:
    """Give a data-free adapter the groups and sizes of the weights, and return the groups."""
    data_free = all(
        is_data_free(matrix, layers[layer].in_features if side == "U" else layers[layer].out_features)
        for layer, sides in weights.sides.items()
        for side, matrix in sides.items()
    )
    if data_free:
        groups = _groups_of(config, layers)
        if all(weights.cores[key].shape == layer.sparsegrad_S[adapter_name].shape for key, layer in layers.items()):
            return groups  # the room is there
    else:
        named = layers_of(model, adapter_name)
        wrapped = wrapped_groups(model, named, shared=config.shared)
        groups = {g: [layer_key(model, n.removesuffix(".base_layer")) for n in names] for g, names in wrapped.items()}
    bases = {}
    for group, members in groups.items():
        sides, layer = weights.basis_of(members, shared=config.shared), layers[members[0]]
        if not data_free and len(sides) != 2:
            raise ValueError(_mismatch(adapter_name, config, members[0], sides))
        for key in members:
            _check_shapes(key, layers[key], weights.cores[key], sides)
        dtype = next((side.dtype for side in sides.values()), config.dtype_of_bases)
        r, c = weights.cores[members[0]].shape
        bases[group] = empty_basis(r, c, layer.out_features, layer.in_features, dtype, data_free=data_free)
    by_key = {layer_key(model, name): name for name in layers_of(model, adapter_name)}
    wrapped = {group: [f"{by_key[key]}.base_layer" for key in members] for group, members in groups.items()}
    set_bases(model, adapter_name, wrapped, bases, data_free=data_free)
    return groups


def _check_shapes(name: str, layer: SparseGradLayer, core: Tensor, sides: Mapping[str, Tensor]) -> None:
    found = (
        sides["V"].shape[1] if "V" in sides else len(core),
        sides["U"].shape[1] if "U" in sides else core.shape[1],
    )
    if found != (layer.out_features, layer.in_features):
        raise ValueError(
            f"the adapter belongs to another model: {name} has (out, in) = {found} there and "
            f"({layer.out_features}, {layer.in_features}) here"
        )


def _mismatch(adapter_name: str, config: SparseGradConfig, layer: str, sides: Mapping[str, Tensor]) -> str:
    if config.calibrated and not sides:
        return (
            f"adapter {adapter_name!r} is calibrated, the weights are of one that is not, without bases for {layer}. "
            "Load them under another name (load_adapter), or into an adapter that is not calibrated"
        )
    return f"the weights hold {' and '.join(sides) or 'no basis'} for {layer}, the adapter needs both U and V"


def _check_same_layers(cores: Mapping[str, Tensor], layers: Mapping[str, SparseGradLayer]) -> None:
    """Refuse weights with layers that the adapter does not have, or without layers that it has."""
    for what, which in (("has no", set(cores) - set(layers)), ("also has", set(layers) - set(cores))):
        if which:
            one = next((name for name in cores if name in which), min(which))
            shape = f" (its core there: {tuple(cores[one].shape)})" if one in cores else ""
            first = f", such as {next(iter(cores))}" if cores else ""
            raise ValueError(
                f"the adapter belongs to another model, or its file is damaged: it has cores S for {len(cores)} "
                f"layers{first}, and this model with {len(layers)} adapted layers {what} {one}{shape}"
            )
