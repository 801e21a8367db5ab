"""A method's name -> the adapted model, and what the trainer has to know of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from sparsegrad_peft.method.config import CalibrationConfig, Trajectory, sign_step
from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.tuner.config import SparseGradConfig
from sparsegrad_peft.tuner.targets import mlp_linears

from ..run.settings import METHODS, WHOLE, CalibrationArguments, RunArguments
from ..run.trainer import RunTrainer
from ..tasks.kinds import KINDS
from ..tasks.registry import kind_of
from .literal import LiteralLayers, LiteralTrainer


@dataclass
class Adapted:
    """A model that is ready to be trained."""

    model: nn.Module
    calibration: CalibrationConfig | None = None
    density: float | None = None
    k: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    "for `TrainingArguments`, where the Trainer makes the optimizer itself"
    trainer: Callable[..., RunTrainer] = RunTrainer
    targets: Sequence[str] = ()
    "names of the layers whose own weights are trained, where there is no adapter"


def adapt(model: nn.Module, arguments: RunArguments) -> Adapted:
    """Put the method's adapter into the model, in place; freeze and release the rest as asked.

    Raises:
        ValueError: no MLP layers found, sizes above a layer's own, a model whose parts share weights where all the rest
            is to be trained, and whatever PEFT refuses.
    """
    if arguments.method not in METHODS:
        return _from_file(model, arguments)
    adapter, kind = arguments.adapter, KINDS[kind_of(arguments.task)]
    targets, heads = check_layers(model, arguments), _heads(model, kind.heads)
    if arguments.method == "literal":
        _release(model, None if arguments.rest == "train" else heads, but=targets)
        groups = group_linears(model, "|".join(map(re.escape, targets)), shared=adapter.shared)
        literal = LiteralLayers(groups, adapter.products, adapter.k, arguments.density)
        return Adapted(
            model, calibration_config(arguments.calibration), trainer=partial(LiteralTrainer, literal=literal),
            targets=targets,
        )  # fmt: skip
    if arguments.method in WHOLE:
        _release(model, None if arguments.rest == "train" else [*targets, *heads])
        optimizer = _galore(model, targets, arguments) if arguments.method == "galore" else {}
        return Adapted(model, optimizer=optimizer, targets=targets)
    rest = _rest(model, targets, heads) if arguments.rest == "train" else heads
    config: PeftConfig
    if arguments.method in ("sparsegrad", "meprop"):
        config = SparseGradConfig(
            task_type=kind.task_type, narrow=adapter.narrow, wide=adapter.wide, c=adapter.c, r=adapter.r,
            shared=adapter.shared, prefer=adapter.prefer, original_space=arguments.method == "meprop",
            target_modules=adapter.target_modules if adapter.layers is None else targets, modules_to_save=rest,
        )  # fmt: skip
    else:
        rank = adapter.rank or matching_rank(model, targets, arguments)
        config = LoraConfig(
            task_type=kind.task_type, r=rank, lora_alpha=rank, target_modules=targets, modules_to_save=rest
        )
    adapted = get_peft_model(model, config)
    calibration = calibration_config(arguments.calibration) if arguments.method == "sparsegrad" else None
    return Adapted(adapted, calibration, arguments.density, adapter.k)


def _release(model: nn.Module, names: list[str] | None, but: Sequence[str] = ()) -> None:
    """Train the modules with these names, None: all of them, and freeze the others, as well as those in `but`."""

    def within(parameter: str, modules: Sequence[str]) -> bool:
        return any(parameter.startswith(f"{module}.") for module in modules)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_((names is None or within(name, names)) and not within(name, but))


def _galore(model: nn.Module, targets: list[str], arguments: RunArguments) -> dict[str, Any]:
    """GaLore of `transformers` on the layers' weights, AdamW on the rest; new projections every 50 steps."""
    smaller = min(min(linear_shape(model.get_submodule(name), name)) for name in targets)
    rank = arguments.adapter.rank or max(1, smaller // 4)
    return {
        "optim": "galore_adamw", "optim_target_modules": targets,
        "optim_args": f"rank={rank},update_proj_gap=50,scale=1.0",
    }  # fmt: skip


def _from_file(model: nn.Module, arguments: RunArguments) -> Adapted:
    """Any of PEFT's methods, from its own adapter_config.json.

    What it says of inference and base is of the adapter that was saved with it. Its own `modules_to_save` goes before
    `rest`. Modules that it calls "mlp" are the MLP linears of the model, which PEFT has no word for.
    """
    config, kind = read_config(arguments.method), KINDS[kind_of(arguments.task)]
    for name in ("target_modules", "feedforward_modules"):
        if getattr(config, name, None) == "mlp":
            setattr(config, name, set(mlp_linears(model)))
    config.inference_mode, config.task_type, config.base_model_name_or_path = False, kind.task_type, None
    if getattr(config, "modules_to_save", None) is None and hasattr(config, "modules_to_save"):
        targets = [] if arguments.rest == "freeze" else mlp_linears(model, getattr(config, "target_modules", None))
        heads = _heads(model, kind.heads)
        config.modules_to_save = _rest(model, targets, heads) if targets else heads
    ours = isinstance(config, SparseGradConfig)
    if isinstance(config, SparseGradConfig):
        config.forget_bases()  # those of the adapter that was saved with it
    adapted = get_peft_model(model, config)
    return Adapted(adapted, calibration_config(arguments.calibration) if ours else None)


def read_config(path: str) -> PeftConfig:
    """PEFT's config in a file.

    Raises:
        ValueError: it is none.
    """
    try:
        words = PeftConfig.from_json_file(path)
        kind = words.pop("peft_type", None) if isinstance(words, dict) else type(words).__name__
        if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
            raise ValueError(f"expected a peft_type such as LORA, found {kind!r}")
        return PeftConfig.from_peft_type(peft_type=kind, **words)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected an adapter_config.json of PEFT ({error})") from error


def calibration_config(arguments: CalibrationArguments) -> CalibrationConfig:
    """For `calibrate`."""
    trajectory = None if arguments.walk is None else Trajectory(arguments.walk, sign_step)
    return CalibrationConfig(n_steps=arguments.n_steps, trajectory=trajectory, normalize=arguments.normalize)


def check_layers(model: nn.Module, arguments: RunArguments) -> list[str]:
    """Names of the MLP layers that a method of ours adapts, held against what was asked for; needs no weights.

    Raises:
        ValueError: there are none, or see `check_sizes`.
    """
    if arguments.method not in METHODS:
        return []
    targets = in_layers(mlp_linears(model, arguments.adapter.target_modules), arguments.adapter.layers)
    if arguments.method in ("sparsegrad", "meprop", "literal"):
        check_sizes(model, targets, arguments)
    return targets


def in_layers(targets: list[str], layers: list[int] | None) -> list[str]:
    """Those of the layers that are in the blocks with these numbers; None: all of them.

    Raises:
        ValueError: there is no block with such a number.
    """
    if layers is None:
        return targets
    block = {name: next((int(part) for part in name.split(".") if part.isdigit()), None) for name in targets}
    there = sorted({number for number in block.values() if number is not None})
    unknown = [number for number in layers if number not in there]
    if unknown:
        raise ValueError(
            f"adapter.layers: expected numbers of blocks that hold layers to adapt, {', '.join(map(str, there))}; "
            f"found {', '.join(map(str, unknown))}"
        )
    return [name for name in targets if block[name] in layers]


def check_sizes(model: nn.Module, targets: list[str], arguments: RunArguments) -> None:
    """Hold the sizes and k against the layers, which calibration and optimizer would do too, minutes later.

    Raises:
        ValueError: one of them is above what a layer has; the message names the layer and its size.
    """
    adapter = arguments.adapter
    for name in targets:
        rows, columns = linear_shape(model.get_submodule(name), name)
        if arguments.method == "sparsegrad":
            sizes_of(arguments).check(rows, columns, name)
            r, c = sizes_of(arguments).counts(rows, columns)
            # By energy, the size is known after calibration; it is at most the layer's.
            rows, columns = r or rows, c or columns
        if adapter.k is not None and adapter.k > rows * columns:
            raise ValueError(
                f"adapter.k: expected at most {rows * columns:,} entries, which is what {name} trains ({rows} by "
                f"{columns}); found {adapter.k:,}"
            )


def sizes_of(arguments: RunArguments) -> Sizes:
    """Rows of the bases, by the shape of a layer."""
    adapter = arguments.adapter
    return Sizes(adapter.narrow, adapter.wide, adapter.c, adapter.r)


def matching_rank(model: nn.Module, targets: list[str], arguments: RunArguments) -> int:
    """LoRA's rank with the number of trained entries nearest to that of SparseGrad's cores.

    Raises:
        ValueError: that number depends on the spectrum ("energy:...").
    """
    cores = per_rank = 0
    for name in targets:
        out_features, in_features = linear_shape(model.get_submodule(name), name)
        r, c = sizes_of(arguments).counts(out_features, in_features)
        if r is None or c is None:
            raise ValueError("adapter.rank: expected a rank, since that of equal size is not known for sizes by energy")
        cores += r * c
        per_rank += out_features + in_features
    return max(1, round(cores / per_rank))


def _heads(model: nn.Module, heads: tuple[str, ...]) -> list[str]:
    """Full names of the head's modules, the outermost of each: what is trained besides the adapter in any case."""
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in heads]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def _rest(model: nn.Module, targets: list[str], heads: list[str]) -> list[str]:
    """Full names of the head's modules and of all other modules with parameters of their own, but for the targets.

    PEFT keeps a frozen copy of each beside the trained one, so that the adapter can be switched off.

    Raises:
        ValueError: two of them share a parameter, which copies would not do any more.
    """
    found: list[str] = []
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=name in heads))  # heads as a whole: PEFT would save these whole itself
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
