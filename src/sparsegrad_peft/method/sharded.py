"""Select the largest entries of parameters that are spread over processes, as one process would select them.

FSDP2 gives each process some rows of a parameter. The k-th largest magnitude of all rows is found digit by digit: each
process counts its candidates by the next byte of their bit patterns, the counts are summed over the processes, and the
byte in which the k-th largest lies becomes the next digit. That takes 4 sums of 256 integers for float32, and 8 for
float64, whatever the number of processes; all parameters share them. Of equal magnitudes the first in row-major order
are taken, which needs each process's number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as dist

from .processes import own_shard
from .selection import largest_positions
from .sparse_adam import sparse_adam_update

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_DIGIT = 8  # bits


def check_row_sharded(parameter: Any) -> None:
    """Raise unless a sharded parameter is cut into rows along at most one dimension of its mesh, as FSDP2 does.

    Raises:
        ValueError: it is sharded in another way.
    """
    sharded = [placement for placement in parameter.placements if not placement.is_replicate()]
    if len(sharded) > 1 or any(not placement.is_shard(0) for placement in sharded):
        raise ValueError(
            f"k and density select from parameters that are whole or sharded into rows (fully_shard), found placements "
            f"{tuple(parameter.placements)}; train the cores whole (k=None, density=None)"
        )


def shard_group(parameter: DTensor) -> dist.ProcessGroup | None:
    """Return the processes that hold the rows of a parameter together; None if each holds all rows."""
    for dimension, placement in enumerate(parameter.placements):
        if placement.is_shard(0):
            return parameter.device_mesh.get_group(dimension)
    return None


@torch.no_grad()
def topk_of_shards(magnitudes: Sequence[Tensor], ks: Sequence[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Return the positions of the `k` largest entries of each parameter that lie in this process's shard.

    Every process of the group calls this for the same parameters. The work in common is a few sums of small tensors.

    Args:
        magnitudes: this process's rows of each parameter, flat, not negative, finite; may be empty.
        ks: entries to select of each whole parameter.
        group: the processes that hold the rows, in rank order.

    Returns:
        For each parameter, flat positions in this process's shard (int64, ascending).
    """
    wide = torch.float64 if any(magnitude.dtype == torch.float64 for magnitude in magnitudes) else torch.float32
    integers = torch.int64 if wide == torch.float64 else torch.int32
    # The bit patterns of numbers that are not negative are ordered as the numbers are.
    patterns = [magnitude.to(wide).view(integers).long() for magnitude in magnitudes]
    left = torch.tensor(list(ks), device=patterns[0].device)  # still to be found among the candidates
    prefix = torch.zeros_like(left)  # the digits of the k-th largest that are known
    for shift in range(wide.itemsize * 8 - _DIGIT, -1, -_DIGIT):
        counts = torch.stack([_digit_counts(p, before, shift) for p, before in zip(patterns, prefix, strict=True)])
        dist.all_reduce(counts, group=group)  # (parameters, 256)
        at_least = counts.flip(1).cumsum(1).flip(1)  # candidates with this digit or a larger one
        digit = (at_least >= left[:, None]).sum(1) - 1
        above = at_least.gather(1, digit[:, None]).squeeze(1) - counts.gather(1, digit[:, None]).squeeze(1)
        left = left - above
        prefix = (prefix << _DIGIT) | digit
    equal = [(pattern == threshold).nonzero().squeeze(1) for pattern, threshold in zip(patterns, prefix, strict=True)]
    numbers = torch.tensor([positions.numel() for positions in equal], device=left.device)
    of_all = [torch.empty_like(numbers) for _ in range(dist.get_world_size(group))]
    dist.all_gather(of_all, numbers, group=group)
    earlier = torch.stack(of_all)[: dist.get_rank(group)].sum(0)  # equal entries in the rows of the processes before
    take = (left - earlier).clamp_min(0).tolist()
    return [
        torch.cat([(pattern > threshold).nonzero().squeeze(1), ties[:count]]).sort().values
        for pattern, threshold, ties, count in zip(patterns, prefix, equal, take, strict=True)
    ]


@torch.no_grad()
def select_from_shards(
    gradients: Sequence[Tensor], ks: Sequence[int], group: dist.ProcessGroup | None
) -> list[tuple[Tensor, Tensor]]:
    """Return positions and values of the largest entries of each gradient in this process's shard (flat).

    `group` holds the rows; None if every process has all of them.

    Raises:
        ValueError: a gradient is not finite, on every process of the group.
    """
    bad = torch.stack([(~gradient.isfinite()).sum() for gradient in gradients])
    if group is not None:
        dist.all_reduce(bad, group=group)
    if bool(bad.any()):
        raise ValueError(
            f"{int((bad > 0).sum())} of {len(gradients)} gradients to select from hold entries that are NaN or "
            "infinite, so the largest are not defined; look for a loss that is not finite, and check the gradients "
            "before the step"
        )
    magnitudes = [gradient.abs() for gradient in gradients]
    if group is None:
        chosen = [largest_positions(magnitude, k) for magnitude, k in zip(magnitudes, ks, strict=True)]
    else:
        chosen = topk_of_shards(magnitudes, ks, group)
    return [(positions, gradient[positions]) for positions, gradient in zip(chosen, gradients, strict=True)]


@torch.no_grad()
def step_shard(
    parameter: DTensor, state: dict[str, Any], positions: Tensor, values: Tensor, lr: float,
    betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """Take one step of SparseAdam on the selected entries of this process's shard.

    The moments are sharded as the parameter is and held for every entry, 8 bytes each in float32. So checkpoints of
    sharded models can hold them, and another number of processes can load them.

    Raises:
        ValueError: the state is that of a parameter that was not sharded.
    """
    if "positions" in state:
        raise ValueError(
            "the optimizer's state was saved without sharding; resume without sharding on the same number of "
            "processes, or start with a new optimizer"
        )
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros_like(parameter, dtype=values.dtype)
    state["step"] += 1
    moments = [own_shard(state[name]).view(-1) for name in ("exp_avg", "exp_avg_sq")]
    selected = [moment[positions] for moment in moments]
    change = sparse_adam_update(selected[0], selected[1], values, int(state["step"]), lr, *betas, eps)
    for moment, new in zip(moments, selected, strict=True):
        moment[positions] = new
    entries = own_shard(parameter.detach()).view(-1)
    entries[positions] += change.to(entries.dtype)


def _digit_counts(pattern: Tensor, prefix: Tensor, shift: int) -> Tensor:
    """Count the entries (256,) that begin with the known digits, by their next digit."""
    # In two shifts: one by the whole width is not defined. The sign bit is 0.
    candidates = pattern[(pattern >> shift >> _DIGIT) == prefix]
    return torch.bincount((candidates >> shift) & (2**_DIGIT - 1), minlength=2**_DIGIT)
