"""Fused experts: all experts of a layer in one parameter, seen as one matrix.

The experts of a layer are one wide MLP whose neurons are those of all E experts. A token uses some of them:

    up projections    (E, I, H) ──► W (E·I, H), the experts below each other
    down projections  (E, H, I) ──► W (H, E·I), the experts side by side

So `ΔW[neurons] = S U` and `ΔW[:, neurons] = Vᵀ S` hold as for any linear layer: one `U` or `V` for the hidden side of
all experts, and selected neurons among those of all experts. Calibration keeps sums of the experts' gradients
on the hidden side, and one number for each neuron. Experts without tokens have no gradient, so their
neurons are selected last.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .basis import Basis
from .groups import linear_shape, role_of
from .precision import PLAIN, at_least_float32, without_autocast
from .sides import cast, scaled
from .sizes import Sizes


@dataclass(frozen=True)
class ExpertLayout:
    """How the weights of the experts lie in their parameter."""

    experts: int
    "E"
    out: int
    "outputs of one expert"
    in_: int
    "inputs of one expert"
    stacks_out: bool
    "the neurons are outputs (up projection), else inputs (down projection)"
    transposed: bool
    "stored as (E, in, out), as in gpt-oss; else (E, out, in)"

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of all experts as one matrix."""
        if self.stacks_out:
            return self.experts * self.out, self.in_
        return self.out, self.experts * self.in_

    @property
    def entry(self) -> list[int]:
        """[out, in, E] of all experts as one matrix, as an adapter's configuration has it."""
        return [*self.shape, self.experts]

    @property
    def neurons(self) -> int:
        """Neurons of one expert."""
        return self.out if self.stacks_out else self.in_

    def by_neuron(self, stored: Tensor) -> Tensor:
        """Return a view (E, neurons, hidden) of a tensor that is stored as the parameter, or the other way round."""
        return stored if self.stacks_out is not self.transposed else stored.mT


def expert_layout(experts: nn.Module, parameter_name: str) -> ExpertLayout:
    """Return the layout of a parameter of a module of fused experts.

    transformers marks modules that store (E, in, out) with `is_transposed`. The hidden size is the one that all 3-D
    parameters of the module have in common, and the other side holds the neurons. Where both sizes are common, "down"
    in the name tells.

    Raises:
        TypeError: the parameter has not three dimensions, or is quantized.
    """
    parameter = getattr(experts, parameter_name)
    if parameter.dim() != 3 or parameter.dtype not in PLAIN:
        raise TypeError(
            f"{parameter_name} of {type(experts).__name__}: expected fused expert weights that are not quantized, "
            f"(experts, out, in); found {parameter.dtype} of shape {tuple(parameter.shape)}"
        )
    transposed = bool(getattr(experts, "is_transposed", False))
    count, out, in_ = parameter.mT.shape if transposed else parameter.shape
    others = [p for p in experts.parameters(recurse=False) if p.dim() == 3]
    hidden = set.intersection(*(set(p.shape[1:]) for p in others))
    is_known = (out in hidden) is not (in_ in hidden)
    stacks_out = in_ in hidden if is_known else "down" not in parameter_name
    return ExpertLayout(count, out, in_, stacks_out, transposed)


def with_update(
    weight: Float[Tensor, "E m n"], layout: ExpertLayout, S: Float[Tensor, "r c"], basis: Basis
) -> Float[Tensor, "E m n"]:
    """Return the experts' weights plus the update of a core, stored as the parameter; differentiable in `S`.

    The sum is computed in the wider type and rounded once to the type of the weights. Memory: one copy of the weights.
    """
    by_neuron = layout.by_neuron(weight)
    place, rows = changed_neurons(weight, layout, S, basis)
    return layout.by_neuron(rows.view(by_neuron.shape) if place is None else by_neuron.index_put(place, rows))


def changed_neurons(
    weight: Float[Tensor, "E m n"], layout: ExpertLayout, S: Float[Tensor, "r c"], basis: Basis
) -> tuple[tuple[Tensor, Tensor] | None, Float[Tensor, "k hidden"]]:
    """Return which neurons a core changes, and their weights plus the update.

    Returns:
        Expert (k,) and number (k,) of each neuron, None for all of them; and the rows of `layout.by_neuron`.
    """
    hidden, neurons = (basis.U, basis.V) if layout.stacks_out else (basis.V, basis.U)
    wide = at_least_float32(torch.promote_types(weight.dtype, S.dtype))
    with without_autocast(weight.device):
        S = scaled(S, basis.scales).to(wide)
        rows = S if layout.stacks_out else S.T  # (neurons, directions)
        if hidden is not None:
            directions = cast(hidden, wide)
            assert directions is not None
            rows = rows @ directions  # (neurons, hidden)
        by_neuron = layout.by_neuron(weight)
        if neurons is None:
            return None, (by_neuron.flatten(0, 1) + rows).to(weight.dtype)
        place = neurons.long() // layout.neurons, neurons.long() % layout.neurons
        return place, (by_neuron[place] + rows).to(weight.dtype)


def check_selects_neurons(layout: ExpertLayout, sizes: Sizes, name: str) -> None:
    """Raise unless bases of these sizes select among the neurons of all experts.

    Raises:
        ValueError: they would rotate that side, at a cost of its size squared. The message names the parameter.
    """
    if sizes.selected(*layout.shape) == (layout.stacks_out, not layout.stacks_out):
        return
    if sizes.neurons:
        raise ValueError(
            f"{name} holds {layout.experts} experts with {layout.neurons} neurons each, fewer in all than the hidden "
            "size; leave it out of target_parameters"
        )
    raise ValueError(
        f"{name} holds fused experts, which train selected neurons only: expected neurons=True, found {sizes}. Leave "
        "neurons, shared, c and r at their defaults, or leave the experts out with target_parameters=[]"
    )


def target_shape(model: nn.Module, name: str) -> tuple[int, int]:
    """Return (out, in) of a linear layer, or of all experts in a parameter as one matrix.

    Raises:
        TypeError: neither; see `linear_shape` and `expert_layout`.
    """
    module, parameter = owner_of(model, name)
    return linear_shape(module, name) if parameter is None else expert_layout(module, parameter).shape


def group_experts(model: nn.Module, names: Iterable[str]) -> dict[str, list[str]]:
    """Group the names of fused experts' parameters by role, as `group_linears` groups linear layers."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(role_of(model, name), []).append(name)
    return groups


def fused_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of three dimensions, which may hold fused experts, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.dim() == 3}


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str | None]:
    """Return the module of that name, or the module that holds the parameter of that name, and the parameter's own.

    Raises:
        AttributeError: the model has neither.
    """
    path, _, last = name.rpartition(".")
    parent = model.get_submodule(path)
    return (parent, last) if last in parent._parameters else (model.get_submodule(name), None)
