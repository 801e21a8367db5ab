"""Method `literal`: SparseGrad as published, with complete bases in place of the layers' own weights."""

from __future__ import annotations

import re
from functools import partial
from typing import TYPE_CHECKING

from sparsegrad_peft.method.sizes import Sizes

from .method import CALIBRATION, LAYERS, SELECTION, Adapted, Method, Setup
from .settings import AdapterArguments, CalibrationArguments
from .sparsegrad import calibration_config

if TYPE_CHECKING:
    from torch import nn


class Literal(Method):
    """Trains the layers' weights in the bases; a run leaves a model with plain weights.

    Each backward pass selects entries of its own. Micro-batches would add up to more entries than asked for, so
    gradient accumulation is refused.
    """

    name = "literal"
    order = 5
    summary = "the published layer, with complete bases"
    learning_rate = 1e-3
    density = 0.01
    leaves = "model"
    reads = LAYERS | SELECTION | CALIBRATION | {"adapter.products", "adapter.shared", "training.rest_learning_rate"}

    def problems(self, adapter: AdapterArguments, calibration: CalibrationArguments) -> list[str]:
        """Sizes other than complete bases."""
        if {adapter.c, adapter.r} <= {None, "full"}:
            return []
        return [f"method literal has complete bases: leave out adapter.c and r; found {adapter.c} and {adapter.r}"]

    def target_layers(self, model: nn.Module, adapter: AdapterArguments) -> list[str]:
        """Names of the layers to replace, checked against `k`."""
        from .training.layers import check_sizes

        targets = super().target_layers(model, adapter)
        check_sizes(model, targets, Sizes(), adapter.k)
        return targets

    def adapt(self, model: nn.Module, setup: Setup) -> Adapted:
        """Freeze what is not trained. The trainer calibrates and replaces the layers before the first step."""
        from sparsegrad_peft.method.groups import group_linears

        from .training.layers import head_modules, train_only
        from .training.literal import LiteralLayers, LiteralTrainer

        adapter, targets = setup.adapter, self.target_layers(model, setup.adapter)
        train_only(model, None if setup.train_rest else head_modules(model, setup.heads), but=targets)
        groups = group_linears(model, "|".join(map(re.escape, targets)), shared=adapter.shared)
        layers = LiteralLayers(groups, adapter.products, adapter.k, setup.density)
        trainer = partial(LiteralTrainer, literal=layers)
        return Adapted(model, calibration_config(setup.calibration), trainer=trainer, targets=targets)


METHOD = Literal()
