"""Method `galore`: GaLore, the optimizer with projected gradients, on the MLP layers' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .full import Full
from .method import Adapted, Setup
from .settings import AdapterArguments, CalibrationArguments

if TYPE_CHECKING:
    from torch import nn


class GaLore(Full):
    """GaLore of `transformers` on the layers' weights, AdamW on the rest. New projections every 50 steps."""

    name = "galore"
    order = 4
    summary = "GaLore, AdamW on low-rank projections of the layers' gradients"
    learning_rate = 1e-3
    reads = Full.reads - {"training.weight_decay"} | {"adapter.rank"}  # transformers gives its groups no weight decay

    def problems(self, adapter: AdapterArguments, calibration: CalibrationArguments) -> list[str]:
        """The package `galore-torch` is missing."""
        return [] if find_spec("galore_torch") else ["method galore needs its package: pip install galore-torch"]

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Freeze what is not trained."""
        from .training.galore import GaLoreTrainer

        return replace(super().adapt(model, setup), trainer=GaLoreTrainer)

    def optimizer(self, model: nn.Module, targets: Sequence[str], setup: Setup) -> dict[str, Any]:
        """GaLore, by `transformers`' own name."""
        from sparsegrad_peft.method.groups import linear_shape

        smallest_side = min(min(linear_shape(model.get_submodule(name), name)) for name in targets)
        rank = setup.adapter.rank or max(1, smallest_side // 4)
        return {
            "optim": "galore_adamw",
            "optim_target_modules": targets,
            "optim_args": f"rank={rank},update_proj_gap=50,scale=1.0",
        }


METHOD = GaLore()
