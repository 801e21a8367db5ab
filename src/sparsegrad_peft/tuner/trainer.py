"""SparseGrad inside `transformers.Trainer` and its relatives: calibration before step 0, and our optimizer.

    SparseGradTrainer(model=get_peft_model(...), args=..., ...)     the Trainer, with both
    class SFT(SparseGradTrainerMixin, trl.SFTTrainer): pass         any other one, with both
    Trainer(..., callbacks=[SparseGradCalibration()])               calibration alone, the Trainer's own optimizer

Nothing of the Trainer's loop is copied: the mixin overrides `create_optimizer`, which every Trainer calls once the data
are known and before the first step, also when it resumes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..method.config import CalibrationConfig
from ..method.optim import SparseGradAdamW
from ..method.surgery import param_groups
from .calibration import calibrate_adapter
from .config import SparseGradConfig
from .refresh import refresh_adapter, truncated

_COUNTED = ("_metrics", "_total_train_tokens")


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite; the message names the step and the folder of the checkpoints."""


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
        progress: show a bar while calibrating; None: as `disable_tqdm` says.
        refresh_every: steps after which an adapter with complete bases gets new ones, again and again (see
            `refresh_adapter`); not under FSDP or DeepSpeed. None: never.
        own_optimizer: False leaves the optimizer to the Trainer (`optim`, `optimizer_cls_and_kwargs`), for a model
            without SparseGrad layers.

    Raises:
        ValueError: another optimizer was asked for (`optim`, `optimizer_cls_and_kwargs`); or one was passed in, and
            `density`, `k` or `rest_learning_rate` as well, which it would not know; `refresh_every` with truncated
            bases or a sharded model.
    """

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
        self.sparsegrad_calibration = calibration
        self.sparsegrad_selection = {"density": density, "k": k}
        self.rest_learning_rate = rest_learning_rate
        self.stop_if_not_finite = stop_if_not_finite
        self.calibration_progress = progress
        self.own_optimizer = own_optimizer
        super().__init__(*args, **kwargs)
        given = {"density": density, "k": k, "rest_learning_rate": rest_learning_rate}
        lost = [f"{name}={value}" for name, value in given.items() if value is not None]
        if refresh_every is not None:
            if refresh_every < 1:
                raise ValueError(f"refresh_every must be at least 1, found {refresh_every}")
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError("refresh_every is not for models that FSDP or DeepSpeed shards; leave it out")
            for name, peft_config in _active(self.model).items():
                if not peft_config.sizes.complete:
                    raise ValueError(truncated(name))
            self.add_callback(_Refreshing(self, refresh_every))
        if self.optimizer is not None:
            if lost:
                raise ValueError(f"an optimizer was passed in, which does not know {', '.join(lost)}; give one of both")
        elif not own_optimizer:
            if lost:
                raise ValueError(f"own_optimizer=False, and the Trainer's does not know {', '.join(lost)}")
        elif self.optimizer_cls_and_kwargs or self.args.optim not in ("adamw_torch", "adamw_torch_fused"):
            cls = self.optimizer_cls_and_kwargs
            kind = cls[0].__name__ if cls else getattr(self.args.optim, "value", self.args.optim)
            raise ValueError(
                f"found optimizer {kind}, and the one made here is SparseGradAdamW; pass optimizers=(optimizer, None), "
                "or use the trainer without SparseGradTrainerMixin, with callbacks=[SparseGradCalibration()]"
            )

    def create_optimizer(self: Any, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Calibrate what has no bases yet, then `SparseGradAdamW`; an optimizer that was passed in is kept.

        Raises:
            ValueError: an uncalibrated adapter under FSDP or DeepSpeed, whose weights are sharded by then, or with an
                optimizer that was passed in; and whatever calibration and optimizer refuse.
        """
        names = uncalibrated(self.model)
        if not self.own_optimizer and not names:
            made: torch.optim.Optimizer = super().create_optimizer()  # type: ignore[misc]
            return made
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
        show = not self.args.disable_tqdm if self.calibration_progress is None else self.calibration_progress
        self._on_training_batches(calibrate_adapter, adapter_name=adapter_name, progress=show)

    def _refresh(self: Any, adapter_name: str) -> None:
        self._on_training_batches(refresh_adapter, optimizer=self.optimizer, adapter_name=adapter_name, progress=False)

    def _on_training_batches(self: Any, calibrates: Callable[..., Any], **options: Any) -> None:
        """On the training loader, through `compute_loss`; the trainer is then as if it had not happened."""

        def loss_of(model: nn.Module, batch: Any) -> Tensor:
            # The model is not prepared yet, which is where bfloat16 comes in. Not float16: it needs scaled losses.
            precision = self.accelerator.autocast() if self.args.bf16 else nullcontext()
            with self.compute_loss_context_manager(), precision:
                loss: Tensor = self.compute_loss(model, self._prepare_inputs(batch))
            return loss

        # TRL's trainers count in compute_loss what they log.
        counted = {name: copy.deepcopy(vars(self)[name]) for name in _COUNTED if name in vars(self)}
        try:
            with closing(_Batches(self.get_train_dataloader)) as batches:
                calibrates(self.model, batches, loss_fn=loss_of, config=self.sparsegrad_calibration, **options)
        finally:
            vars(self).update(counted)

    def _groups(self: Any, model: nn.Module) -> list[dict[str, Any]]:
        """The adapter's parameters first, then the rest, with weight decay where the Trainer would have it."""
        own, has_cores = adapter_parameters(model)
        selects = any(value is not None for value in self.sparsegrad_selection.values())
        if selects and not has_cores:
            raise ValueError("density and k select from the cores of SparseGrad layers; found a model without any")
        if self.rest_learning_rate is not None and not own:
            raise ValueError("rest_learning_rate is that of what trains beside an adapter; found a model without one")
        groups = param_groups(model, **self.sparsegrad_selection) if has_cores else []
        groups = [
            group for group in groups if id(group["params"][0]) in own
        ]  # the rest: below, with the Trainer's decay
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

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The Trainer's, and a check of its loss."""
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.stop_if_not_finite:
            losses = self.accelerator.gather(loss.reshape(1))  # all processes stop, or the others would wait for one
            bad = losses[~losses.isfinite()]
            if len(bad):
                raise TrainingDivergedError(
                    f"the loss of step {self.state.global_step + 1} is {bad[0].item()}; the step was not taken, "
                    f"training has stopped, and what was saved in {self.args.output_dir} is whole. Lower the learning "
                    f"rate, found {self.args.learning_rate}, or train in float32 or bfloat16"
                )
        return loss


class _Refreshing(TrainerCallback):
    """After a step, and before its checkpoint is written: a resumed run goes on with the same bases and moments."""

    def __init__(self, trainer: Any, every: int) -> None:
        self.trainer, self.every = trainer, every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """New bases where the number of steps says so; after the last step there is nothing to have them for."""
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            for name in calibrated(self.trainer.model):
                self.trainer._refresh(name)


class SparseGradTrainer(SparseGradTrainerMixin, Trainer):
    """`transformers.Trainer` that calibrates the adapter before its first step and trains it with `SparseGradAdamW`."""


class SparseGradCalibration(TrainerCallback):
    """Gives the adapters of a model their bases when training begins, in any trainer that has callbacks.

    The loss is the model's own, `model(**batch).loss`; `SparseGradTrainerMixin` takes the trainer's. The trainer's
    optimizer already exists by then, so the callback puts the new cores in the place of the old ones in it; an
    optimizer that has state, or a model that is wrapped for several processes, is too late for that and refused.

    Args:
        config: how to calibrate; None: as `calibrate_adapter` does.
    """

    def __init__(self, config: CalibrationConfig | None = None) -> None:
        self.config = config

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate; nothing to do where an adapter has its bases, such as after resuming.

        Raises:
            ValueError: it is too late; and whatever calibration refuses.
        """
        model, optimizer, loader = kwargs["model"], kwargs["optimizer"], kwargs["train_dataloader"]
        names = uncalibrated(model)
        if names and (args.world_size > 1 or args.fsdp or args.deepspeed):
            raise ValueError(
                f"adapter {names[0]!r} has no bases yet, and the model is already wrapped for {args.world_size} "
                "processes, FSDP or DeepSpeed; use SparseGradTrainerMixin, or call calibrate_adapter before the "
                "trainer is made"
            )
        if names and optimizer.state:
            raise ValueError(
                f"adapter {names[0]!r} has no bases yet, and the optimizer has already trained; call calibrate_adapter "
                "before the trainer is made"
            )
        for name in names:
            old = {n: p for n, p in model.named_parameters() if p.requires_grad}
            with closing(_Batches(lambda: loader)) as batches:
                calibrate_adapter(model, batches, adapter_name=name, config=self.config, progress=not args.disable_tqdm)
            new = {id(old[n]): p for n, p in model.named_parameters() if n in old and p is not old[n]}
            for group in optimizer.param_groups:
                group["params"] = [new.get(id(parameter), parameter) for parameter in group["params"]]


def uncalibrated(model: nn.Module) -> list[str]:
    """Names of the active SparseGrad adapters that have no bases and want some."""
    return [name for name, config in _active(model).items() if not config.calibrated and not config.original_space]


def calibrated(model: nn.Module) -> list[str]:
    """Names of the active SparseGrad adapters that have bases."""
    return [name for name, config in _active(model).items() if config.calibrated]


def _active(model: nn.Module) -> dict[str, SparseGradConfig]:
    configs = getattr(model, "peft_config", {})
    if not configs:  # a transformers model without an adapter raises when it is asked for the active ones
        return {}
    active: Any = model.active_adapters
    names = active() if callable(active) else active
    return {name: configs[name] for name in names if isinstance(configs.get(name), SparseGradConfig)}


def adapter_parameters(model: nn.Module) -> tuple[set[int], bool]:
    """Ids of an adapter's own parameters, not of modules trained whole beside it; and whether they are our cores."""
    cores = {id(core) for module in model.modules() for _, core in getattr(module, "trained_cores", tuple)()}
    if cores:
        return cores, True
    prompts = getattr(model, "prompt_encoder", None)  # of prefix tuning and its like
    if isinstance(prompts, nn.Module):
        return {id(parameter) for parameter in prompts.parameters()}, False
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    names = {name for layer in layers for name in layer.adapter_layer_names}
    return {
        id(parameter)
        for layer in layers
        for name in names
        if (child := getattr(layer, name, None)) is not None
        for parameter in (child.parameters() if isinstance(child, nn.Module) else ())
    }, False


class _Batches:
    """A loader that is made when it is first read, where calibration puts back random numbers that have been drawn."""

    def __init__(self, make_loader: Callable[[], Any]) -> None:
        self.make_loader = make_loader
        self.loader: Any = None

    def __iter__(self) -> Iterator[Any]:
        if self.loader is None:
            self.loader = self.make_loader()
        return iter(self.loader)

    def close(self) -> None:
        """An accelerate loader that was not read to its end is still announced as being read: take that back."""
        state = getattr(self.loader, "gradient_state", None)
        if state is not None and self.loader in state.dataloader_references:
            self.loader.end()
