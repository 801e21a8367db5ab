"""Which modules a run adapts, which it trains whole, and which it freezes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from sparsegrad_peft.method.experts import owner_of, target_shape
from sparsegrad_peft.method.sizes import Sizes
from sparsegrad_peft.tuner.targets import fused_experts, mlp_linears


def target_layers(
    model: nn.Module, target_modules: str | list[str] | None, blocks: list[int] | None, *, experts: bool = False
) -> list[str]:
    """Full names of the layers to adapt, and of fused experts' parameters.

    Args:
        model: the model, also on the meta device.
        target_modules: which layers, as in PEFT; None: the MLP layers.
        blocks: only the layers in the blocks with these numbers; None: all.
        experts: with the fused experts, unless `target_modules` is given.

    Raises:
        ValueError: there are no such layers, or no block with such a number.
    """
    fused = list(fused_experts(model)) if experts and target_modules is None else []
    try:
        targets = mlp_linears(model, target_modules) + fused
    except ValueError:
        if not fused:
            raise
        targets = fused
    if blocks is None:
        return targets
    block_of = {name: block_number(name) for name in targets}
    known = sorted({block for block in block_of.values() if block is not None})
    if unknown := [block for block in blocks if block not in known]:
        raise ValueError(
            f"adapter.layers: expected numbers of blocks that hold layers to adapt, {', '.join(map(str, known))}; "
            f"found {', '.join(map(str, unknown))}"
        )
    return [name for name in targets if block_of[name] in blocks]


def block_number(name: str) -> int | None:
    """Return the number of the block that holds the layer with this full name: the first number in the name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def split_targets(model: nn.Module, targets: Sequence[str]) -> tuple[list[str], list[str]]:
    """PEFT's `target_modules` and `target_parameters` of these layers and parameters."""
    fused = [name for name in targets if owner_of(model, name)[1] is not None]
    return [name for name in targets if name not in fused], fused


def check_sizes(model: nn.Module, targets: Sequence[str], sizes: Sizes, k: int | None) -> None:
    """Check the sizes of the bases and `k` against the layers, minutes before calibration would find the same.

    Raises:
        ValueError: one of them is larger than a layer allows; the message names the layer and its size.
    """
    for name in targets:
        out_features, in_features = target_shape(model, name)
        sizes.check(out_features, in_features, name)
        r, c = sizes.counts(out_features, in_features)
        rows, columns = r or out_features, c or in_features  # a size by energy is at most the layer's
        if k is not None and k > rows * columns:
            raise ValueError(
                f"adapter.k: expected at most {rows * columns:,} entries, which is what {name} trains ({rows} by "
                f"{columns}); found {k:,}"
            )


def head_modules(model: nn.Module, heads: Sequence[str]) -> list[str]:
    """Full names of the head's modules, the outermost ones. They are trained with every method.

    Args:
        model: the model.
        heads: last parts of their names, such as "classifier".
    """
    found = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in heads]
    return [name for name in found if not any(name.startswith(f"{other}.") for other in found)]


def modules_to_save(
    model: nn.Module, targets: Sequence[str], heads: Sequence[str], *, train_rest: bool
) -> list[str]:  # fmt: skip
    """Full names of the modules that an adapter trains whole.

    PEFT keeps a frozen copy of each of them, so that the adapter can be switched off.

    Args:
        model: the model.
        targets: names of the adapted layers.
        heads: last parts of the head modules' names.
        train_rest: everything except the targets; False: only the head.

    Raises:
        ValueError: two modules share a weight, which their copies would not.
    """
    full_heads = head_modules(model, heads)
    if not train_rest:
        return full_heads
    found: list[str] = []
    owner: dict[int, str] = {}
    for name, module in model.named_modules():
        parameters = list(module.parameters(recurse=name in full_heads))  # PEFT saves a head whole
        inside = any(name.startswith(f"{other}.") for other in found)
        if not parameters or name in targets or inside:
            continue
        if any(target.startswith(f"{name}.") for target in targets):
            raise ValueError(
                f"rest: train cannot save {name}, which has parameters of its own and contains layers to adapt; use "
                "rest: freeze"
            )
        for parameter in module.parameters():
            other = owner.setdefault(id(parameter), name)
            if other != name:
                raise ValueError(f"rest: train cannot save {other} and {name}, which share a weight; use rest: freeze")
        found.append(name)
    return found


def train_only(model: nn.Module, names: Sequence[str] | None, but: Sequence[str] = ()) -> None:
    """Freeze all parameters except those of the named modules.

    Args:
        model: the model.
        names: modules to train; None: all of them.
        but: modules to freeze in any case.
    """

    def within(parameter: str, modules: Sequence[str]) -> bool:
        return any(parameter.startswith(f"{module}.") for module in modules)

    for name, parameter in model.named_parameters():
        parameter.requires_grad_((names is None or within(name, names)) and not within(name, but))
