"""Fused experts as one matrix: their layout, their update, and their gradients in calibration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, GramStatistics, Sizes, calibrate
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.experts import (
    ExpertLayout,
    expert_layout,
    group_experts,
    owner_of,
    target_shape,
    with_update,
)
from sparsegrad_peft.method.gradients import stream_gradients

E, HIDDEN, INNER = 3, 5, 7


class Experts(nn.Module):
    """Experts with an up and a down projection; token t goes to expert `chosen[t]`."""

    def __init__(self, *, transposed: bool = False, inner: int = INNER, hidden: int = HIDDEN) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        up, down = torch.randn(E, inner, hidden, dtype=F64), torch.randn(E, hidden, inner, dtype=F64)
        self.up_proj = nn.Parameter(up.mT.contiguous() if transposed else up)
        self.down_proj = nn.Parameter(down.mT.contiguous() if transposed else down)
        self.up_bias = nn.Parameter(torch.zeros(E, inner, dtype=F64))

    def forward(self, x: Tensor, chosen: list[int]) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if getattr(self, "is_transposed", False):
            up, down = up.mT, down.mT
        return torch.stack([down[e] @ torch.tanh(up[e] @ row) for row, e in zip(x, chosen, strict=True)])


def layout_of(*, stacks_out: bool, transposed: bool) -> ExpertLayout:
    out, in_ = (INNER, HIDDEN) if stacks_out else (HIDDEN, INNER)
    return ExpertLayout(E, out, in_, stacks_out, transposed)


def a_basis(layout: ExpertLayout, kind: str = "scaled") -> Basis:
    """A basis of 4 of all neurons and 2 directions; "all": of every neuron and in the original hidden side."""
    if kind == "all":
        return Basis.identity()
    neurons, hidden = torch.tensor([0, 6, 13, 20], dtype=torch.int32), orthogonal(HIDDEN, 2)
    U, V = (hidden, neurons) if layout.stacks_out else (neurons, hidden)
    out_features, in_features = layout.shape
    scales = {"scale_out": torch.rand(len(V), dtype=F64) + 0.5, "scale_in": torch.rand(len(U), dtype=F64) + 0.5}
    return Basis(U, V, out_features=out_features, in_features=in_features, **(scales if kind == "scaled" else {}))


def oriented(layout: ExpertLayout, stored: Tensor) -> Tensor:
    """A view (E, out, in) of a tensor that is stored as the parameter, or the other way round."""
    return stored.mT if layout.transposed else stored


@pytest.mark.parametrize("stacks_out", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", ["scaled", "plain", "all"])
def test_update_and_gradient_are_those_of_one_matrix(stacks_out: bool, transposed: bool, kind: str) -> None:
    torch.manual_seed(0)
    layout = layout_of(stacks_out=stacks_out, transposed=transposed)
    basis = a_basis(layout, kind)
    out, in_ = layout.shape
    U, V = (
        torch.eye(n, dtype=F64) if side is None else side if side.dim() == 2 else torch.eye(n, dtype=F64)[side.long()]
        for side, n in ((basis.U, in_), (basis.V, out))
    )
    ones = [torch.ones(len(side), dtype=F64) for side in (V, U)]
    scale_out, scale_in = (one if scale is None else scale for scale, one in zip(basis.scales, ones, strict=True))
    S = torch.randn(len(V), len(U), dtype=F64, requires_grad=True)
    W = torch.randn(E, layout.out, layout.in_, dtype=F64)

    found = with_update(oriented(layout, W), layout, S, basis)
    update = reference.scaled_update(S.detach(), U, V, scale_in, scale_out)
    expected = W + reference.unstacked(update, E, stacks_out)
    assert found.shape == oriented(layout, W).shape
    torch.testing.assert_close(oriented(layout, found), expected, rtol=1e-12, atol=1e-12)

    G = torch.randn_like(W)  # of the sum with respect to a loss
    found.backward(oriented(layout, G))
    G_tilde = V @ reference.stacked(G, stacks_out) @ U.T * scale_out[:, None] * scale_in
    torch.testing.assert_close(S.grad, G_tilde, rtol=1e-12, atol=1e-12)


def test_the_sum_is_rounded_once() -> None:
    """In bfloat16 the update of a float32 core is added in float32."""
    layout = layout_of(stacks_out=True, transposed=False)
    basis = a_basis(layout, "plain")
    W, S = torch.randn(E, INNER, HIDDEN).bfloat16(), torch.randn(4, 2) / 100
    with torch.autocast("cpu", torch.bfloat16):
        found = with_update(W, layout, S, basis)
    update = reference.scaled_update(S.double(), basis.U, torch.eye(E * INNER, dtype=F64)[basis.V.long()],
                                     torch.ones(2, dtype=F64), torch.ones(4, dtype=F64))  # fmt: skip
    expected = (W.double() + reference.unstacked(update, E, True)).float().bfloat16()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("shapes", "transposed", "expected"),
    [
        # name -> (E, ., .) as stored; the sides of the neurons: outputs (True) or inputs
        ({"gate_up_proj": (4, 14, 5), "down_proj": (4, 5, 7)}, False, {"gate_up_proj": True, "down_proj": False}),
        ({"gate_up_proj": (4, 6, 8), "down_proj": (4, 8, 3)}, False, {"gate_up_proj": True, "down_proj": False}),
        ({"gate_up_proj": (4, 5, 10), "down_proj": (4, 5, 5)}, True, {"gate_up_proj": True, "down_proj": False}),
        ({"up_proj": (4, 5, 5), "down_proj": (4, 5, 5)}, False, {"up_proj": True, "down_proj": False}),
        # (E, in, out) without the mark of transformers (Llama 4): inputs and outputs are swapped, the neurons are not
        ({"gate_up_proj": (4, 5, 14), "down_proj": (4, 7, 5)}, False, {"gate_up_proj": False, "down_proj": True}),
    ],
)
def test_the_hidden_size_tells_which_side_holds_the_neurons(
    shapes: dict[str, tuple[int, ...]], transposed: bool, expected: dict[str, bool]
) -> None:
    module = nn.Module()
    module.is_transposed = transposed
    for name, shape in shapes.items():
        module.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    for name, stacks_out in expected.items():
        layout = expert_layout(module, name)
        assert layout.stacks_out is stacks_out
        stored = shapes[name][1:]
        assert (layout.out, layout.in_) == (stored[::-1] if transposed else stored)


def test_what_is_no_fused_expert() -> None:
    experts = Experts()
    with pytest.raises(TypeError, match=r"up_bias of Experts: expected fused .* found torch.float64 of shape \(3, 7"):
        expert_layout(experts, "up_bias")
    experts.up_proj = nn.Parameter(torch.zeros(E, 4, 4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(TypeError, match=r"not quantized, \(experts, out, in\); found torch\.uint8"):
        expert_layout(experts, "up_proj")


def test_names_of_layers_and_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 3), Experts(), Experts())
    assert owner_of(model, "1.up_proj") == (model[1], "up_proj")
    assert owner_of(model, "0") == (model[0], None)
    assert target_shape(model, "1.down_proj") == (HIDDEN, E * INNER)
    assert target_shape(model, "0") == (3, 2)
    assert group_experts(model, ["1.up_proj", "2.up_proj", "1.down_proj"]) == {
        "*.up_proj": ["1.up_proj", "2.up_proj"],
        "*.down_proj": ["1.down_proj"],
    }


def statistics_for(layout: ExpertLayout, dtype: torch.dtype = F64) -> GramStatistics:
    out, in_ = layout.shape
    if layout.stacks_out:
        return GramStatistics("g", ("a",), torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, dtype=dtype))
    return GramStatistics("g", ("a",), torch.zeros(in_, dtype=dtype), torch.zeros(out, out, dtype=dtype))


@pytest.mark.parametrize("stacks_out", [True, False])
@pytest.mark.parametrize("scale", [None, 1.0, 1e18, 1e-25])
def test_sums_are_those_of_one_matrix(stacks_out: bool, scale: float | None) -> None:
    """Also for gradients whose squares overflow or underflow float32. One expert gets no tokens."""
    torch.manual_seed(0)
    layout = layout_of(stacks_out=stacks_out, transposed=False)
    gradients = torch.randn(4, E, layout.out, layout.in_, dtype=F64)
    gradients[:, 1] = 0
    dtype = F64 if scale is None else torch.float32
    gram = statistics_for(layout, dtype)
    for G in gradients:
        gram.add((G * (scale or 1)).to(dtype), normalize=scale is not None)
    matrices = torch.stack([reference.stacked(G, stacks_out) for G in gradients])
    expected_in, expected_out = reference.grams(matrices, normalize=scale is not None)
    if stacks_out:
        expected_out = expected_out.diagonal()
    else:
        expected_in = expected_in.diagonal()
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if scale is None else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(gram.gram_in, expected_in.to(dtype), **tolerance)
    torch.testing.assert_close(gram.gram_out, expected_out.to(dtype), **tolerance)
    assert gram.n_gradients == 4


class LargestTensor(TorchDispatchMode):
    """The most entries of a float32 tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.float32:
            self.entries = max(self.entries, result.numel())
        return result


@pytest.mark.parametrize("normalize", [True, False])
def test_experts_are_cast_one_by_one(normalize: bool) -> None:
    layout = ExpertLayout(64, 10, 8, True, False)
    gram, G = statistics_for(layout, torch.float32), torch.randn(64, 10, 8).bfloat16()
    with LargestTensor() as largest:
        gram.add(G, normalize=normalize)
    assert largest.entries <= 640  # the energies of all neurons; one expert has 80 entries, all have 5,120


@pytest.mark.parametrize("transposed", [True, False])
def test_gradients_are_streamed_in_one_orientation(transposed: bool) -> None:
    torch.manual_seed(0)
    experts, x = Experts(transposed=transposed), torch.randn(6, HIDDEN, dtype=F64)

    def loss() -> Tensor:
        return experts(x, [0, 2, 2, 0, 2, 0]).square().sum()

    loss().backward()
    expected = {name: p.grad.clone() for name, p in experts.named_parameters() if p.dim() == 3}
    found: dict[str, Tensor] = {}
    stream_gradients(experts, list(expected), lambda name, G: found.update({name: G.clone()}), step=loss, n_steps=1)
    for name, G in found.items():
        assert torch.equal(G, expected[name].mT if transposed else expected[name])
        assert G.shape == (E, *((INNER, HIDDEN) if name == "up_proj" else (HIDDEN, INNER)))
        assert not bool(G[1].any())


def test_bases_are_the_strongest_neurons_of_all_experts() -> None:
    """Expert 1 gets no tokens, so none of its neurons is selected while another has energy."""
    torch.manual_seed(0)
    experts, x = Experts(), torch.randn(6, HIDDEN, dtype=F64)
    gradients: dict[str, Tensor] = {}

    def loss() -> Tensor:
        return experts(x, [0, 2, 2, 0, 2, 0]).square().sum()

    stream_gradients(experts, ["up_proj", "down_proj"], lambda n, G: gradients.update({n: G.clone()}), step=loss,
                     n_steps=1)  # fmt: skip
    groups = {"up": ["up_proj"], "down": ["down_proj"]}
    sizes = Sizes(narrow=2, wide=9, neurons=True)
    calibration = calibrate(experts, groups=groups, step=loss, sizes=sizes, n_steps=2, progress=False, gram_dtype=F64)
    bases = calibration.bases(sizes=sizes, exponent=0.25, dtype=F64)
    for group, stacks_out in (("up", True), ("down", False)):
        basis, G = bases[group], reference.stacked(gradients[f"{group}_proj"], stacks_out)
        neurons, directions = (basis.V, basis.U) if stacks_out else (basis.U, basis.V)
        gram_in, gram_out = reference.grams(torch.stack([G, G]))
        wanted = reference.strongest_features(gram_out if stacks_out else gram_in, 9)
        assert torch.equal(torch.eye(E * INNER, dtype=F64)[neurons.long()], wanted)
        assert not (set(range(INNER, 2 * INNER)) & set(neurons.tolist()))
        U, V, _, _ = reference.hosvd(G[None])
        expected = (U if stacks_out else V)[:2]
        torch.testing.assert_close((directions @ expected.T).abs(), torch.eye(2, dtype=F64), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sizes", [None, Sizes(0.5, 0.5), Sizes(c=2, r=2)])
def test_rotating_the_neurons_of_all_experts_is_refused(sizes: Sizes | None) -> None:
    """The Gram matrix of that side would have (E · inner)² entries."""
    with pytest.raises(ValueError, match="up_proj holds fused experts, which train selected neurons only: expected"):
        calibrate(Experts(), [], groups={"up": ["up_proj"]}, sizes=sizes)


def test_fewer_neurons_than_the_hidden_size_are_refused() -> None:
    experts = Experts(inner=2, hidden=7)
    with pytest.raises(ValueError, match="3 experts with 2 neurons each, fewer in all than the hidden size"):
        calibrate(experts, [], groups={"up": ["up_proj"]}, sizes=Sizes(None, None, neurons=True))
