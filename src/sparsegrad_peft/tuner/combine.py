"""The weighted sum of adapters as a new one.

    linear   Σ wᵢ Vᵀ Sᵢ U = Vᵀ (Σ wᵢ Sᵢ) U                   for adapters with the same bases: as large as one of them
    cat      Σ wᵢ Vᵢᵀ Sᵢ Uᵢ = Yᵀ (Σ wᵢ Rᵢᵀ Sᵢ Tᵢ) X          for any bases: of n adapters, a core has up to n² times as
                                                             many entries

`X` and `Y` hold the rows of all `Uᵢ` and of all `Vᵢ`: `Uᵢ = Tᵢ X`, `Vᵢ = Rᵢ Y`. Directions are made orthonormal (QR).
Of selected features, it is the union.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..method.basis import BASIS_BUFFERS, Basis
from ..method.precision import at_least_float32
from ..method.sides import Side, as_matrix, is_selected, kept_count, put, scaled
from .adapters import layer_key, layers_of
from .checks import check_adapter_name
from .config import SparseGradConfig
from .experts import SparseGradExperts
from .layer import SparseGradLayer

_REMEDY = (
    'combination_type="linear" needs adapters with the same bases (one calibration for both: calibrate_adapter(..., '
    'calibration=...)). combination_type="cat" takes adapters of the same layers with any bases, and makes larger cores'
)


@dataclass(frozen=True)
class _Joined:
    """The basis of a group in the new adapter, and the factors that take the old cores into it."""

    basis: Basis
    left: list[Tensor]
    "`Rᵢ` (rᵢ, r) of each adapter, or the places (rᵢ,) of its features among those of all"
    right: list[Tensor]
    "`Tᵢ` (cᵢ, c) of each adapter, or places (cᵢ,)"


@torch.no_grad()
def add_weighted_sum(
    tuner: BaseTuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *, joined: bool
) -> None:
    """Add the weighted sum of adapters; see `SparseGradModel.add_weighted_adapter`. `joined` is its "cat"."""
    check_adapter_name(adapter_name)
    if adapter_name in tuner.peft_config:
        raise ValueError(f"the model already has an adapter named {adapter_name!r}; choose another adapter_name")
    _check_weights(adapters, weights)
    unknown = [name for name in adapters if name not in tuner.peft_config]
    if unknown:
        raise ValueError(f"no adapter named {', '.join(unknown)}; there are {', '.join(tuner.peft_config)}")
    layers = layers_of(tuner, adapters[0])
    _check_layers(tuner, adapters, layers, joined)
    _check_nothing_else(tuner, adapters)

    config = deepcopy(tuner.peft_config[adapters[0]])
    assert isinstance(config, SparseGradConfig)
    config.init_weights = True
    sums = _join(tuner, adapters, weights, layers, config) if joined else _add(adapters, weights, layers)
    too_large = [name for name, (_, core) in sums.items() if not core.isfinite().all()]
    if too_large:
        raise ValueError(f"the sum with weights {weights!r} is not finite in {too_large[0]}; expected smaller weights")
    tuner.peft_config[adapter_name] = config
    try:
        tuner.inject_adapter(tuner.model, adapter_name)
    except Exception:
        del tuner.peft_config[adapter_name]
        raise
    for name, (basis, core) in sums.items():
        layer = layers[name]
        layer.sparsegrad_basis[adapter_name] = basis
        layer.sparsegrad_S[adapter_name] = nn.Parameter(core, requires_grad=False)  # not active yet
        layer.sparsegrad_checked[adapter_name] = True


def _check_weights(adapters: Any, weights: Any) -> None:
    try:
        fit = len(adapters) == len(weights) > 0 and all(math.isfinite(weight) for weight in weights)
    except (TypeError, OverflowError):  # no lists, no numbers, or an integer that is no float
        fit = False
    if not fit:
        raise ValueError(f"expected adapters and as many finite weights, found {adapters!r} and {weights!r}")


def _check_layers(tuner: BaseTuner, adapters: Sequence[str], first: dict[str, SparseGradLayer], joined: bool) -> None:
    for name in adapters:
        different = set(first) ^ set(layers_of(tuner, name))
        if different:
            raise ValueError(
                f"{adapters[0]!r} and {name!r} adapt different layers, such as {min(different)}; merge one after the "
                "other into the model"
            )
    for layer_name, layer in first.items():
        for name in adapters:
            layer.check_numbers(name)
            if joined and isinstance(layer, SparseGradExperts):
                raise ValueError(
                    f'{name!r} adapts fused experts ({layer_name}), which combination_type="cat" cannot join; merge '
                    "the adapters into the model one after the other"
                )
            mine, theirs = layer.core_and_basis(adapters[0])[1], layer.core_and_basis(name)[1]
            if not joined and not _same(mine, theirs):
                raise ValueError(f"{adapters[0]!r} and {name!r} have different bases in {layer_name}. {_REMEDY}")
            if joined and (theirs.U is None or theirs.V is None):
                raise ValueError(f"{name!r} has no bases, its cores are as large as the layers. {_REMEDY}")


def _same(one: Basis, other: Basis) -> bool:
    """True if two bases hold the same numbers."""
    pairs = [(getattr(one, name), getattr(other, name)) for name in BASIS_BUFFERS]
    return one is other or all(
        a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b) for a, b in pairs
    )


def _add(
    adapters: Sequence[str], weights: Sequence[float], layers: dict[str, SparseGradLayer]
) -> dict[str, tuple[Basis, Tensor]]:
    """Return layer -> copy of the basis, and the sum of the cores."""
    copy_of = cache(deepcopy)  # loading weights into one adapter must not change another
    sums = {}
    for name, layer in layers.items():
        basis = layer.core_and_basis(adapters[0])[1]
        parts = [weight * layer.core_and_basis(a)[0] for a, weight in zip(adapters, weights, strict=True)]
        sums[name] = copy_of(basis), torch.stack(parts).sum(0)
    return sums


def _join(
    tuner: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    layers: dict[str, SparseGradLayer],
    config: SparseGradConfig,
) -> dict[str, tuple[Basis, Tensor]]:
    """Return layer -> basis of all rows, and the sum of the cores in it. Writes the sizes into `config`."""
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    found: dict[tuple[int, ...], _Joined] = {}
    sums = {}
    config.core_shapes, config.data_free = {}, False
    config.neurons, config.exponent = all(c.neurons for c in configs), 0.0  # the joined bases have no scales
    dtype = at_least_float32(next(iter(layers.values())).core_and_basis(adapters[0])[0].dtype)
    for name, layer in layers.items():
        pairs = [layer.core_and_basis(adapter) for adapter in adapters]
        key = tuple(id(basis) for _, basis in pairs)
        if key not in found:
            found[key] = _joined([basis for _, basis in pairs], dtype)
        group = found[key]
        parts = [
            weight * _put(scaled(S.double(), basis.scales), R, T, group.basis)
            for weight, R, (S, basis), T in zip(weights, group.left, pairs, group.right, strict=True)
        ]
        core = torch.stack(parts).sum(0).to(pairs[0][0].dtype)
        sums[name] = group.basis, core
        in_model = layer_key(tuner, name)
        whole = " + ".join(dict.fromkeys(str(c.core_shapes[in_model][0]) for c in configs))
        config.core_shapes[in_model] = [whole, *core.shape, *layer.size_entry()]
    config.shared = all(c.shared for c in configs)
    config.basis_dtype = str(dtype).removeprefix("torch.")
    return sums


def _put(S: Tensor, R: Tensor, T: Tensor, basis: Basis) -> Tensor:
    """`Rᵀ S T`: a core (rᵢ, cᵢ) in the joined basis, (r, c)."""
    r, c = kept_count(basis.V, 0), kept_count(basis.U, 0)
    return put(put(S, T, c).T, R, r).T


def _joined(bases: Sequence[Basis], dtype: torch.dtype) -> _Joined:
    first = bases[0]
    assert first.in_features is not None
    assert first.out_features is not None
    U, right = _rows([basis.U for basis in bases], first.in_features, dtype)
    V, left = _rows([basis.V for basis in bases], first.out_features, dtype)
    basis = Basis(U, V, in_features=first.in_features, out_features=first.out_features, layers=first.layers)
    return _Joined(basis, left, right)


def _rows(sides: Sequence[Side], features: int, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Return the rows of all sides, an orthonormal basis (m, n) or features (m,), and each side in them."""
    selected = [side for side in sides if is_selected(side)]
    if len(selected) == len(sides):
        union = torch.cat(selected).unique()
        return union, [torch.searchsorted(union, side).int() for side in selected]
    rows = [as_matrix(side, features, torch.float64) for side in sides]
    X, T = torch.linalg.qr(torch.cat(rows).T)  # (n, m), (m, rows of all)
    return X.T.to(dtype).contiguous(), list(T.T.split([len(side) for side in rows]))


def _check_nothing_else(tuner: BaseTuner, adapters: Sequence[str]) -> None:
    for name in adapters:
        config = tuner.peft_config[name]
        if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
            wrapped = [key for key, module in tuner.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
            raise ValueError(
                f"{name!r} holds modules that are trained whole ({', '.join(wrapped)}) and cannot be summed. Make the "
                "adapters without modules_to_save, trainable_token_indices and task_type, or merge one after the other"
            )
