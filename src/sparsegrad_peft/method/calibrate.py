"""Step 1: a few steps of backpropagation give the Gram matrices of each group of layers (paper: preliminary phase).

The sums are made as the gradients arrive, layer by layer, so calibration holds the Gram matrices and one gradient: for
BERT-base 90 MB, where the paper's stack of 30 gradients takes 283 MB for one group.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from .basis import Basis
from .config import PAPER, CalibrationConfig, resolve_config
from .experts import check_selects_neurons, expert_layout, fused_parameters, owner_of, target_shape
from .gradients import Step, default_loss, stream_gradients
from .gram import GramStatistics
from .groups import group_linears, tied_weights
from .hosvd import Eigenbasis
from .pairs import PairStatistics
from .processes import broadcast_from_rank0, failing_together, progress_bar
from .projected import ProjectedStatistics
from .sizes import Rows, Sizes, row_count
from .statistics import Statistics, warn_of_completed
from .sum_sizes import SumsOf, projection_widths

logger = logging.getLogger(__name__)


@dataclass
class Calibration:
    """Result of `calibrate`: statistics by group, from which bases of any size are made."""

    groups: dict[str, Statistics]
    config: CalibrationConfig = PAPER
    sizes: Sizes | None = None
    "the largest bases that the sums are good for, see `calibrate`; None: any size"

    @torch.inference_mode(False)  # tensors made in inference mode cannot be saved for backward
    def bases(
        self,
        *,
        c: Rows | None = None,
        r: Rows | None = None,
        sizes: Sizes | None = None,
        exponent: float = 0.0,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ) -> dict[str, Basis]:
        """Make one `Basis` for each group (see `Statistics.basis`), with the same bits on every process.

        This takes two eigendecompositions per group: seconds for BERT-base on a CPU.

        Args:
            c: rows of `U`, the input side, of every group. None: all.
            r: rows of `V`, the output side, of every group. None: all.
            sizes: in place of both, by the shape of each group's layers. None, without `c` and `r`: the sizes that were
                passed to `calibrate`.
            exponent: in the scales of the core, see `Statistics.basis`.
            dtype: of the bases.
            progress: show a progress bar, for bases of every single layer of a large model.
        """
        if sizes is not None and (c, r) != (None, None):
            raise ValueError(f"pass either sizes or c and r, found both: {sizes}, and c={c!r}, r={r!r}")
        if exponent < 0:
            raise ValueError(f"exponent must be at least 0, found {exponent}")
        if (c, r) == (None, None):
            sizes = sizes or self.sizes
        sizes = sizes or Sizes(c="full" if c is None else c, r="full" if r is None else r)
        if exponent and not all(group.knows_common for group in self.groups.values()):
            logger.warning(
                "exponent=%g has no effect: calibration ran with mean_gradient=False, so all scales are 1. Calibrate "
                "with mean_gradient=True, or set exponent=0.", exponent,
            )  # fmt: skip
        bases: dict[str, Basis] = {}
        notes: list[str] = []
        for name, group in progress_bar(list(self.groups.items()), "Making bases" if progress else None):
            selected = sizes.selected(*group.shape)
            with failing_together():
                r, c = _with_directions(sizes, group).check(*group.shape, f"group {name}")
                basis = group.basis(c=c, r=r, selected=selected, exponent=exponent, dtype=dtype, notes=notes)
            bases[name] = basis
            # Machines may differ in the eigensolver, and nearly equal eigenvalues then give other vectors and, for a
            # share of energy, another number of them. So every process takes rank 0's.
            for side, buffer in list(basis.named_buffers()):
                setattr(basis, side, broadcast_from_rank0(buffer))
        warn_of_completed(notes)
        unscaled = [name for name, basis in bases.items() if exponent and _has_only_ones(basis)]
        if unscaled and all(group.knows_common for group in self.groups.values()):
            logger.warning(
                "exponent=%g: in %d of %d groups, such as %s, the gradients have nothing in common above rounding, so "
                "all scales are 1. Take more calibration steps, or set exponent=0.",
                exponent, len(unscaled), len(bases), unscaled[0],
            )  # fmt: skip
        return bases


def sums_device(config: CalibrationConfig, of_weights: torch.device) -> torch.device:
    """Where the sums of layers live: `gram_device`, or where the weights are. Apple's MPS has no eigenvectors."""
    default = torch.device("cpu") if of_weights.type == "mps" else of_weights
    return default if config.gram_device is None else torch.device(config.gram_device)


def _with_directions(sizes: Sizes, group: Statistics) -> Sizes:
    """Return sizes with the number of directions in place of a share of energy, where `wide` follows from it."""
    out, in_ = group.shape
    if sizes.by_side or sizes.wide is not None or row_count(sizes.narrow or 1, min(out, in_)) is not None:
        return sizes
    side = group.decompose(in_ > out, sizes.narrow or 1, False, f"{group}, smaller side")
    assert isinstance(side, Eigenbasis)  # only the larger side selects features
    return replace(sizes, narrow=len(side.vectors))


def _has_only_ones(basis: Basis) -> bool:
    scales = [scale for scale in basis.scales if scale is not None and len(scale) > 1]  # a single scale is always 1
    return bool(scales) and all(bool((scale == 1).all()) for scale in scales)


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    *,
    groups: Mapping[str, Sequence[str]] | None = None,
    sizes: Sizes | None = None,
    step: Step | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    config: CalibrationConfig | None = None,
    progress: bool = True,
    **fields: Any,
) -> Calibration:
    r"""Collect the gradient statistics of each group of layers. The model does not change.

    Peak extra memory is the sums and one layer's gradient (and, with a `Trajectory`, a copy of what moves). Under
    `torch.distributed` every process calls this with its own batches. The gradients are averaged layer by layer as
    they arrive, so N processes find the bases that one process finds on the whole batches, up to rounding.

    Args:
        model: any module, or one sharded by `fully_shard` (FSDP2); unwrap DDP first. Without a `Trajectory`,
            all but the target layers are frozen, as in the paper. With one, whatever requires a gradient moves.
        batches: inputs of `loss_fn`, iterated again from the start when they run out.
        groups: group name -> names of linear layers, from `group_linears`, or of fused experts' parameters. None takes
            every linear layer of the model whose weight is its own.
        sizes: the largest bases that will be asked for. With them calibration needs less memory: a selected side takes
            one number for each feature, and with `mean_gradient` the sums of large models are projected (see
            `projected.py`).
        step: in place of `batches`: a function without arguments that returns the loss of its next batch.
        loss_fn: (model, batch) -> scalar loss. Default: `model(**batch).loss`.
        config: how to calibrate. None: as in the paper.
        progress: show a progress bar.
        fields: in place of `config`, single fields of it, such as `n_steps=60`. The others are the paper's.

    Returns:
        A `Calibration`; `.bases()` makes the bases, of `sizes` or complete, and `.bases(c=..., r=...)` of other sizes.

    Raises:
        ValueError: the layers of a group differ in shape, a layer is named twice or shares its weight, or whatever
            `stream_gradients` refuses.
        RuntimeError: not all processes of the group call this.

    Example:
        >>> groups = group_linears(model, r".*layer\.\d+\.(intermediate|output)\.dense")
        >>> bases = calibrate(model, loader, groups=groups, n_steps=30).bases(c=0.25, r=0.25)
    """
    config = resolve_config(config, fields).for_sizes(sizes)
    statistics = _empty_statistics(model, group_linears(model) if groups is None else groups, sizes, config)
    group_of: dict[str, Statistics] = {}
    for group in statistics.values():
        for layer in group.layers:
            if layer in group_of:
                raise ValueError(f"{layer} is named twice, in groups {group_of[layer].name!r} and {group.name!r}")
            group_of[layer] = group
    _refuse_tied(model, group_of)

    stream_gradients(
        model, group_of, lambda layer, G: group_of[layer].add(G, layer, normalize=config.normalize), batches, step=step,
        loss_fn=loss_fn, config=config, progress="Calibrating" if progress else None,
    )  # fmt: skip
    return Calibration(statistics, config, sizes)


def _refuse_tied(model: nn.Module, names: Iterable[str]) -> None:
    """Raise `ValueError` for a layer whose weight is also another module's."""
    tied = tied_weights(model)
    for name in names:
        owner, parameter = owner_of(model, name)
        if owners := tied.get(id(getattr(owner, parameter or "weight", None))):
            raise ValueError(
                f"{' and '.join(owners)} share one weight tensor. Its gradient is the sum over all of them, and bases "
                f"for {name} alone would be made of it; leave {name} out"
            )


@torch.inference_mode(False)  # tensors made in inference mode cannot be written to outside it
def _empty_statistics(
    model: nn.Module, groups: Mapping[str, Sequence[str]], sizes: Sizes | None, config: CalibrationConfig
) -> dict[str, Statistics]:
    """Allocate the sums of each group."""
    known = {*dict(model.named_modules()), *fused_parameters(model)}
    shapes: dict[str, tuple[int, int]] = {}
    for name, layers in groups.items():
        unknown = [layer for layer in layers if layer not in known]
        if unknown:
            raise ValueError(f"group {name!r}: the model has no modules named {', '.join(unknown)}")
        found = {layer: target_shape(model, layer) for layer in layers}
        if len(set(found.values())) != 1:
            raise ValueError(f"group {name!r}: the layers of a group share a shape, found (out, in) = {found}")
        shapes[name] = found[layers[0]]
        if sizes is not None:
            sizes.check(*shapes[name], f"group {name}")
    sums = {name: SumsOf(len(layers), *shapes[name], sizes) for name, layers in groups.items()}
    widths = projection_widths(sums) if config.mean_gradient else {}
    statistics: dict[str, Statistics] = {}
    vectors: dict[tuple[int, int, torch.device], Tensor] = {}  # sides of one size use the same
    for name, layers in groups.items():
        owner, parameter = owner_of(model, layers[0])
        if parameter is not None:
            check_selects_neurons(expert_layout(owner, parameter), sizes or Sizes(), layers[0])
        device = sums_device(config, getattr(owner, parameter or "weight").device)
        what = name, tuple(layers), *shapes[name]
        where: dict[str, Any] = {"dtype": config.gram_dtype, "device": device}
        if name in widths:
            statistics[name] = ProjectedStatistics.empty(*what, widths[name], vectors, **where)
        else:
            kind = PairStatistics if config.mean_gradient else GramStatistics
            selected = (False, False) if sizes is None else sizes.selected(*shapes[name])
            statistics[name] = kind.empty(*what, selected, **where)
    return statistics
