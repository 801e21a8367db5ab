"""Step 1: a few steps of backpropagation -> the two Gram matrices of each group (paper: preliminary phase).

    G of a layer ──► gram_in  += GᵀG   (in, in)     eigenvectors: U
                 └─► gram_out += GGᵀ   (out, out)   eigenvectors: V

The sums are made as the gradients arrive, layer by layer, so calibration holds the Gram matrices and one gradient and
nothing else: 90 MB for BERT-base, where the paper's stack of 30 gradients takes 276 MB for one group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .basis import Basis, warn_of_completed
from .gradients import Step, Trajectory, default_loss, stream_gradients
from .groups import group_linears, linear_shape
from .linear import autocast_kind
from .processes import shown, sum_over_processes, taken_from_first
from .sizes import Rows, Sizes
from .sketch import random_vectors, sketch_width


@dataclass
class GramStatistics:
    """What calibration knows of one group of layers."""

    name: str
    "group name, see `group_linears`"
    layers: tuple[str, ...]
    "the layers whose gradients are in the sums"
    gram_in: Tensor
    "`Σ GᵀG`, (in, in); with `probe_in`, its product with that (in, width)"
    gram_out: Tensor
    "`Σ GGᵀ`, (out, out); with `probe_out`, its product with that (out, width)"
    n_gradients: int = 0
    "number of gradients summed, over layers, steps and processes"
    probe_in: Tensor | None = None
    "the random vectors of the input side, where a few leading directions are all that is wanted (see `sketch`)"
    probe_out: Tensor | None = None
    "the same of the output side"
    energy: float = 0.0
    "`Σ ‖G‖²`, where there are such vectors; the trace of whole Gram matrices is the same"

    @torch.no_grad()
    def add(self, G: Tensor, *, normalize: bool = False) -> None:
        """Add one gradient (out, in); with `normalize`, scaled to Frobenius norm 1 (a zero gradient adds nothing)."""
        given, G = G, G.to(self.gram_in.device, self.gram_in.dtype)
        if normalize:
            norm = float(G.norm()) or 1.0
            # Before the products, where the square of a tiny norm would underflow; in place if G is a copy already.
            G = G / norm if G is given else G.div_(norm)
        # A caller's autocast would round the products to its type.
        with torch.autocast(autocast_kind(G.device), enabled=False):
            self.gram_in.addmm_(G.T, G if self.probe_in is None else G @ self.probe_in)
            self.gram_out.addmm_(G, G.T if self.probe_out is None else G.T @ self.probe_out)
        if self.probe_in is not None or self.probe_out is not None:
            self.energy += float(G.square().sum())
        self.n_gradients += 1


@dataclass(frozen=True)
class CalibrationConfig:
    """How the gradients of the preliminary phase are taken."""

    n_steps: int = 30
    "backward passes (paper: 30; the authors' code: 11)"
    trajectory: Trajectory | None = None
    "None: all gradients at the starting point (paper); else along a short training run, undone afterwards"
    normalize: bool = False
    "scale each gradient to norm 1 before it is summed, so that early steps and last layers do not outweigh the others"
    training: bool | None = True
    "train mode, with dropout (True, paper), eval mode (False), or as the model is (None)"
    gram_device: torch.device | str | None = None
    "where the Gram matrices live; None: beside the layers' weights"
    gram_dtype: torch.dtype = torch.float32
    "type of the sums: float32, or float64 at twice the memory"

    def __post_init__(self) -> None:
        if self.gram_dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gram_dtype must be torch.float32 or torch.float64, found {self.gram_dtype}")


@dataclass
class Calibration:
    """Result of `calibrate`: statistics by group, from which bases of any size are made."""

    groups: dict[str, GramStatistics]
    config: CalibrationConfig = field(default_factory=CalibrationConfig)

    @torch.inference_mode(False)  # bases made under it could not be saved for backward
    def bases(
        self,
        *,
        c: Rows = "full",
        r: Rows = "full",
        sizes: Sizes | None = None,
        dtype: torch.dtype = torch.float32,
        progress: bool = False,
    ) -> dict[str, Basis]:
        """One `Basis` for each group (see `Basis.from_gram`); equal to the bit on every process.

        A pair of eigendecompositions a group: seconds for BERT-base on a CPU.

        Args:
            c: rows of `U`, the input side, of every group.
            r: rows of `V`, the output side, of every group.
            sizes: in place of both, by the shape of each group's layers.
            dtype: of the bases.
            progress: show a progress bar; with bases of each layer it is minutes for models of billions of parameters.
        """
        sizes = sizes or Sizes(c=c, r=r)
        found: dict[str, Basis] = {}
        completed: list[str] = []
        for name, gram in shown(list(self.groups.items()), "Making bases" if progress else None):
            out_features, in_features = len(gram.gram_out), len(gram.gram_in)
            r, c = sizes.check(out_features, in_features, f"group {name}")
            found[name] = _agreed(gram, c, r, dtype, completed)
        warn_of_completed(completed)
        return found


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
    **options: Any,
) -> Calibration:
    r"""Gram matrices of the gradients of each group of layers; the model is left exactly as it was.

    Peak extra memory is the Gram matrices and one layer's gradient (and, with a `Trajectory`, a copy of what walks).
    Under `torch.distributed`, each process passes its own batches; the sums are all-reduced, so that every process
    returns the same bits.

    Args:
        model: any module; unwrap DDP and FSDP first. Everything but the target layers is frozen meanwhile.
        batches: what `loss_fn` takes; started anew when they run out, if they can be.
        groups: group name -> layer names, from `group_linears`; None takes every linear layer of the model.
        sizes: rows that bases will be asked for, at most. Of a large side of which few are wanted, the sums are then
            kept as a sketch, a small part of the Gram matrix's size and work (see `sketch`). None: whole Gram matrices,
            for bases of any size.
        step: in place of `batches`: a function without arguments that returns the loss of its next batch.
        loss_fn: (model, batch) -> scalar loss. Default: `model(**batch).loss`.
        config: how to calibrate.
        progress: show a progress bar.
        options: in place of `config`: single fields of it, such as `n_steps=60`.

    Returns:
        A `Calibration`; `.bases(c=..., r=...)` turns it into bases.

    Raises:
        ValueError: the layers of a group differ in shape, a layer is named twice, and whatever `stream_gradients`
            refuses.

    Example:
        >>> groups = group_linears(model, r".*layer\.\d+\.(intermediate|output)\.dense")
        >>> bases = calibrate(model, loader, groups=groups, n_steps=30).bases(c=0.25, r=0.25)
    """
    config = _merge(config, options)
    groups = groups if groups is not None else group_linears(model)
    probes: dict[tuple[Any, ...], Tensor] = {}  # the same random vectors for all sides of a size
    statistics = {name: _empty(model, name, layers, sizes, config, probes) for name, layers in groups.items()}
    group_of: dict[str, GramStatistics] = {}
    for gram in statistics.values():
        for layer in gram.layers:
            if layer in group_of:
                raise ValueError(f"{layer} is named twice, in groups {group_of[layer].name!r} and {gram.name!r}")
            group_of[layer] = gram

    stream_gradients(
        model,
        group_of,
        lambda layer, G: group_of[layer].add(G, normalize=config.normalize),
        batches,
        step=step,
        loss_fn=loss_fn,
        n_steps=config.n_steps,
        training=config.training,
        trajectory=config.trajectory,
        progress="Calibrating" if progress else None,
    )
    for gram in statistics.values():
        _sum_over_processes(gram)
    return Calibration(statistics, config)


def _merge(config: CalibrationConfig | None, options: dict[str, Any]) -> CalibrationConfig:
    if config is not None and options:
        raise ValueError(f"pass either config or single fields, found both: config and {', '.join(options)}")
    return config if config is not None else CalibrationConfig(**options)


def _empty(
    model: nn.Module,
    name: str,
    layers: Sequence[str],
    sizes: Sizes | None,
    config: CalibrationConfig,
    probes: dict[tuple[Any, ...], Tensor],
) -> GramStatistics:
    modules = dict(model.named_modules())
    unknown = [layer for layer in layers if layer not in modules]
    if unknown:
        raise ValueError(f"group {name!r}: the model has no modules named {', '.join(unknown)}")
    shapes = {layer: linear_shape(modules[layer], layer) for layer in layers}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"group {name!r}: the layers of a group share a shape, found (out, in) = {shapes}")
    out_features, in_features = next(iter(shapes.values()))
    r, c = sizes.check(out_features, in_features, f"group {name}") if sizes is not None else ("full", "full")
    device = torch.device(config.gram_device or modules[layers[0]].weight.device)

    def room(n: int, rows: Rows) -> tuple[Tensor, Tensor | None]:
        width = sketch_width(rows, n)
        room = torch.zeros(n, n if width is None else width, dtype=config.gram_dtype, device=device)
        if width is None:
            return room, None
        key = (n, width, device)
        if key not in probes:
            probes[key] = random_vectors(n, width, room)
        return room, probes[key]

    with torch.inference_mode(False):  # tensors made in a caller's inference mode could not be added to
        (gram_in, probe_in), (gram_out, probe_out) = room(in_features, c), room(out_features, r)
    return GramStatistics(name, tuple(layers), gram_in, gram_out, probe_in=probe_in, probe_out=probe_out)


def _agreed(gram: GramStatistics, c: Rows, r: Rows, dtype: torch.dtype, completed: list[str]) -> Basis:
    """The group's basis, equal to the bit on every process.

    The Gram matrices agree, but machines may differ in the eigensolver, and nearly equal eigenvalues then give other
    vectors and, for a share of energy, another number of them. So the first process's are taken, numbers included.
    """
    basis = Basis.from_gram(gram, c=c, r=r, dtype=dtype, completed=completed)
    for name, buffer in list(basis.named_buffers()):
        setattr(basis, name, taken_from_first(buffer))
    return basis


def _sum_over_processes(gram: GramStatistics) -> None:
    count, energy = torch.tensor(gram.n_gradients), torch.tensor(gram.energy, dtype=torch.float64)
    for tensor in (gram.gram_in, gram.gram_out, count, energy):
        sum_over_processes(tensor)
    gram.n_gradients, gram.energy = int(count), float(energy)
