"""Gradients of chosen weights, one layer at a time as they arrive, from a model that is left exactly as it was.

Calibration, the choice of fixed positions, and every measurement of sparsity look at the same thing: the gradient `G`
of each target weight over some batches. `stream_gradients` hands each one on and drops it, so that never more than one
is held, and puts back to the bit whatever it touched, also when it is interrupted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .groups import linear_shape
from .linear import is_conv1d
from .processes import shown
from .restored_state import untouched

Step = Callable[[], Tensor]


def sign_step(parameter: Tensor, gradient: Tensor, lr: float) -> None:
    """`p ← p - lr · sign(g)`: what Adam does at its first step, with no state to keep."""
    parameter.add_(gradient.sign_(), alpha=-lr)


def normalized_step(parameter: Tensor, gradient: Tensor, lr: float) -> None:
    """`p ← p - lr · √n · g/‖g‖`: as long a step as `sign_step`'s, along the gradient itself."""
    norm = gradient.norm()
    if norm > 0:
        parameter.add_(gradient.mul_(parameter.numel() ** 0.5 / norm), alpha=-lr)


@dataclass(frozen=True)
class Trajectory:
    """A short training run during calibration, undone afterwards, so that the gradients of later steps are seen too.

    What trained before (`requires_grad`) walks along, and so do the target weights. The update needs no optimizer
    state; the start is kept on the CPU, one copy of what walks. Under `torch.distributed` every process walks on its
    own batches.
    """

    lr: float = 1e-4
    "learning rate of the walk, constant, about that of full fine-tuning with Adam"

    update: Callable[[Tensor, Tensor, float], None] = sign_step
    "how a parameter moves: a function of the parameter, its gradient (may be overwritten) and lr"

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"Trajectory.lr must be above 0, found {self.lr}")


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """`model(**batch).loss`, the convention of Hugging Face models; the batch is moved to the model's device.

    Raises:
        TypeError: the batch is no mapping, or the output has no loss; the message says what to pass instead.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"expected batches that are mappings, for model(**batch).loss, found {type(batch).__name__}; "
            "pass loss_fn=lambda model, batch: ... for another kind of batch"
        )
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()})
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the model's output ({type(output).__name__}) has no loss; put labels into the batches ({sorted(batch)} "
            "were given) or pass loss_fn=lambda model, batch: ..."
        )
    return loss


def stream_gradients(
    model: nn.Module,
    targets: Iterable[str],
    on_gradient: Callable[[str, Tensor], None],
    batches: Iterable[Any] | None = None,
    *,
    step: Step | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss,
    n_steps: int,
    training: bool | None = True,
    trajectory: Trajectory | None = None,
    progress: str | None = None,
) -> None:
    """Run `n_steps` of backpropagation and hand each target's gradient to `on_gradient(name, G)`.

    `G` is (out, in) whatever the layer's storage, and is dropped after the call: copy what is to be kept, and do not
    write into it. Everything else is frozen meanwhile, as in the paper's preliminary phase. Weights, `requires_grad`,
    `.grad`, buffers, train and eval modes, hooks and the random number generators are afterwards what they were.

    Args:
        model: a plain module; unwrap DDP and FSDP first.
        targets: names of linear layers in it.
        on_gradient: called once for each backward pass and target, during the backward pass.
        batches: what `loss_fn` takes; started anew when it runs out, if it can be.
        step: in place of `batches`: a function without arguments that returns the loss of its next batch.
        loss_fn: (model, batch) -> scalar loss. Default: `model(**batch).loss`.
        n_steps: backward passes to run.
        training: train mode (True, as in the paper: dropout acts), eval mode (False), or as the model is (None).
        trajectory: None takes every gradient at the starting point; else see `Trajectory`.
        progress: text beside a progress bar on the terminal; None shows no bar.

    Raises:
        ValueError: none or both of `batches` and `step`; `n_steps` below 1; unknown targets; no batches or too few; a
            loss or gradient that is not finite; a target that no gradient reached.
        TypeError: a target is no linear layer; the loss is no scalar tensor.
    """
    names = list(targets)
    layers = _find(model, names)
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(f"n_steps must be an integer of at least 1, found {n_steps!r}")
    if (batches is None) == (step is None):
        raise ValueError("expected exactly one of batches and step")
    next_loss = step if step is not None else _loss_of(model, batches, loss_fn, n_steps)  # type: ignore[arg-type]

    reached = dict.fromkeys(names, 0)
    walking = [p for p in model.parameters() if p.requires_grad] if trajectory else []

    def target_hook(name: str, layer: nn.Module) -> Callable[[Tensor], None]:
        transposed = is_conv1d(layer)

        @torch.no_grad()
        def receive(weight: Tensor) -> None:
            G, weight.grad = weight.grad, None
            assert G is not None
            if not bool(G.isfinite().all()):
                raise ValueError(
                    f"{name}: the gradient of step {reached[name] + 1} is not finite; calibrate in float32 or bfloat16,"
                    " and check the batch's labels"
                )
            reached[name] += 1
            on_gradient(name, G.T if transposed else G)
            if trajectory:
                trajectory.update(weight, G, trajectory.lr)

        return receive

    @torch.no_grad()
    def walk(parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        assert trajectory is not None
        trajectory.update(parameter, gradient, trajectory.lr)

    with ExitStack() as stack:
        targeted = [layer.get_parameter("weight") for layer in layers.values()]
        weights = {id(weight) for weight in targeted}
        stack.enter_context(untouched(model, keep_values_of=[*walking, *targeted] if trajectory else []))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if training is not None:
            model.train(training)
        for parameter in model.parameters():
            parameter.grad = None
            if not trajectory:
                parameter.requires_grad_(False)
        for parameter in walking:
            if id(parameter) not in weights:
                stack.callback(parameter.register_post_accumulate_grad_hook(walk).remove)
        for name, layer in layers.items():
            weight: Tensor = layer.weight  # type: ignore[assignment]
            weight.requires_grad_(True)
            stack.callback(weight.register_post_accumulate_grad_hook(target_hook(name, layer)).remove)
        for number in shown(range(1, n_steps + 1), progress):
            loss = next_loss()
            _check_loss(loss, number)
            loss.backward()
            missing = [name for name in names if not reached[name]]
            # Some, such as an expert that no token was sent to, may be reached later.
            if len(missing) == len(names) or (missing and number == n_steps):
                raise ValueError(
                    f"no gradient reached {', '.join(missing)}, up to step {number}: they do not take part "
                    "in the loss, or the way back to them is cut (detach, no_grad, or reentrant gradient "
                    "checkpointing of an input that requires no gradient: use use_reentrant=False)"
                )


def _find(model: nn.Module, names: list[str]) -> dict[str, nn.Module]:
    if not names:
        raise ValueError("expected at least one target layer, found none")
    modules = dict(model.named_modules())
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no modules named {', '.join(unknown)}; it has, for instance: "
                         f"{', '.join([n for n, m in modules.items() if isinstance(m, nn.Linear)][:4])}")  # fmt: skip
    layers = {name: modules[name] for name in names}
    for name, layer in layers.items():
        shape = linear_shape(layer, name)
        weight = layer.weight
        if (
            not isinstance(weight, nn.Parameter)
            or not weight.is_floating_point()
            or sorted(weight.shape) != sorted(shape)
        ):
            raise TypeError(
                f"{name}: expected a floating point weight of shape {shape}, found {type(weight).__name__} of "
                f"{weight.dtype} with shape {tuple(weight.shape)}; "
                "calibrate before quantizing or sharding the model, or pass ready statistics"
            )
    first_name: dict[int, str] = {}
    for name, layer in layers.items():
        first = first_name.setdefault(id(layer.weight), name)
        if first != name:
            raise ValueError(
                f"{first} and {name} share one weight tensor, and so one gradient, the sum over both; name one of them"
            )
    return layers


def _loss_of(
    model: nn.Module, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], Tensor], n_steps: int
) -> Step:
    taken = 0

    def endless() -> Iterator[Any]:
        nonlocal taken
        for round_number in itertools.count():
            before = taken
            for batch in batches:
                taken += 1
                yield batch
            if taken == before:  # nothing came: it is empty, or an iterator that has been used up
                found = "none" if round_number == 0 else f"{taken}, from an iterator that cannot be started again"
                raise ValueError(f"expected batches for {n_steps} steps, found {found}")

    stream = endless()
    return lambda: loss_fn(model, next(stream))


def _check_loss(loss: Any, number: int) -> None:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TypeError(f"expected the loss as a tensor with one element, found {type(loss).__name__}"
                        + (f" of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else ""))  # fmt: skip
    if not bool(loss.isfinite().all()):
        raise ValueError(f"the loss of step {number} is {loss.item()}; no gradient can be taken from it")
    if not loss.requires_grad:
        raise ValueError(
            f"the loss of step {number} does not depend on any target weight: it was computed under no_grad, detached, "
            "or the targets take no part in it"
        )
