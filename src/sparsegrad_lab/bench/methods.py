"""The methods that a benchmark compares: a model with an adapter in it, and what its optimizer is."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import Calibration, calibrate
from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.method.literal import LiteralSparseGradLinear
from sparsegrad_peft.method.optim import SparseGradAdamW
from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.method.surgery import param_groups, replace_linears
from sparsegrad_peft.tuner.calibration import calibrate_adapter
from sparsegrad_peft.tuner.config import SparseGradConfig

DENSITY = 0.01  # the paper's share of entries a step
_RATE = 1e-4  # of every optimizer: its size does not change what a step costs


@dataclass
class Prepared:
    """A model that is ready to be trained, and its optimizer (None: nothing is learnt)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None


@dataclass
class Setting:
    """What all methods of a run have in common."""

    model: nn.Module
    batch: dict[str, Tensor]
    targets: str
    train_rest: bool
    sizes: Sizes

    @property
    def target_names(self) -> list[str]:
        """Full names of the MLP's layers."""
        return [name for name, _ in self.model.named_modules() if re.fullmatch(self.targets, name)]

    @property
    def groups(self) -> dict[str, list[str]]:
        """The layers by role and shape."""
        return group_linears(self.model, self.target_names)

    def freeze(self) -> list[nn.Parameter]:
        """Freeze what does not train whatever the method: the MLP, or all; returns what trains besides an adapter."""
        names = self.target_names
        rest = []
        for name, parameter in self.model.named_parameters():
            trains = self.train_rest and not any(name.startswith(f"{target}.") for target in names)
            parameter.requires_grad_(trains)
            rest += [parameter] if trains else []
        return rest

    def calibration(self) -> Calibration:
        """From the batch itself: how good the bases are changes nothing here."""
        return calibrate(self.model, step=self.loss, groups=self.groups, n_steps=1, progress=False)

    def loss(self) -> Tensor:
        """Of the batch."""
        loss: Tensor = self.model(**self.batch).loss
        return loss

    @property
    def entries(self) -> int:
        """Trained entries of all layers under SparseGrad's sizes."""
        total = 0
        for name in self.target_names:
            r, c = self.sizes.counts(*linear_shape(self.model.get_submodule(name), name))
            assert r is not None
            assert c is not None
            total += r * c
        return total

    @property
    def rank(self) -> int:
        """LoRA's rank with the nearest number of entries."""
        shapes = [linear_shape(self.model.get_submodule(name), name) for name in self.target_names]
        return max(1, round(self.entries / sum(out + in_ for out, in_ in shapes)))


def _adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    return torch.optim.AdamW(params, lr=_RATE, weight_decay=0.0) if params else None


def _weights(setting: Setting) -> list[nn.Parameter]:
    weights = [setting.model.get_parameter(f"{name}.weight") for name in setting.target_names]
    for weight in weights:
        weight.requires_grad_()
    return weights


def _floor(setting: Setting) -> Prepared:
    """Backward goes as far as any adapter's, and learns nothing on the way."""

    def ask(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()

    rest = setting.freeze()
    for name in setting.target_names:
        setting.model.get_submodule(name).register_forward_hook(ask)
    return Prepared(setting.model, _adamw(rest))


def _adapter(setting: Setting, density: float | None = None, complete: bool = False, **options: Any) -> Prepared:
    from peft import get_peft_model

    rest = setting.freeze()
    sizes = Sizes("full", "full") if complete else setting.sizes
    config = SparseGradConfig(
        target_modules=setting.targets, narrow=sizes.narrow, wide=sizes.wide, c=sizes.c, r=sizes.r, **options
    )
    adapted = get_peft_model(setting.model, config)
    step = lambda: adapted(**setting.batch).loss  # noqa: E731
    calibrate_adapter(adapted, step=step, n_steps=1, trajectory=None, progress=False)
    for parameter in rest:  # PEFT has frozen it
        parameter.requires_grad_()
    return Prepared(adapted, SparseGradAdamW(param_groups(adapted, density=density), lr=_RATE))


def _paper(setting: Setting) -> Prepared:
    groups, bases = setting.groups, setting.calibration().bases()
    rest = setting.freeze()
    of: dict[nn.Parameter, Basis] = {}
    for group, names in groups.items():
        for name in names:
            weight = setting.model.get_parameter(f"{name}.weight")
            weight.requires_grad_()
            of[weight] = bases[group]
    found = [{"params": list(of), "sparse": True, "density": DENSITY}, *([{"params": rest}] if rest else [])]
    return Prepared(setting.model, SparseGradAdamW(found, lr=_RATE, bases=of))


def _literal(setting: Setting, products: str) -> Prepared:
    groups, bases = setting.groups, setting.calibration().bases()
    setting.freeze()
    replace_linears(
        setting.model, groups, bases, LiteralSparseGradLinear.from_linear, density=DENSITY, products=products
    )
    return Prepared(setting.model, SparseGradAdamW(param_groups(setting.model), lr=_RATE))


def _lora(setting: Setting, rank: int | None = None, *, frozen_a: bool = False) -> Prepared:
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_lorafa_optimizer

    rest = setting.freeze()
    r = rank or setting.rank
    adapted = get_peft_model(
        setting.model,
        LoraConfig(r=r, lora_alpha=r, target_modules=setting.targets),
    )
    for parameter in rest:
        parameter.requires_grad_()
    if frozen_a:
        return Prepared(adapted, create_lorafa_optimizer(adapted, r=r, lora_alpha=r, lr=_RATE))
    return Prepared(adapted, _adamw([p for p in adapted.parameters() if p.requires_grad]))


def _full(setting: Setting) -> Prepared:
    rest = setting.freeze()
    return Prepared(setting.model, _adamw(_weights(setting) + rest))


def _galore(setting: Setting) -> Prepared:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError as error:
        raise NotInstalledError("galore-torch is not installed (pip install galore-torch)") from error
    rest = setting.freeze()
    weights = {"params": _weights(setting), "rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    return Prepared(setting.model, GaLoreAdamW([weights, *([{"params": rest}] if rest else [])], lr=_RATE))


class NotInstalledError(Exception):
    """A method's package is not installed."""


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    words: str
    prepare: Callable[[Setting], Prepared]
    complete: bool = False
    "has square bases of each side, whose decomposition takes minutes for large models"


METHODS: dict[str, Method] = {
    "floor": Method("frozen MLP, input gradients only, nothing learnt there", _floor),
    "sparsegrad": Method("the default: leading rows of both bases, every entry of S trained", _adapter),
    "sparsegrad-speed": Method('... with prefer="speed"', lambda s: _adapter(s, prefer="speed")),
    "sparsegrad-topk": Method("... the largest 10 % of S in each step", lambda s: _adapter(s, density=0.1)),
    "sparsegrad-paper": Method("complete bases, the largest 1 % in each step, on plain weights", _paper, True),
    "sparsegrad-complete": Method(
        "... as an adapter, as the paper's presets have it",
        lambda s: _adapter(s, density=DENSITY, complete=True, shared=True, prefer="speed"),
        True,
    ),
    "literal": Method("as published, regular products", lambda s: _literal(s, "regular"), True),
    "literal-sparse": Method("as published, sparse-by-dense products", lambda s: _literal(s, "sparse"), True),
    "lora": Method("PEFT's LoRA at as many trained entries", _lora),
    "lora-rank-7": Method("PEFT's LoRA at the paper's rank for BERT-base", lambda s: _lora(s, 7)),
    "lora-fa": Method("LoRA-FA, PEFT's optimizer, the same rank", lambda s: _lora(s, frozen_a=True)),
    "full": Method("regular fine-tuning of the MLP's weights, AdamW", _full),
    "galore": Method("GaLore on the MLP's weights, rank 128", _galore),
}
"""Name -> method."""
