"""How calibration takes its gradients: `CalibrationConfig`, and the `Trajectory` that it may follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .precision import unit_norm_
from .processes import own_shard
from .sizes import Sizes

_AT_ONCE = 1 << 20
"""Entries that are rounded at a time, which takes 8 bytes for each."""


def sign_step(parameter: Tensor, gradient: Tensor, lr: float) -> None:
    """`p ← p - lr · sign(g)`: Adam's first step, without its state. Overwrites the gradient."""
    _add(parameter, gradient.sign_(), -lr)


def normalized_step(parameter: Tensor, gradient: Tensor, lr: float) -> None:
    """`p ← p - lr · √n · g/‖g‖`: a step along the gradient, as long as that of `sign_step`. Overwrites the gradient."""
    _add(parameter, unit_norm_(gradient), -lr * parameter.numel() ** 0.5)


def _add(parameter: Tensor, direction: Tensor, factor: float) -> None:
    """Add a step to a parameter. In bfloat16 it is rounded up or down at random, so that the mean movement is right.

    Rounded to the nearest number, a step of 1e-4 would leave every weight above 0.03 where it is.
    """
    if parameter.dtype != torch.bfloat16:
        parameter.add_(direction, alpha=factor)
        return
    weight, step = (torch.atleast_1d(own_shard(tensor)) for tensor in (parameter, direction))
    seed = int(weight.view(torch.int16).sum())  # processes with the same weights move alike
    generator = torch.Generator(weight.device).manual_seed(seed)
    rows = max(1, _AT_ONCE * len(weight) // max(1, weight.numel()))
    for part, of_step in zip(weight.split(rows), step.split(rows), strict=True):
        exact = part.float().add_(of_step, alpha=factor)
        below = torch.randint(0, 1 << 16, exact.shape, generator=generator, device=exact.device, dtype=torch.int32)
        bits = exact.view(torch.int32).add_(below).bitwise_and_(-(1 << 16))  # bfloat16 is the upper half of float32
        part.copy_(bits.view(torch.float32))


@dataclass(frozen=True)
class Trajectory:
    """A short training run during calibration, undone afterwards, so that later gradients are seen too.

    Every parameter with `requires_grad` moves, and so do the target weights. The update needs no optimizer state. The
    starting values are kept on the CPU. Several processes move together, by the gradients of the whole batch.
    """

    lr: float = 1e-4
    "constant learning rate, about that of full fine-tuning with Adam"

    update: Callable[[Tensor, Tensor, float], None] = sign_step
    "how a parameter moves: a function of the parameter, its gradient (may be overwritten) and lr"

    def __post_init__(self) -> None:
        if isinstance(self.lr, bool) or not isinstance(self.lr, int | float) or not 0 < self.lr < math.inf:
            raise ValueError(f"Trajectory.lr must be a number above 0 and finite, found {self.lr!r}")


@dataclass(frozen=True)
class CalibrationConfig:
    """How the gradients of the preliminary phase are taken and summed.

    The defaults are those of `calibrate_adapter` and the trainers. `CalibrationConfig.paper()` has the paper's.
    """

    n_steps: int = 30
    "backward passes, on each process (paper: 30; the authors' code: 11)"
    trajectory: Trajectory | None = field(default_factory=Trajectory)
    "a short training run along which the gradients are taken; None takes all of them at the starting point (paper)"
    normalize: bool = True
    "scale each gradient to norm 1 before it is summed, so that all steps and layers weigh the same; paper: False"
    mean_gradient: bool | None = None
    """True makes the bases from products of the gradients of different steps, in which the noise of single batches
    cancels (see `pairs.py`). False makes them from every gradient by itself (paper); an adapter then has no scales.
    None is True if the bases have sizes `narrow` and `wide`, and False if they have `c` and `r`"""
    training: bool | None = True
    "train mode, with dropout (True, paper), eval mode (False), or leave each module as it is (None)"
    gram_device: torch.device | str | None = None
    "where the sums live; None is the device of the layers' weights, or the CPU for weights on Apple's MPS"
    gram_dtype: torch.dtype = torch.float32
    "type of the sums: float32, or float64 for twice the memory"

    def __post_init__(self) -> None:
        if isinstance(self.n_steps, bool) or not isinstance(self.n_steps, int) or self.n_steps < 1:
            raise ValueError(f"n_steps must be an integer of at least 1, found {self.n_steps!r}")
        if self.trajectory is not None and not isinstance(self.trajectory, Trajectory):
            raise ValueError(
                f"trajectory must be None or a Trajectory, such as Trajectory(1e-4); found {self.trajectory!r}"
            )
        for name in ("normalize", "mean_gradient", "training"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "normalize"):
                none = "" if name == "normalize" else " or None"
                raise ValueError(f"{name} must be True or False{none}, found {value!r}")
        if self.gram_dtype not in (torch.float32, torch.float64):
            raise ValueError(f"gram_dtype must be torch.float32 or torch.float64, found {self.gram_dtype}")

    @classmethod
    def paper(cls, **fields: Any) -> CalibrationConfig:
        """The paper's calibration: 30 gradients at the starting point, in train mode. `fields` replace single ones."""
        return replace(cls(trajectory=None, normalize=False, mean_gradient=False), **fields)

    def for_sizes(self, sizes: Sizes | None) -> CalibrationConfig:
        """Return the same with True or False as `mean_gradient`. No sizes stand for `c` and `r`."""
        if self.mean_gradient is not None:
            return self
        return replace(self, mean_gradient=sizes is not None and not sizes.by_side)


PAPER = CalibrationConfig.paper()


def resolve_config(
    config: CalibrationConfig | None, fields: Mapping[str, Any], default: CalibrationConfig = PAPER
) -> CalibrationConfig:
    """Return `config`, or `default` with single fields replaced.

    Raises:
        ValueError: both `config` and single fields are given.
        TypeError: there is no field of that name.
    """
    known = [*CalibrationConfig.__dataclass_fields__]
    if unknown := [name for name in fields if name not in known]:
        near = get_close_matches(unknown[0], known, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise TypeError(f"unknown options {', '.join(unknown)} for calibration; expected {', '.join(known)}{meant}")
    if config is not None and fields:
        raise ValueError(f"pass either config or single fields, found both: config and {', '.join(fields)}")
    return config if config is not None else replace(default, **fields)
