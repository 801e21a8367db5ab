"""The methods that a benchmark compares. Each one prepares a model and its optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import calibrate
from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.method.literal import LiteralSparseGradLinear
from sparsegrad_peft.method.optim import SparseGradAdamW
from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.method.surgery import param_groups, replace_linears, weight_bases
from sparsegrad_peft.tuner.calibration import calibrate_adapter

from ..methods.method import Setup
from ..methods.registry import METHODS as RUN_METHODS
from ..methods.settings import AdapterArguments, CalibrationArguments

DENSITY = 0.01
"""Share of the entries that a step updates in the paper."""
LEARNING_RATE = 1e-4
"""Of every optimizer; it does not change the time of a step."""


class NotInstalledError(Exception):
    """The package of a method is not installed."""


@dataclass
class Prepared:
    """A model that is ready to be trained, and its optimizer (None: nothing trains)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None


@dataclass
class Setting:
    """What all methods of a benchmark have in common."""

    model: nn.Module
    batch: dict[str, Tensor]
    targets: str
    "regular expression for the names of the MLP layers"
    train_rest: bool
    sizes: Sizes

    @property
    def target_names(self) -> list[str]:
        """Full names of the MLP layers."""
        return [name for name, _ in self.model.named_modules() if re.fullmatch(self.targets, name)]

    def loss(self) -> Tensor:
        """Return the loss of the batch."""
        loss: Tensor = self.model(**self.batch).loss
        return loss

    def freeze_mlp(self) -> list[nn.Parameter]:
        """Freeze the MLP layers, and all else unless the rest trains. Returns the parameters that train."""
        layers = tuple(f"{name}." for name in self.target_names)
        rest = []
        for name, parameter in self.model.named_parameters():
            trains = self.train_rest and not name.startswith(layers)
            parameter.requires_grad_(trains)
            rest += [parameter] if trains else []
        return rest

    def calibrate_groups(self) -> tuple[dict[str, list[str]], dict[str, Basis]]:
        """Return the groups of layers and a complete basis for each, from one backward pass on the batch.

        The quality of the bases does not change the time of a step.
        """
        groups = group_linears(self.model, self.targets)
        return groups, calibrate(self.model, step=self.loss, groups=groups, n_steps=1, progress=False).bases()

    def adapt(self, method: str, **settings: Any) -> nn.Module:
        """Prepare the model as a run with this method does. The rest trains without PEFT's frozen copies of it."""
        rest = self.freeze_mlp()
        sizes = {name: getattr(self.sizes, name) for name in ("narrow", "wide", "c", "r")}
        adapter = AdapterArguments(**{"target_modules": self.targets, **sizes, **settings})
        setup = Setup(adapter, CalibrationArguments(), None, False, (), None)
        adapted = RUN_METHODS[method].adapt(self.model, setup).model
        for parameter in rest:
            parameter.requires_grad_()
        return adapted


def _adamw(model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0) if trained else None


def _floor(setting: Setting) -> Prepared:
    """Backpropagate through the frozen MLP layers, as every method has to, and train nothing in them."""

    def require_grad(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    setting.freeze_mlp()
    for name in setting.target_names:
        setting.model.get_submodule(name).register_forward_hook(require_grad)
    return Prepared(setting.model, _adamw(setting.model))


def _sparsegrad(setting: Setting, density: float | None = None, **settings: Any) -> Prepared:
    adapted = setting.adapt("sparsegrad", **settings)
    step = lambda: adapted(**setting.batch).loss  # noqa: E731
    calibrate_adapter(adapted, step=step, n_steps=1, trajectory=None, progress=False)
    return Prepared(adapted, SparseGradAdamW(param_groups(adapted, density=density), lr=LEARNING_RATE))


def _plain_weights(setting: Setting) -> Prepared:
    groups, bases = setting.calibrate_groups()
    rest = setting.freeze_mlp()
    basis_of = weight_bases(setting.model, groups, bases)
    for weight in basis_of:
        weight.requires_grad_()
    parameters: list[dict[str, Any]] = [{"params": list(basis_of), "sparse": True, "density": DENSITY}]
    parameters += [{"params": rest}] if rest else []
    return Prepared(setting.model, SparseGradAdamW(parameters, lr=LEARNING_RATE, bases=basis_of))


def _literal(setting: Setting, products: str) -> Prepared:
    groups, bases = setting.calibrate_groups()
    setting.freeze_mlp()
    replace_linears(
        setting.model, groups, bases, LiteralSparseGradLinear.from_linear, density=DENSITY, products=products
    )
    return Prepared(setting.model, SparseGradAdamW(param_groups(setting.model), lr=LEARNING_RATE))


def _lora(setting: Setting, rank: int | None = None) -> Prepared:
    adapted = setting.adapt("lora", rank=rank)
    return Prepared(adapted, _adamw(adapted))


def _lora_fa(setting: Setting) -> Prepared:
    from peft.optimizers import create_lorafa_optimizer

    adapted: Any = setting.adapt("lora")
    rank = adapted.peft_config["default"].r
    return Prepared(adapted, create_lorafa_optimizer(adapted, r=rank, lora_alpha=rank, lr=LEARNING_RATE))


def _full(setting: Setting) -> Prepared:
    model = setting.adapt("full")
    return Prepared(model, _adamw(model))


def _galore(setting: Setting) -> Prepared:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise NotInstalledError("galore-torch is not installed (pip install galore-torch)") from error
    model = setting.adapt("full")
    layers = [model.get_parameter(f"{name}.weight") for name in setting.target_names]
    own = set(layers)
    others = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in own]
    projected = {"params": layers, "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return Prepared(model, GaLoreAdamW([projected, {"params": others}], lr=LEARNING_RATE))


@dataclass(frozen=True)
class BenchMethod:
    """A row of the table."""

    summary: str
    prepare: Callable[[Setting], Prepared]
    complete: bool = False
    "has complete bases, which take minutes to compute for a large model"


METHODS: dict[str, BenchMethod] = {
    "floor": BenchMethod("frozen MLP: input gradients only, nothing trains in it", _floor),
    "sparsegrad": BenchMethod("the default: neurons on the wide side, all entries of S train", _sparsegrad),
    "sparsegrad-topk": BenchMethod("the default, the largest 10 % of S in each step", lambda s: _sparsegrad(s, 0.1)),
    "sparsegrad-paper": BenchMethod("complete bases, the largest 1 % in each step, on plain weights", _plain_weights,
                                    complete=True),
    "sparsegrad-complete": BenchMethod(
        "the same as an adapter, as in the presets for the paper",
        lambda s: _sparsegrad(s, DENSITY, c="full", r="full", shared=True, prefer="speed"),
        complete=True,
    ),
    "literal": BenchMethod("the published layer, regular products", lambda s: _literal(s, "regular"), complete=True),
    "literal-sparse": BenchMethod("the published layer, sparse-by-dense products", lambda s: _literal(s, "sparse"),
                                  complete=True),
    "lora": BenchMethod("PEFT's LoRA with as many trained entries", _lora),
    "lora-rank-7": BenchMethod("PEFT's LoRA at the paper's rank for BERT-base", lambda s: _lora(s, 7)),
    "lora-fa": BenchMethod("LoRA-FA (PEFT's optimizer), the same rank as lora", _lora_fa),
    "full": BenchMethod("regular fine-tuning of the MLP layers, AdamW", _full),
    "galore": BenchMethod("GaLore on the MLP layers' weights, rank 128", _galore),
}  # fmt: skip
"""Name -> method."""
