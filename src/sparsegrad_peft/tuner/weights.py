"""The tensors of an adapter's file, sorted by layer, with their numbers checked.

A file holds a core for each layer, `LAYER.sparsegrad_S`, and each basis once, with the first layer of its group:
`LAYER.sparsegrad_basis.U`, `.V`, `.scale_in` and `.scale_out`. What is None in a `Basis` is left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ..method.data_free import is_data_free
from .adapters import BASIS, CORE, ROOT
from .checks import check_buffer, check_core, check_finite
from .config import uncompiled_name
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
        for key, value in ((uncompiled_name(key), value) for key, value in tensors.items()):
            if BASIS in key:
                layer, _, side = key.removeprefix(ROOT).partition(BASIS)
                check_buffer(value, key)
                weights.sides[layer][side] = value
            elif key.endswith(CORE):
                check_core(value, key)
                weights.cores[key.removeprefix(ROOT).removesuffix(CORE)] = value
            else:
                check_finite(value, key)
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
