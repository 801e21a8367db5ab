"""SparseGrad inside `transformers.Trainer` and its relatives: calibration before the first step, and the optimizer.

    SparseGradTrainer(model=get_peft_model(...), args=..., ...)     the Trainer, with both
    class SFT(SparseGradTrainerMixin, trl.SFTTrainer): pass         any other trainer, with both
    Trainer(..., callbacks=[SparseGradCalibration()])               calibration alone, with the Trainer's own optimizer

The Trainer's loop is not copied. The mixin overrides `create_optimizer`, which every Trainer calls once the data are
known and before the first step, also when it resumes. It adds checks of the loss to `compute_loss` and `training_step`.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..method.config import CalibrationConfig
from ..method.ddp import exclude_bases_from_ddp
from ..method.optim import SparseGradAdamW
from ..method.selection import resolve_k
from ..method.surgery import param_groups
from .adapters import active_configs, adapter_parameters, uncalibrated, widen_cores
from .calibration import calibrate_adapter
from .quantized import keep_order
from .refresh import refresh_adapter, truncated
from .trainer_batches import training_batches
from .trainer_callbacks import (
    Refreshing,
    SparseGradCalibration,
    StopIfNotFinite,
    TrainingDivergedError,
    check_untrained,
)
from .trainer_loss import checked

__all__ = ["SparseGradCalibration", "SparseGradTrainer", "SparseGradTrainerMixin", "TrainingDivergedError"]


logger = logging.getLogger(__name__)


class SparseGradTrainerMixin:
    """Calibrate the adapter and train it with `SparseGradAdamW`: `class MyTrainer(SparseGradTrainerMixin, Trainer)`.

    The learning rate of `TrainingArguments` is that of the cores (or, for another PEFT method, of the adapter). One
    schedule scales both it and `rest_learning_rate`.

    Args:
        calibration: how to calibrate an adapter; None: as `calibrate_adapter` does.
        density: share of the entries of each core that a step selects; None trains the cores whole.
        k: the same as a number of entries.
        rest_learning_rate: for what trains besides the cores, such as the head; None: the same as for the cores.
        stop_if_not_finite: raise `TrainingDivergedError` at the first loss or gradient that is not finite.
        progress: show a bar while calibrating; None: unless `disable_tqdm` is set.
        refresh_every: number of steps after which an adapter with complete bases gets new ones, again and again (see
            `refresh_adapter`); not under FSDP or DeepSpeed. None: never.
        own_optimizer: True makes `SparseGradAdamW`. False lets the Trainer make its own optimizer (`optim`,
            `optimizer_cls_and_kwargs`), for a model without SparseGrad layers.

    Raises:
        TypeError: `calibration` is not a `CalibrationConfig`.
        ValueError: another optimizer was asked for (`optim`, `optimizer_cls_and_kwargs`); an optimizer was passed in
            with `density`, `k` or `rest_learning_rate`, which it would ignore; `density` or `k` under DeepSpeed;
            `refresh_every` is given with truncated bases or a sharded model; `density`, `k` or a learning rate is
            out of range.
    """

    expects_adapter = True
    "Log a warning for a model without an adapter."

    def __init__(
        self: Any,
        *args: Any,
        calibration: CalibrationConfig | None = None,
        density: float | None = None,
        k: int | None = None,
        rest_learning_rate: float | None = None,
        stop_if_not_finite: bool = True,
        progress: bool | None = None,
        refresh_every: int | None = None,
        own_optimizer: bool = True,
        **kwargs: Any,
    ) -> None:
        if calibration is not None and not isinstance(calibration, CalibrationConfig):
            raise TypeError(f"calibration must be a CalibrationConfig or None, found {calibration!r}")
        self.sparsegrad_calibration = calibration
        self.sparsegrad_selection = {"density": density, "k": k}
        self.rest_learning_rate = rest_learning_rate
        self.stop_if_not_finite = stop_if_not_finite
        self.losses_of_step: list[Tensor] = []
        self.calibration_progress = progress
        self.own_optimizer = own_optimizer
        self.loss_is_known = False
        super().__init__(*args, **kwargs)
        keep_order(self.model)  # evaluations during training would reorder 4-bit weights
        self._check_optimizer(**self.sparsegrad_selection, rest_learning_rate=rest_learning_rate)
        if stop_if_not_finite:
            self.add_callback(StopIfNotFinite(self))
        if refresh_every is not None:
            self._check_refresh(refresh_every)
            self.add_callback(Refreshing(self, refresh_every))

    def _check_optimizer(self: Any, **settings: Any) -> None:
        """Refuse settings that the optimizer would refuse or ignore, and an optimizer that the mixin would replace."""
        selects = any(value is not None for value in self.sparsegrad_selection.values())
        if selects:
            resolve_k(sys.maxsize, **self.sparsegrad_selection)  # against the cores: when the optimizer is made
        rates = {"learning_rate": self.args.learning_rate, "rest_learning_rate": self.rest_learning_rate}
        for name, rate in rates.items():
            if rate is not None and not (isinstance(rate, int | float) and 0 <= rate < math.inf):
                raise ValueError(f"{name} must be a number of at least 0 and finite, found {rate!r}")
        if selects and self.is_deepspeed_enabled:
            raise ValueError(
                "density and k select the largest entries of whole cores, and DeepSpeed ZeRO gives the optimizer parts "
                "of them; leave both out, or use DDP or FSDP2"
            )
        lost = ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None)
        if self.optimizer is not None:
            if lost:
                raise ValueError(f"an optimizer was passed in, which ignores {lost}; pass either it or these settings")
        elif not self.own_optimizer:
            if lost:
                raise ValueError(
                    f"own_optimizer=False: the Trainer's optimizer ignores {lost}; leave these settings out"
                )
        elif self.optimizer_cls_and_kwargs or self.args.optim not in ("adamw_torch", "adamw_torch_fused"):
            cls = self.optimizer_cls_and_kwargs
            kind = cls[0].__name__ if cls else getattr(self.args.optim, "value", self.args.optim)
            raise ValueError(
                f"found optimizer {kind}, and this trainer uses SparseGradAdamW; pass optimizers=(optimizer, None), or "
                "use the trainer without SparseGradTrainerMixin, with callbacks=[SparseGradCalibration()]"
            )

    def _check_refresh(self: Any, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"refresh_every must be an integer of at least 1, found {every!r}")
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError("refresh_every is not for models that FSDP or DeepSpeed shards; leave it out")
        for name, parts in active_configs(self.model).items():
            if not all(config.complete for config in parts):
                raise ValueError(truncated(name))

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Calibrate the adapters that are not, then make `SparseGradAdamW`; an optimizer that was passed in is kept.

        Raises:
            ValueError: an adapter is not calibrated under FSDP1 or DeepSpeed ZeRO-3, whose weights are sharded by then,
                or with an optimizer that has trained; and whatever calibration and optimizer refuse.
        """
        names = uncalibrated(self.model)
        if names and (engine := sharded_by(self)) is not None:
            raise ValueError(
                f"adapter {names[0]!r} is not calibrated, and {engine} has already sharded the model; call "
                "calibrate_adapter before the trainer is made, or use FSDP2"
            )
        check_untrained(names, self.optimizer)
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            widen_cores(self.model)  # TRL casts them to bfloat16 on a quantized model
        for name in names:
            show = not self.args.disable_tqdm if self.calibration_progress is None else self.calibration_progress
            self._on_training_batches(calibrate_adapter, adapter_name=name, progress=show)
        if self.args.world_size > 1:
            exclude_bases_from_ddp(self.model)
        if self.optimizer is None and not self.own_optimizer:
            own: torch.optim.Optimizer = super().create_optimizer()  # type: ignore[misc]
            return own
        if self.optimizer is None:
            self.optimizer = SparseGradAdamW(
                self._groups(self.model if model is None else model),
                lr=self.args.learning_rate,
                betas=(self.args.adam_beta1, self.args.adam_beta2),
                eps=self.args.adam_epsilon,
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def refresh_bases(self: Any, adapter_name: str) -> None:
        """Give an adapter new bases from training batches (see `refresh_adapter`)."""
        self._on_training_batches(refresh_adapter, optimizer=self.optimizer, adapter_name=adapter_name, progress=False)

    def _on_training_batches(self: Any, calibrate: Callable[..., Any], **options: Any) -> Any:
        """Calibrate on the training loader through `compute_loss`, and return the result of `calibrate`.

        The trainer is left as it was.
        """

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            # Before training, the model is not prepared yet, which would set bfloat16. Not for float16, which needs
            # scaled losses.
            precision = self.accelerator.autocast() if self.args.bf16 else nullcontext()
            number = self._number_of_labels(batch)
            with self.compute_loss_context_manager(), precision:
                loss: Tensor = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=number)
            return loss

        with training_batches(self) as batches:
            return calibrate(self.model, batches, loss_fn=loss_of, config=self.sparsegrad_calibration, **options)

    def _number_of_labels(self: Any, batch: Any) -> Any:
        """Return `num_items_in_batch` for a batch that is a step of its own, as a loss of the user's may need it.

        None for the other losses, which then average over the batch.
        """
        if self.compute_loss_func is None and type(self).compute_loss is SparseGradTrainerMixin.compute_loss:
            return None
        return self.get_batch_samples(iter([batch]), 1, self.args.device)[1]

    def _groups(self: Any, model: nn.Module) -> list[dict[str, Any]]:
        """Return the adapter's parameters first, then the rest, with the Trainer's choice of weight decay."""
        own, has_cores = adapter_parameters(model)
        selects = any(value is not None for value in self.sparsegrad_selection.values())
        if selects and not has_cores:
            raise ValueError(
                "density and k select from the cores of SparseGrad layers, found a model without any; call "
                "get_peft_model with a SparseGradConfig first, or leave them out"
            )
        if self.rest_learning_rate is not None and not own:
            raise ValueError(
                "rest_learning_rate is for what trains beside an adapter, found a model without one; call "
                "get_peft_model with a SparseGradConfig first, or leave it out"
            )
        if self.expects_adapter and not own:
            logger.warning(
                "%s: found a model without an adapter, and trains its %s parameters themselves; call get_peft_model "
                "with a SparseGradConfig first", type(self).__name__,
                f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
            )  # fmt: skip
        groups = param_groups(model, **self.sparsegrad_selection) if has_cores else []
        groups = [group for group in groups if id(group["params"][0]) in own]  # the cores; the rest follows
        for group in groups:
            group["weight_decay"] = 0.0 if group.get("sparse") else self.args.weight_decay
        grouped = {id(parameter) for group in groups for parameter in group["params"]}
        decayed = set(self.get_decay_parameter_names(model))
        left = [(n, p) for n, p in model.named_parameters() if p.requires_grad and id(p) not in grouped]
        rate = {} if self.rest_learning_rate is None else {"lr": self.rest_learning_rate}
        for is_own, options in ((True, {}), (False, rate)):
            for is_decayed, weight_decay in ((True, self.args.weight_decay), (False, 0.0)):
                parameters = [p for n, p in left if (id(p) in own) is is_own and (n in decayed) is is_decayed]
                if parameters:
                    groups.append({"params": parameters, "weight_decay": weight_decay, **options})
        return groups

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check an own `compute_loss` like the trainer's."""
        super().__init_subclass__(**kwargs)
        if "compute_loss" in cls.__dict__:
            cls.compute_loss = checked(cls.__dict__["compute_loss"])  # type: ignore[method-assign]

    @checked
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the trainer's loss; the first batch shows if it uses `num_items_in_batch` (see trainer_loss.py)."""
        return super().compute_loss(*args, **kwargs)  # type: ignore[misc]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Compute a micro-batch's loss and gradient as the Trainer does. `StopIfNotFinite` checks the loss."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.stop_if_not_finite:
            self.losses_of_step.append(loss.detach())
        return loss


def sharded_by(trainer: Any) -> str | None:
    """Return the engine that has sharded a trainer's model before the optimizer is made; None if it is still whole.

    FSDP2 and ZeRO-1 and 2 get a whole model then.
    """
    if trainer.is_fsdp_enabled and getattr(trainer.accelerator.state.fsdp_plugin, "fsdp_version", 1) == 1:
        return "FSDP1"
    if any(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()):
        return "DeepSpeed ZeRO-3"
    return None


class SparseGradTrainer(SparseGradTrainerMixin, Trainer):
    """`transformers.Trainer` that calibrates the adapter before its first step and trains it with `SparseGradAdamW`."""
