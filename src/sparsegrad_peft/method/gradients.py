"""Step 1a: stream the gradients of chosen weights, one layer at a time, and leave the model as it was.

Calibration, the choice of positions and every measurement of sparsity need the same thing: the gradient `G` of each
target weight over some batches. `stream_gradients` hands on each gradient and drops it, so it never holds more than
one. It restores whatever it changed, bit for bit, also after an exception.

Several processes take each step together: their gradients are averaged one layer at a time (`averaging.py`), so all of
them see the gradients, and follow the trajectory, of the whole batch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .averaging import Averaging
from .config import CalibrationConfig, Trajectory, resolve_config
from .experts import expert_layout, fused_parameters, owner_of, target_shape
from .plain import is_conv1d
from .processes import (
    check_averages_gradients,
    check_starting_together,
    failing_together,
    gathered,
    is_distributed,
    is_sharded,
    progress_bar,
)
from .restored_state import restored_state

logger = logging.getLogger(__name__)

Step = Callable[[], Tensor]
LossFunction = Callable[[nn.Module, Any], Tensor]
OnGradient = Callable[[str, Tensor], None]

_FLOAT16_SCALE = 1024.0
"The smallest number of float16 is 6e-8, and the gradient of a token's logits is often smaller."


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return `model(**batch).loss`, the convention of Hugging Face models. Moves the batch to the model's device.

    Raises:
        TypeError: the batch is not a mapping, or the output has no loss.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected batches that are mappings, for model(**batch).loss, found {type(batch).__name__}; "
            "pass loss_fn=lambda model, batch: ... for another kind of batch"
        )
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor) and value.dim() != 0}
    if not tensors or ("input_ids" in tensors and tensors["input_ids"].dim() == 1):
        found = {name: f"a tensor {(*value.shape,)}" if isinstance(value, Tensor) else type(value).__name__
                 for name, value in batch.items()}  # fmt: skip
        raise TypeError(
            f"found a row of data in place of a batch of tensors: {found}; pass a DataLoader, which collates rows into "
            "batches"
        )
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    loss = getattr(output, "loss", None)
    if isinstance(output, tuple) and not isinstance(loss, Tensor):
        raise TypeError(
            "the model's output is a tuple, expected one with a loss; set model.config.return_dict = True, or pass "
            "loss_fn=lambda model, batch: ..."
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model's output ({type(output).__name__}) has no loss; put labels into the batches (found the keys "
            f"{sorted(batch)}) or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def stream_gradients(
    model: nn.Module,
    targets: Iterable[str],
    on_gradient: OnGradient,
    batches: Iterable[Any] | None = None,
    *,
    step: Step | None = None,
    loss_fn: LossFunction = default_loss,
    config: CalibrationConfig | None = None,
    progress: str | None = None,
    **fields: Any,
) -> None:
    """Run a few steps of backpropagation and pass each target's gradient to `on_gradient(name, G)`.

    `G` is (out, in) in whichever layout the layer stores its weight, and (E, out, in) for fused experts. It is dropped
    after the call: copy it to keep it, and do not write into it. Without a `Trajectory`, everything but the targets
    is frozen, as in the paper. Afterwards the model and the random number generators are as before (see
    `restored_state`).

    Under `torch.distributed` every process calls this, each with its own batches. `G` is then the mean over the
    processes, the same on all of them, as in a step of DDP. FSDP2's sharded gradients are gathered one at a time.

    Args:
        model: a plain module, or one sharded by FSDP2; unwrap DDP first.
        targets: names of linear layers in it, or of parameters that hold fused experts (see `experts.py`).
        on_gradient: called during each backward pass, once for each target.
        batches: inputs of `loss_fn`, iterated again from the start when they run out.
        step: in place of `batches`: a function without arguments that returns the loss of its next batch.
        loss_fn: (model, batch) -> scalar loss. Default: `model(**batch).loss`.
        config: `n_steps`, `training` and `trajectory` are used.
        progress: text beside a progress bar; None shows no bar.
        fields: in place of `config`, single fields of `CalibrationConfig`.

    Raises:
        ValueError: none or both of `batches` and `step`; unknown targets; no batches or too few; a loss or gradient
            that is not finite; a target that no gradient reached; processes with different weights.
        TypeError: a target is not a linear layer; the loss is not a scalar tensor.
        RuntimeError: not all processes call this. If one process fails, all raise, see `failing_together`.
    """
    config = resolve_config(config, fields)
    found = _find_targets(model, list(targets))
    stream, loss_of = _stream_and_loss(batches, step, loss_fn, config)
    check_starting_together("Calibration", model)
    weights = [target.weight for target in found.values()]
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in set(map(id, weights))]
    with (
        restored_state(model, keep_values_of=[*others, *weights] if config.trajectory else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        ExitStack() as hooks,
    ):
        _prepare(model, config)
        averaging = Averaging(hooks)
        scale = _loss_scale(model)
        counts = _hook_targets(model, found, on_gradient, config.trajectory, averaging, scale)
        _hook_moving(others, config.trajectory, averaging, scale)
        for number in progress_bar(range(1, config.n_steps + 1), progress):
            _backpropagate(model, stream, loss_of, averaging, number, scale)
            _check_reached(counts, number, config.n_steps)


def _loss_scale(model: nn.Module) -> float:
    """Return the factor of the loss: above 1 for weights in float16, where small gradients would become zero."""
    return _FLOAT16_SCALE if any(p.dtype == torch.float16 for p in model.parameters()) else 1.0


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    """Return the gradient of the loss itself, from that of the scaled loss."""
    return gradient if scale == 1 else gradient.float() / scale


def _backpropagate(
    model: nn.Module, stream: Iterator[Any], loss_of: LossFunction, averaging: Averaging, number: int, scale: float
) -> None:
    """Take one step. A process that fails stops all, before the others wait for it in a collective operation."""
    with failing_together():
        batch = next(stream)
    with failing_together():
        loss = loss_of(model, batch)
        _check_loss(loss, number)
    with failing_together(), averaging.backward():
        loss.backward(torch.full_like(loss, scale))


def _prepare(model: nn.Module, config: CalibrationConfig) -> None:
    """Set the mode, drop all gradients, and freeze the model unless it follows a trajectory."""
    if config.training is not None:
        model.train(config.training)
    for parameter in model.parameters():
        parameter.grad = None
        if config.trajectory is None:
            parameter.requires_grad_(False)


@dataclass(frozen=True)
class _Target:
    weight: nn.Parameter
    transposed: bool
    "stored with the last two dimensions as (in, out)"


def _hook_targets(
    model: nn.Module,
    targets: Mapping[str, _Target],
    on_gradient: OnGradient,
    trajectory: Trajectory | None,
    averaging: Averaging,
    scale: float,
) -> dict[str, int]:
    """Hand on each target's gradient as soon as it is complete, and drop it. Return the number of gradients so far."""
    counts = dict.fromkeys(targets, 0)

    def receiver(name: str, weight: Tensor, transposed: bool) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def receive(gradient: Tensor) -> None:
            gradient = _unscaled(gradient, scale)
            G = gathered(gradient)
            if not bool(G.isfinite().all()):
                raise ValueError(
                    f"{name}: the gradient of step {counts[name] + 1} is not finite; calibrate in float32 or bfloat16, "
                    "and check the batch's labels"
                )
            counts[name] += 1
            on_gradient(name, G.mT if transposed else G)
            if trajectory is not None:
                trajectory.update(weight, gradient, trajectory.lr)

        return receive

    for name in reversed(_modules_and_parameters(model)):
        if name in targets:
            weight = targets[name].weight.requires_grad_(True)
            averaging.add(weight, receiver(name, weight, targets[name].transposed))
    return counts


def _modules_and_parameters(model: nn.Module) -> list[str]:
    """Return the names of all modules, each followed by those of its own parameters."""
    names = []
    for path, module in model.named_modules():
        names += [path, *(f"{path}.{parameter}".removeprefix(".") for parameter in module._parameters)]
    return names


def _hook_moving(
    parameters: Iterable[nn.Parameter], trajectory: Trajectory | None, averaging: Averaging, scale: float
) -> None:
    """Move each parameter along the trajectory when its gradient is complete, and drop the gradient."""
    if trajectory is None:
        return

    def mover(parameter: Tensor) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def move(gradient: Tensor) -> None:
            dense = gradient.to_dense() if gradient.is_sparse else gradient  # nn.Embedding(sparse=True)
            trajectory.update(parameter, _unscaled(dense, scale), trajectory.lr)

        return move

    for parameter in parameters:
        averaging.add(parameter, mover(parameter), at_end=True)


def _find_targets(model: nn.Module, names: list[str]) -> dict[str, _Target]:
    if not names:
        raise ValueError("expected at least one target layer, found none")
    known = {*dict(model.named_modules()), *fused_parameters(model)}
    unknown = [name for name in names if name not in known]
    if unknown:
        some = ", ".join([name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:4])
        raise ValueError(f"the model has no modules named {', '.join(unknown)}; it has, for instance: {some}")
    targets = {name: _find_target(model, name) for name in names}
    first_name: dict[int, str] = {}
    for name, target in targets.items():
        if is_sharded(target.weight):
            check_averages_gradients(model, target.weight, name)
        first = first_name.setdefault(id(target.weight), name)
        if first != name:
            raise ValueError(
                f"{first} and {name} share one weight tensor, and so one gradient, the sum over both; name one of them"
            )
    return targets


def _find_target(model: nn.Module, name: str) -> _Target:
    shape, (owner, parameter) = target_shape(model, name), owner_of(model, name)
    if parameter is not None:
        return _Target(owner.get_parameter(parameter), expert_layout(owner, parameter).transposed)
    weight: Any = owner.weight
    if not (
        isinstance(weight, nn.Parameter)
        and weight.is_floating_point()
        and sorted(weight.shape) == sorted(shape)  # sharded weights are flat
    ):
        raise TypeError(
            f"{name}: expected a floating point weight of shape {shape}, found {type(weight).__name__} of "
            f"{weight.dtype} with shape {tuple(weight.shape)}; "
            "calibrate before quantizing the model or wrapping it in FSDP1, or pass ready statistics"
        )
    return _Target(weight, is_conv1d(owner))


def _stream_and_loss(
    batches: Iterable[Any] | None, step: Step | None, loss_fn: LossFunction, config: CalibrationConfig
) -> tuple[Iterator[Any], LossFunction]:
    """Return an endless stream of batches, and the function that computes the loss of one."""
    if (batches is None) == (step is None):
        raise ValueError(f"expected either batches or step, found {'neither' if step is None else 'both'}")
    if step is not None:
        return itertools.repeat(None), lambda model, batch: step()
    if isinstance(batches, Mapping):
        raise TypeError(f"expected several batches, found one with {', '.join(map(str, batches))}; pass [batch]")
    assert batches is not None
    return _endless(batches, config), loss_fn


def _endless(batches: Iterable[Any], config: CalibrationConfig) -> Iterator[Any]:
    """Yield the batches, starting again when they run out."""
    taken, n_steps = 0, config.n_steps
    for round_number in itertools.count():
        before = taken
        for batch in batches:
            taken += 1
            yield batch
        if taken == before:  # it is empty, or an iterator that has been used up
            found = "none" if round_number == 0 else f"{taken}, from an iterator that cannot be started again"
            each = " on each process" if is_distributed() else ""
            raise ValueError(f"expected batches for {n_steps} steps{each}, found {found}")
        # A list holds some batches of the data, a loader mostly all of them, whose sum has no noise.
        if round_number == 0 and config.mean_gradient and taken < n_steps and isinstance(batches, Sequence):
            logger.warning(
                "calibration has %d batches for %d steps and reads them again, so the noise of each counts as common "
                "to several steps. Pass %d batches, or a data loader.", taken, n_steps, n_steps,
            )  # fmt: skip


def _check_loss(loss: Any, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""
        raise TypeError(f"expected the loss as a tensor with one element, found {type(loss).__name__}{shape}")
    if not bool(loss.isfinite().all()):
        raise ValueError(f"the loss of step {number} is {loss.item()}; no gradient can be taken from it")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of step {number} does not depend on any target weight: it was computed under no_grad, detached, "
            "or does not use the target layers"
        )


def _check_reached(counts: Mapping[str, int], number: int, n_steps: int) -> None:
    """Raise if no target got a gradient so far, or if some never did (an expert may be reached in a later step)."""
    missing = [name for name, count in counts.items() if not count]
    twice = [name for name, count in counts.items() if count > number]
    if twice:
        raise ValueError(
            f"the gradient of {twice[0]} arrived in {counts[twice[0]]} parts in {number} steps: the layer is "
            "used several times, with reentrant gradient checkpointing; use use_reentrant=False"
        )
    if number == 1 and missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        logger.warning("no gradient reached %s%s in the first step of calibration", ", ".join(missing[:3]), more)
    if len(missing) == len(counts) or (missing and number == n_steps):
        raise ValueError(
            f"no gradient reached {', '.join(missing)}, up to step {number}: they do not take part in the loss, or the "
            "way back to them is cut (detach, no_grad, or reentrant gradient checkpointing of an input that requires "
            "no gradient: use use_reentrant=False)"
        )
