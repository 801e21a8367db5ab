"""SparseGrad inside `transformers.Trainer` and its relatives: calibration before step 0, and our optimizer.

    SparseGradTrainer(model=get_peft_model(...), args=..., ...)     the Trainer, with both
    class SFT(SparseGradTrainerMixin, trl.SFTTrainer): pass         any other one, with both
    Trainer(..., callbacks=[SparseGradCalibration()])               calibration alone, the Trainer's own optimizer

Nothing of the Trainer's loop is copied: the mixin overrides `create_optimizer`, which every Trainer calls once the data
are known and before the first step, also when it resumes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..method.calibrate import CalibrationConfig
from ..method.optim import SparseGradAdamW
from ..method.surgery import param_groups
from .calibration import calibrate_adapter
from .config import SparseGradConfig


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite; the message names the step and the last good checkpoint."""


class SparseGradTrainerMixin:
    """Put it before a Trainer class: `class MyTrainer(SparseGradTrainerMixin, Trainer)`.

    The learning rate of `TrainingArguments` is the cores' (or, for another PEFT method, the adapter's). One schedule
    scales both it and `rest_learning_rate`.

    Args:
        calibration: how to calibrate an adapter that has no bases yet; None: as `calibrate_adapter` does.
        density: share of the entries of each core that a step selects; None trains the cores whole.
        k: the same as a number of entries.
        rest_learning_rate: of what trains besides the cores, such as the head; None: the same as theirs.
        stop_if_not_finite: raise `TrainingDivergedError` at the first loss that is not finite.
    """

    def __init__(
        self,
        *args: Any,
        calibration: CalibrationConfig | None = None,
        density: float | None = None,
        k: int | None = None,
        rest_learning_rate: float | None = None,
        stop_if_not_finite: bool = True,
        **kwargs: Any,
    ) -> None:
        self.sparsegrad_calibration = calibration
        self.sparsegrad_selection = {"density": density, "k": k}
        self.rest_learning_rate = rest_learning_rate
        self.stop_if_not_finite = stop_if_not_finite
        super().__init__(*args, **kwargs)

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Calibrate what has no bases yet, then `SparseGradAdamW`; an optimizer that was passed in is kept.

        Raises:
            ValueError: an uncalibrated adapter under FSDP or DeepSpeed, whose weights are sharded by then; and whatever
                calibration and optimizer refuse.
        """
        names = uncalibrated(self.model)
        if names and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError(
                f"adapter {names[0]!r} has no bases yet, and a sharded model cannot be calibrated; call "
                "calibrate_adapter before the trainer is made"
            )
        if names and self.optimizer is not None:
            raise ValueError(
                f"adapter {names[0]!r} has no bases yet, and an optimizer was passed in, which would not know the new "
                "cores; call calibrate_adapter before the optimizer is made"
            )
        for name in names:
            self._calibrate(name)
        if self.optimizer is None:
            self.optimizer = SparseGradAdamW(
                self._groups(self.model if model is None else model),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def _calibrate(self: Any, adapter_name: str) -> None:
        def loss_of(batch: Any) -> Tensor:
            with self.compute_loss_context_manager():
                loss: Tensor = self.compute_loss(self.model, self._prepare_inputs(batch))
            return loss

        kept = copy.deepcopy(getattr(self, "_metrics", None))  # TRL's trainers count in compute_loss what they log
        calibrate_from(self.model, adapter_name, self.get_train_dataloader, loss_of, self.sparsegrad_calibration)
        if kept is not None:
            self._metrics = kept

    def _groups(self: Any, model: nn.Module) -> list[dict[str, Any]]:
        """The adapter's parameters first, then the rest, with weight decay where the Trainer would have it."""
        own, cores = adapter_parameters(model)
        if self.rest_learning_rate is not None and not own:
            raise ValueError("rest_learning_rate is that of what trains beside an adapter; found a model without one")
        if cores:
            groups = param_groups(model, **self.sparsegrad_selection)
            groups = [group for group in groups if id(group["params"][0]) in own]
        else:
            parameters = [p for p in model.parameters() if p.requires_grad and id(p) in own]
            groups = [{"params": parameters, "weight_decay": self.args.weight_decay}] if parameters else []
        rate = {} if self.rest_learning_rate is None else {"lr": self.rest_learning_rate}
        decayed = set(self.get_decay_parameter_names(model))
        rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
        for weight_decay, wanted in ((self.args.weight_decay, True), (0.0, False)):
            parameters = [p for name, p in rest if (name in decayed) is wanted]
            if parameters:
                groups.append({"params": parameters, "weight_decay": weight_decay, **rate})
        return groups

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, and a check of its loss."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.stop_if_not_finite and not bool(loss.isfinite().all()):
            raise TrainingDivergedError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}; it was not taken, training has "
                f"stopped, and what was saved in {self.args.output_dir} is whole. Lower the learning rate, found "
                f"{self.args.learning_rate}, or train in float32 or bfloat16"
            )
        return loss


class SparseGradTrainer(SparseGradTrainerMixin, Trainer):
    """`transformers.Trainer` that calibrates the adapter before its first step and trains it with `SparseGradAdamW`."""


class SparseGradCalibration(TrainerCallback):
    """Gives the adapters of a model their bases when training begins, in any trainer that has callbacks.

    The trainer's optimizer already exists by then, so the callback puts the new cores in the place of the old ones in
    it; an optimizer that has state, or a model that is wrapped for several processes, is too late for that and refused.

    Args:
        config: how to calibrate; None: as `calibrate_adapter` does.
    """

    def __init__(self, config: CalibrationConfig | None = None) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate; nothing to do where an adapter has its bases, such as after resuming."""
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        names = uncalibrated(model)
        if names and args.world_size > 1:
            raise ValueError(
                f"adapter {names[0]!r} has no bases yet, and the model is already wrapped for {args.world_size} "
                "processes; use SparseGradTrainerMixin, or call calibrate_adapter before the trainer is made"
            )
        for name in names:
            old = {n: p for n, p in model.named_parameters() if p.requires_grad}
            calibrate_from(model, name, lambda: loader, lambda batch: model(**batch).loss, self.config)
            new = {id(old[n]): p for n, p in model.named_parameters() if n in old and p is not old[n]}
            for group in optimizer.param_groups:
                group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]


def uncalibrated(model: nn.Module) -> list[str]:
    """Names of the active SparseGrad adapters that have no bases and want some."""
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    return [
        name
        for name in (active() if callable(active) else active)
        if isinstance(configs.get(name), SparseGradConfig)
        and not configs[name].calibrated
        and not configs[name].original_space
    ]


def adapter_parameters(model: nn.Module) -> tuple[set[int], bool]:
    """Ids of an adapter's own parameters, not of modules trained whole beside it; and whether they are our cores."""
    cores = {id(core) for module in model.modules() for _, core in getattr(module, "trained_cores", tuple)()}
    if cores:
        return cores, True
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    names = {name for layer in layers for name in layer.adapter_layer_names}
    return {
        id(parameter)
        for layer in layers
        for name in names
        if (child := getattr(layer, name, None)) is not None
        for parameter in (child.parameters() if isinstance(child, nn.Module) else ())
    }, False


def calibrate_from(
    model: nn.Module,
    adapter_name: str,
    make_loader: Callable[[], Any],
    loss_of: Callable[[Any], Tensor],
    config: CalibrationConfig | None,
) -> None:
    """Calibrate on the batches of a trainer's loader, which is then as if it had never been read from."""
    loaders: list[Any] = []  # made at the first step, where random numbers drawn are put back afterwards

    def endless() -> Generator[Any, None, None]:
        loaders.append(make_loader())
        while True:
            yield from loaders[0]

    stream = endless()
    try:
        calibrate_adapter(model, step=lambda: loss_of(next(stream)), adapter_name=adapter_name, config=config)
    finally:
        stream.close()
        for loader in loaders:  # an accelerate loader that was not read to its end is still announced as being read
            if hasattr(loader, "end") and loader in getattr(loader.gradient_state, "dataloader_references", ()):
                loader.end()
