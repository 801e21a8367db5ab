"""A method's name -> the adapted model, and what the trainer has to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PeftConfig, TaskType, get_peft_model
from torch import nn

from ..method.calibrate import CalibrationConfig
from ..method.groups import linear_shape
from ..method.hosvd import row_count
from ..tuner.config import SparseGradConfig
from ..tuner.targets import mlp_linears
from ..tuner.trainer import adapter_parameters
from .arguments import RunArguments

HEADS = ("classifier", "score", "pooler", "pre_classifier", "classification_head")
"""What is trained besides the adapter with `rest: freeze`: the layers between a pretrained model and its labels."""


@dataclass
class Adapted:
    """A model that is ready to be trained."""

    model: nn.Module
    calibration: CalibrationConfig | None = None
    density: float | None = None
    k: int | None = None


def adapt(model: nn.Module, arguments: RunArguments) -> Adapted:
    """Put the method's adapter into the model, in place; freeze and release the rest as asked.

    Raises:
        ValueError: no MLP layers found, a model whose parts share weights where all the rest is to be trained, and
            whatever PEFT refuses.
    """
    adapter = arguments.adapter
    targets = mlp_linears(model, adapter.target_modules)
    if arguments.method == "full":
        names = set(targets) | set(_heads(model))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(arguments.rest == "train" or any(f"{name}.".startswith(f"{n}.") for n in names))
        return Adapted(model)
    rest = _rest(model, targets) if arguments.rest == "train" else _heads(model)
    config: PeftConfig
    if arguments.method in ("sparsegrad", "meprop"):
        config = SparseGradConfig(
            task_type=TaskType.SEQ_CLS, c=adapter.c, r=adapter.r, shared=adapter.shared, prefer=adapter.prefer,
            original_space=arguments.method == "meprop", target_modules=adapter.target_modules, modules_to_save=rest,
        )  # fmt: skip
    elif arguments.method == "lora":
        rank = adapter.rank or matching_rank(model, targets, arguments)
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=rest
        )
    else:
        config = PeftConfig.from_peft_type(**PeftConfig.from_json_file(arguments.method))
    adapted = get_peft_model(model, config)
    calibration = arguments.calibration.config() if arguments.method == "sparsegrad" else None
    return Adapted(adapted, calibration, arguments.density, adapter.k)


def matching_rank(model: nn.Module, targets: list[str], arguments: RunArguments) -> int:
    """LoRA's rank with the number of trained entries nearest to that of SparseGrad's cores.

    Raises:
        ValueError: that number depends on the spectrum ("energy:...").
    """
    cores = per_rank = 0
    for name in targets:
        out_features, in_features = linear_shape(model.get_submodule(name), name)
        r, c = row_count(arguments.adapter.r, out_features), row_count(arguments.adapter.c, in_features)
        if r is None or c is None:
            raise ValueError(
                "adapter.rank: expected a rank, since that of equal size is not known for c and r by energy"
            )
        cores += r * c
        per_rank += out_features + in_features
    return max(1, round(cores / per_rank))


def _heads(model: nn.Module) -> list[str]:
    """Full names of the head's modules, the outermost of each."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in HEADS]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _rest(model: nn.Module, targets: list[str]) -> list[str]:
    """Full names of all other modules that hold parameters, the outermost of each that holds no target.

    PEFT keeps a frozen copy of each beside the trained one, so that the adapter can be switched off.

    Raises:
        ValueError: two of them share a parameter, which copies would not do any more.
    """
    found: list[str] = []
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        inside = any(name.startswith(f"{other}.") for other in found)
        if not own or name in targets or inside:
            continue
        if any(target.startswith(f"{name}.") for target in targets):
            raise ValueError(
                f"rest: train cannot save {name}, which has parameters of its own and holds layers to adapt; use "
                "rest: freeze"
            )
        for parameter in module.parameters():
            other = seen.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(f"rest: train cannot save {other} and {name}, which share a weight; use rest: freeze")
        found.append(name)
    return found


def trained_entries(model: nn.Module) -> dict[str, Any]:
    """How many numbers are trained: in the MLP layers, and in all."""
    own, _ = adapter_parameters(model)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        "adapter": sum(p.numel() for p in trainable if id(p) in own),
        "all": sum(p.numel() for p in trainable),
        "model": sum(p.numel() for p in model.parameters()),
    }
