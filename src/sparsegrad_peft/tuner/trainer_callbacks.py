"""Callbacks of a `transformers.Trainer`: calibration at the start, a check of each gradient, new bases on the way."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from ..method.config import CalibrationConfig
from ..method.gradients import default_loss
from ..method.processes import own_shard
from .adapters import calibrated, uncalibrated, widen_cores
from .calibration import calibrate_adapter
from .trainer_batches import Batches


class SparseGradCalibration(TrainerCallback):
    """Calibrate the adapters of a model when training begins, in any trainer that has callbacks and one process.

    The cores stay the same parameters, so the trainer's optimizer stays right.

    Args:
        config: how to calibrate; None: as `calibrate_adapter` does.
        loss_fn: (model, batch) -> loss. Default: the model's own loss, which TRL's `SFTTrainer` uses. A callback cannot
            see the trainer's loss; `SparseGradTrainerMixin` uses it.
    """

    def __init__(
        self, config: CalibrationConfig | None = None, loss_fn: Callable[[nn.Module, Any], Tensor] = default_loss
    ) -> None:
        self.config, self.loss_fn = config, loss_fn

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate the active adapters that have no calibrated bases yet. Those of a resumed run have them.

        Raises:
            ValueError: the model is wrapped for several processes or the optimizer has trained; and whatever
                calibration refuses.
        """
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        names = uncalibrated(model)
        if names and (args.world_size > 1 or args.fsdp or args.deepspeed):
            raise ValueError(
                f"adapter {names[0]!r} is not calibrated, and the model is already wrapped for {args.world_size} "
                "processes, FSDP or DeepSpeed; use SparseGradTrainerMixin, or call calibrate_adapter before the "
                "trainer is made"
            )
        check_untrained(names, optimizer)
        if not (args.fsdp or args.deepspeed):
            widen_cores(model)  # TRL casts them to bfloat16 on a quantized model
        for name in names:
            with closing(Batches(lambda: loader)) as batches:
                calibrate_adapter(
                    model, batches, adapter_name=name, config=self.config, loss_fn=self.loss_fn,
                    progress=not args.disable_tqdm,
                )  # fmt: skip


def check_untrained(names: list[str], optimizer: Any) -> None:
    """Raise `ValueError` if adapters are to be calibrated and the optimizer already has state of other bases."""
    if names and optimizer is not None and optimizer.state:
        raise ValueError(
            f"adapter {names[0]!r} is not calibrated, and the optimizer has already trained; call calibrate_adapter "
            "before training"
        )


class TrainingDivergedError(RuntimeError):
    """Loss or gradient are no longer finite; the message names the step and the folder of the checkpoints."""


def diverged(trainer: Any, what: str) -> TrainingDivergedError:
    """Return the error for a step whose loss or gradient is not finite, before it is taken."""
    return TrainingDivergedError(
        f"the {what}. The step was not taken, so any checkpoints in {trainer.args.output_dir} are good. Lower the "
        f"learning rate, found {trainer.args.learning_rate}, or train in float32 or bfloat16"
    )


class StopIfNotFinite(TrainerCallback):
    """Stop before a step whose loss or gradient is not finite: it would make every weight that trains NaN."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check the losses of the step's micro-batches and the norm of the gradients, in one exchange.

        Float16's scaler skips steps with such gradients by itself, and DeepSpeed keeps the gradients.

        Raises:
            TrainingDivergedError: a loss or a gradient is not finite on one of the processes.
        """
        accelerator, losses = self.trainer.accelerator, self.trainer.losses_of_step
        self.trainer.losses_of_step = []
        found = [*losses]
        if accelerator.scaler is None and not self.trainer.is_deepspeed_enabled:
            gradients = [own_shard(p.grad) for p in kwargs["model"].parameters() if p.grad is not None]
            found.append(get_total_norm([g._values() if g.is_sparse else g for g in gradients]))
        if not found:
            return
        own = torch.stack([number.to(args.device).reshape(()).float() for number in found])
        numbers = accelerator.gather(own).reshape(-1, len(found))  # all stop, or the others would wait for one
        if bool(numbers.isfinite().all()):
            return
        of_losses = numbers[:, : len(losses)]
        bad = of_losses[~of_losses.isfinite()]
        what, value = ("loss", bad[0].item()) if len(bad) else ("gradient", "not finite")
        raise diverged(self.trainer, f"{what} of step {state.global_step + 1} is {value}")


class Refreshing(TrainerCallback):
    """Give adapters new bases every few steps, before the step's checkpoint is written."""

    def __init__(self, trainer: Any, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refresh the bases if it is time, but not after the last step."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            for name in calibrated(self.trainer.model):
                self.trainer.refresh_bases(name)
