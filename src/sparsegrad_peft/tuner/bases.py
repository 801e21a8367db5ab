"""Which layers of an adapter share a basis, and how the bases are put in their place."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from copy import copy
from functools import cache

import torch
from torch import nn

from ..method.basis import Basis
from ..method.sides import is_selected
from ..method.sizes import Sizes
from .adapters import configs_of, holder_of, layer_key, layers_of
from .config import SparseGradConfig

logger = logging.getLogger(__name__)


def data_free_sizes(config: SparseGradConfig, out_features: int, in_features: int, layer: str) -> tuple[int, int]:
    """Return (r, c) of a new adapter's core; shares of energy, which are not known yet, become the default sizes.

    Raises:
        ValueError: more rows were asked for than the layer has.
    """
    config.sizes.check(out_features, in_features, f"layer {layer}")
    r, c = config.sizes.counts(out_features, in_features)
    defaults = Sizes(narrow=None, wide=None, neurons=config.sizes.neurons)
    default_r, default_c = defaults.counts(out_features, in_features)
    return r or default_r or 1, c or default_c or 1


def empty_basis(
    r: int,
    c: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    *,
    data_free: bool,
    selected: tuple[bool, bool] = (False, False),
    scales: bool = False,
) -> Basis:
    """Return room for a basis from a file, which `check_numbers` refuses until it is loaded.

    A complete data-free side is the identity. `selected` is True for a side (output, input) that selects features.
    """
    basis = Basis.allocate(
        r=r, c=c, out_features=out_features, in_features=in_features, dtype=dtype, selected=selected, scales=scales
    )
    if data_free:
        basis.U, basis.V = (None if c == in_features else basis.U), (None if r == out_features else basis.V)
    for side in basis.buffers():
        side.fill_(-1 if is_selected(side) else torch.nan)
    return basis


def set_bases(
    model: nn.Module,
    adapter_name: str,
    groups: Mapping[str, list[str]],
    bases: Mapping[str, Basis],
    *,
    data_free: bool = False,
) -> None:
    """Give the layers of each group (see `groups_of`) its basis, and write the shapes into the configurations.

    The cores are set to zero and stay the same parameters. Layers of a group on several devices (`device_map`) get one
    copy of the basis for each device.
    """
    layers, shapes = layers_of(model, adapter_name), {}
    for part, old in configs_of(model, adapter_name).items():
        config = copy(old)
        config.core_shapes, config.data_free = {}, data_free
        model.get_submodule(part).peft_config[adapter_name] = config  # type: ignore[index,operator]
        shapes[part] = config.core_shapes
    on_device = cache(Basis.on_device)
    for group, names in groups.items():
        for name in names:
            layer = layers[name]
            layer.set_basis(adapter_name, on_device(bases[group], layer.device_of(adapter_name)))
            layer.sparsegrad_status[adapter_name].data_free = data_free
            r, c = layer.sparsegrad_S[adapter_name].shape
            holder = holder_of(model, name)
            assert holder is not None
            shapes[holder][layer_key(model, name)] = [group, r, c, *layer.size_entry()]


def warn_of_few_entries(config: SparseGradConfig) -> None:
    """Log a warning if an adapter's `narrow` is too small for its `trained_share`, even with all neurons.

    Before calibration, the directions of a share of energy are not known yet.
    """
    entries = [shape for shape in (config.core_shapes or {}).values() if len(shape) == 5]
    unknown = config.data_free and isinstance(config.narrow, str) and config.narrow != "full"
    if config.wide is not None or config.narrow is None or config.c is not None or unknown or not entries:
        return
    trained = sum(r * c for _, r, c, *_ in entries) / sum(out * in_ for *_, out, in_ in entries)
    if trained < 0.95 * config.trained_share:
        logger.warning(
            "narrow=%s trains %.2g of the layers' entries at most, less than trained_share=%g; raise narrow, or leave "
            "it out", config.narrow, trained, config.trained_share,
        )  # fmt: skip
