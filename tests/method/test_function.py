"""The layer's forward and backward: the choice to form the update, and what backward refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, LiteralSparseGradLinear, SparseGradLinear
from sparsegrad_peft.method.costs import LayerShape, forms_update


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_never_added_to_a_half_precision_weight(dtype: torch.dtype, prefer: str) -> None:
    """An update of 2⁻¹² arrives in full, though a weight of 1 in half precision would round it away.

    With so many tokens a float32 weight would be summed with the update. The inputs 1 and -1 cancel the product with
    `W`, so that the output is the update's alone.
    """
    tokens, out, in_ = 512, 6, 8
    assert forms_update(tokens, LayerShape(out, in_, 1, 1), prefer)
    linear = nn.Linear(in_, out, bias=False, dtype=dtype)
    with torch.no_grad():
        linear.weight.fill_(1)
    layer = SparseGradLinear.from_linear(linear, Basis(torch.eye(in_)[:1], torch.eye(out)[:1]), prefer=prefer)
    with torch.no_grad():
        layer.S.fill_(2**-12)
    x = torch.zeros(tokens, in_, dtype=dtype)
    x[:, 0], x[:, 1] = 1, -1
    x.requires_grad_()
    y = layer(x)
    assert torch.equal(y[:, 0], torch.full((tokens,), 2**-12, dtype=dtype))
    (y[:, 0] - y[:, 1]).sum().backward()  # ∂L/∂x = (W + Vᵀ S U)[0] - (W + Vᵀ S U)[1]
    assert x.grad is not None
    assert torch.equal(x.grad[:, 0], torch.full((tokens,), 2**-12, dtype=dtype))


def gradient_penalty(layer: nn.Module) -> Tensor:
    x = torch.ones(1, 2, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).sum(), x, create_graph=True)
    return grad.square().sum()


@pytest.mark.parametrize("form", ["block", "packed", "literal"])
def test_double_backward_is_refused(form: str) -> None:
    """The incoming gradient is constant, so `once_differentiable` would give a second derivative of zero in silence."""
    linear, basis = nn.Linear(2, 2, bias=False, dtype=F64), Basis(orthogonal(2), orthogonal(2))
    if form == "literal":
        layer: nn.Module = LiteralSparseGradLinear.from_linear(linear, basis, k=1)
    else:
        positions = torch.tensor([0, 3]) if form == "packed" else None
        layer = SparseGradLinear.from_linear(linear, basis, positions=positions)
    with pytest.raises(RuntimeError, match=r"no second derivative, found backward with create_graph=True"):
        gradient_penalty(layer)
    plain = layer.to_linear()  # type: ignore[operator]
    gradient_penalty(plain).backward()  # the remedy that the message names
    assert plain.weight.grad.abs().sum() > 0
    y = layer(torch.ones(1, 2, dtype=F64)).sum()
    y.backward(retain_graph=True)
    y.backward()  # twice through one graph is no second derivative


@pytest.mark.parametrize("form", ["block", "literal"])
@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_backward_inside_an_autocast_that_forward_was_not_in(tokens: int, prefer: str, form: str) -> None:
    """As in a float32 island in a model under autocast, or with `loss.backward()` called inside the block."""
    linear, basis = nn.Linear(8, 6), Basis(orthogonal(8).float(), orthogonal(6).float())
    if form == "literal":
        layer: nn.Module = LiteralSparseGradLinear.from_linear(linear, basis, k=48)
    else:
        layer = SparseGradLinear.from_linear(linear, Basis(basis.U[:3], basis.V[:2]), prefer=prefer)
        with torch.no_grad():
            layer.S.normal_()
    x, delta = torch.randn(tokens, 8), torch.randn(tokens, 6)
    gradients = []
    for enabled in (False, True):
        island = x.clone().requires_grad_()
        y = layer(island)
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y.backward(delta)
        gradients.append([island.grad, *(p.grad.to_dense() for p in layer.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 3
    for found, expected in zip(gradients[1], gradients[0], strict=True):
        assert torch.equal(found, expected)


def test_scales_are_applied_after_the_last_rounding() -> None:
    """In half precision the product is rounded once. It was rounded again for each of the two scales."""
    U, V = (orthogonal(16, dtype=torch.bfloat16) for _ in range(2))
    x, delta = (torch.randn(64, 16, dtype=torch.bfloat16) for _ in range(2))
    scales = torch.rand(2, 16) + 0.1
    errors = []
    for scale_out, scale_in in (torch.ones(2, 16), scales):
        basis = Basis(U, V, scale_out=scale_out, scale_in=scale_in)
        layer = SparseGradLinear.from_linear(nn.Linear(16, 16, dtype=torch.bfloat16), basis)
        layer(x).backward(delta)
        exact = basis.to_basis(delta.double().T @ x.double())
        errors.append(float((layer.S.grad - exact).norm() / exact.norm()))
    assert errors[1] < 1.1 * errors[0]
