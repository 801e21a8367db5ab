"""Method `sparsegrad`: SparseGrad as a PEFT adapter, with bases from a calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsegrad_peft.method.sizes import Sizes

from .method import CALIBRATION, FORM, LAYERS, LOOP, SELECTION, SIZES, Adapted, Method, Setup
from .settings import AdapterArguments, CalibrationArguments

if TYPE_CHECKING:
    from torch import nn

    from sparsegrad_peft.method.config import CalibrationConfig


class SparseGrad(Method):
    """Trains a small core per layer, in bases in which the gradient is sparse."""

    name = "sparsegrad"
    order = 0
    summary = "a sparse adapter in bases computed from gradients"
    learning_rate = 2e-3
    reads = (
        LAYERS | LOOP | SELECTION | CALIBRATION | SIZES | FORM
        | {"adapter.shared", "adapter.prefer", "calibration.refresh"}
    )  # fmt: skip
    original_space = False
    "train in the original space, without bases"

    def problems(self, adapter: AdapterArguments, calibration: CalibrationArguments) -> list[str]:
        """`calibration.refresh` without complete bases."""
        if calibration.refresh is None or adapter.sizes.complete:
            return []
        return [f"calibration.refresh is for complete bases (adapter.c and r: full), found sizes {adapter.sizes}"]

    def why_not_four_bits(self, adapter: AdapterArguments) -> str | None:
        """Trained entries and bases as large as the weights, which would need more memory than 4 bits save."""
        if self.original_space or adapter.sizes.complete:
            return "with complete cores trains as many float32 entries as the weights have"
        return None

    def adapts_experts(self, adapter: AdapterArguments) -> bool:
        """True for the form with neurons, and in the original space."""
        return self.original_space or adapter.form[0]

    def target_layers(self, model: nn.Module, adapter: AdapterArguments) -> list[str]:
        """Names of the layers to adapt, checked against the sizes and `k`."""
        from .training.layers import check_sizes

        targets = super().target_layers(model, adapter)
        check_sizes(model, targets, Sizes() if self.original_space else adapter.sizes, adapter.k)
        return targets

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Add the adapter. The trainer calibrates it before the first step."""
        from peft import get_peft_model

        from sparsegrad_peft.tuner.config import SparseGradConfig

        from .training.layers import modules_to_save, split_targets

        adapter, targets = setup.adapter, self.target_layers(model, setup.adapter)
        linears, fused = split_targets(model, targets)
        narrow, wide = (None, None) if adapter.sizes.by_side else (adapter.narrow, adapter.wide)
        config = SparseGradConfig(
            task_type=setup.task_type, narrow=narrow, wide=wide, c=adapter.c, r=adapter.r,
            trained_share=adapter.trained_share, neurons=adapter.neurons, exponent=adapter.exponent,
            shared=adapter.shared, prefer=adapter.prefer, original_space=self.original_space,
            target_modules=adapter.target_modules if adapter.layers is None else linears,
            target_parameters=None if adapter.layers is None else fused,
            modules_to_save=modules_to_save(model, targets, setup.heads, train_rest=setup.train_rest),
        )  # fmt: skip
        calibration = None if self.original_space else calibration_config(setup.calibration.resolved(adapter.sizes))
        return Adapted(get_peft_model(model, config), calibration, setup.density, adapter.k)


def calibration_config(arguments: CalibrationArguments) -> CalibrationConfig:
    """These settings in the library's form; without `resolved`, single gradients are decomposed by default."""
    from sparsegrad_peft.method.config import CalibrationConfig, Trajectory, sign_step

    trajectory = None if arguments.walk is None else Trajectory(arguments.walk, sign_step)
    return CalibrationConfig(
        n_steps=arguments.n_steps, trajectory=trajectory, normalize=arguments.normalize,
        mean_gradient=bool(arguments.mean_gradient),
    )  # fmt: skip


METHOD = SparseGrad()
