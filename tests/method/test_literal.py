"""The published layer: output, gradients and training equal the linear layer's and the oracle's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, LiteralSparseGradLinear, SparseGradAdamW
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.literal import Products
from sparsegrad_peft.method.selection import (
    flat_from_coo,
    topk_magnitude,
    topk_positions,
    topk_signed_threshold_as_published,
)

BOTH = pytest.mark.parametrize("products", ["regular", "sparse"])


def complete_basis(out: int, in_: int, dtype: torch.dtype = F64) -> Basis:
    return Basis(orthogonal(in_).to(dtype), orthogonal(out).to(dtype))


def pair(
    out: int, in_: int, *, bias: bool = True, dtype: torch.dtype = F64, **options: Any
) -> tuple[nn.Linear, LiteralSparseGradLinear]:
    """Make a linear layer, and the literal form of an equal one."""
    linear = nn.Linear(in_, out, bias=bias, dtype=dtype)
    basis = complete_basis(out, in_, F64 if dtype == F64 else torch.float32)
    options = options if "density" in options else {"k": 3, **options}
    return linear, LiteralSparseGradLinear.from_linear(copy.deepcopy(linear), basis, **options)


def relative_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).norm() / expected.norm())


# Forward and backward


@BOTH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (6,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_output_and_gradients_are_the_linear_layer_s(
    dtype: torch.dtype, tolerance: float, leading: tuple[int, ...], bias: bool, products: Products
) -> None:
    linear, literal = pair(11, 17, bias=bias, dtype=dtype, products=products)
    assert literal.W_tilde.dtype == dtype
    x = torch.randn(*leading, 17, dtype=dtype)
    delta = torch.randn(*leading, 11, dtype=dtype)
    if leading:
        delta[0] = 0  # tokens without gradient, where the two products take different ways
    x_linear, x_literal = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = linear(x_linear), literal(x_literal)
    expected.backward(delta)
    found.backward(delta)

    assert found.shape == expected.shape
    assert found.dtype == dtype
    assert relative_error(found, expected) < tolerance
    assert x_literal.grad is not None
    assert x_literal.grad.dtype == dtype
    assert relative_error(x_literal.grad, x_linear.grad) < tolerance
    if bias:
        assert literal.bias.grad.dtype == dtype
        assert relative_error(literal.bias.grad, linear.bias.grad) < tolerance
    else:
        assert literal.bias is None


@pytest.mark.parametrize("padding", ["none", "some", "all"])
@pytest.mark.parametrize("bias", [True, False])
def test_both_products_are_equal(padding: str, bias: bool) -> None:
    """Equations (1) and (2) drop tokens without gradient; the result is that of the dense products."""
    _, regular = pair(8, 13, bias=bias, k=20, products="regular")
    sparse = copy.deepcopy(regular)
    sparse.products = "sparse"
    x, delta = torch.randn(4, 5, 13, dtype=F64), torch.randn(4, 5, 8, dtype=F64)
    padded = {"none": torch.zeros(4, 5), "some": torch.rand(4, 5) < 0.5, "all": torch.ones(4, 5)}[padding].bool()
    assert padding != "some" or 0 < int(padded.sum()) < 20
    delta[padded] = 0
    gradients = []
    for layer in (regular, sparse):
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(delta)
        gradients.append((y.detach(), given.grad, layer.W_tilde.grad.coalesce(), layer.bias.grad if bias else None))
    (y, grad_x, grad_W, grad_bias), (y_sparse, grad_x_sparse, grad_W_sparse, grad_bias_sparse) = gradients
    assert torch.equal(y, y_sparse)
    torch.testing.assert_close(grad_x, grad_x_sparse, rtol=1e-12, atol=1e-12)
    assert grad_x_sparse is not None
    assert not grad_x_sparse[padded].any()
    assert torch.equal(grad_W.indices(), grad_W_sparse.indices())
    torch.testing.assert_close(grad_W.values(), grad_W_sparse.values(), rtol=1e-12, atol=1e-12)
    assert bool(grad_W.values().any()) == (padding != "all")
    if bias:
        torch.testing.assert_close(grad_bias, grad_bias_sparse, rtol=1e-12, atol=1e-12)


@BOTH
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (5, 123), (123, 5), (7, 7)])
@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_the_weight_s_gradient_is_the_selection_of_the_dense_one(
    out: int, in_: int, share: float, products: Products
) -> None:
    k = max(1, int(share * out * in_))
    linear, literal = pair(out, in_, k=k, products=products)
    U, V = literal.basis.U, literal.basis.V
    x, delta = torch.randn(9, in_, dtype=F64), torch.randn(9, out, dtype=F64)
    delta[[2, 5]] = 0
    literal(x).backward(delta)
    linear(x).backward(delta)
    G_tilde = V @ linear.weight.grad @ U.T

    grad = literal.W_tilde.grad
    assert grad.layout == torch.sparse_coo
    assert grad.shape == (out, in_)
    assert grad._nnz() == k
    positions, values = flat_from_coo(grad)
    assert positions.numel() == k  # no coordinate twice
    torch.testing.assert_close(values, G_tilde.reshape(-1)[positions], rtol=1e-12, atol=1e-12)
    assert torch.equal(positions, reference.topk_mask(G_tilde, k).reshape(-1).nonzero().squeeze(1))


def test_backward_is_the_paper_s() -> None:
    """Equal to the dense layer of reference.py, which follows the order of the equations."""
    linear, literal = pair(6, 9, k=54)
    oracle = reference.Layer.from_weight(linear.weight.detach(), linear.bias.detach(), literal.basis.U, literal.basis.V)
    x, delta = torch.randn(7, 9, dtype=F64).requires_grad_(), torch.randn(7, 6, dtype=F64)
    y = literal(x)
    y.backward(delta)
    grad_x, G_tilde, grad_bias = oracle.backward(x.detach(), delta)
    torch.testing.assert_close(literal.W_tilde.detach(), oracle.W_tilde, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y.detach(), oracle.forward(x.detach()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x.grad, grad_x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(literal.W_tilde.grad.to_dense(), G_tilde, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(literal.bias.grad, grad_bias, rtol=1e-12, atol=1e-12)


def test_micro_batches_add_up_to_the_union_of_their_selections() -> None:
    """The reason why this form does not suit gradient accumulation."""
    _, literal = pair(6, 9, k=5)
    dense = torch.zeros(6, 9, dtype=F64)
    for _ in range(2):
        literal(torch.randn(7, 9, dtype=F64)).backward(torch.randn(7, 6, dtype=F64))
        before, dense = dense, literal.W_tilde.grad.to_dense()
        assert int((dense != before).sum()) == 5
    positions, _ = flat_from_coo(literal.W_tilde.grad)
    assert 5 < positions.numel() <= 10
    assert torch.equal(positions, dense.reshape(-1).nonzero().squeeze(1))


@pytest.mark.parametrize("frozen", ["W_tilde", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    _, literal = pair(4, 5)
    getattr(literal, frozen).requires_grad_(False)
    literal(torch.randn(3, 5, dtype=F64)).sum().backward()
    assert getattr(literal, frozen).grad is None
    assert getattr(literal, "bias" if frozen == "W_tilde" else "W_tilde").grad is not None


def test_no_tokens() -> None:
    for products in ("regular", "sparse"):
        _, literal = pair(4, 5, products=products)
        y = literal(torch.randn(0, 5, dtype=F64))
        y.sum().backward()
        assert y.shape == (0, 4)
        assert not literal.W_tilde.grad.to_dense().any()


# Training


@BOTH
@pytest.mark.parametrize(("out", "in_"), [(1, 1), (5, 123), (123, 5), (7, 7)])
def test_training_is_the_oracle_s(out: int, in_: int, products: Products) -> None:
    """Weights, moments and touched entries are compared after each of 20 steps; AdamW trains the bias.

    `torch.optim.SparseAdam` takes the same COO gradients, as an independent implementation.
    """
    k = max(1, out * in_ // 10)
    linear, literal = pair(out, in_, k=k, products=products)
    optimizer = SparseGradAdamW(
        [{"params": [literal.W_tilde], "sparse": True}, {"params": [literal.bias], "weight_decay": 0.1, "lr": 3e-3}],
        lr=1e-2,
        betas=(0.8, 0.95),
    )
    U, V = literal.basis.U, literal.basis.V
    layer = reference.Layer.from_weight(linear.weight.detach(), linear.bias.detach(), U, V)
    adam = reference.SparseAdam(lr=1e-2, betas=(0.8, 0.95))
    adamw = reference.AdamW(lr=3e-3, betas=(0.8, 0.95), weight_decay=0.1)
    torch_weight = nn.Parameter(literal.W_tilde.detach().clone())
    torch_adam = torch.optim.SparseAdam([torch_weight], lr=1e-2, betas=(0.8, 0.95))

    sizes = []
    for _ in range(20):
        x, target = torch.randn(8, in_, dtype=F64), torch.randn(8, out, dtype=F64)
        optimizer.zero_grad()
        functional.mse_loss(literal(x), target, reduction="sum").backward()
        torch_weight.grad = literal.W_tilde.grad.clone()
        optimizer.step()
        torch_adam.step()

        delta = 2 * (layer.forward(x) - target)
        _, G_tilde, grad_bias = layer.backward(x, delta)
        layer.W_tilde = adam.step(layer.W_tilde, G_tilde, reference.topk_mask(G_tilde, k))
        layer.bias = adamw.step(layer.bias, grad_bias)

        torch.testing.assert_close(literal.W_tilde.detach(), layer.W_tilde, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(literal.bias.detach(), layer.bias, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(literal.W_tilde.detach(), torch_weight.detach(), rtol=1e-12, atol=1e-12)
        state = optimizer.state[literal.W_tilde]
        touched = adam.touched.reshape(-1).nonzero().squeeze(1)
        assert torch.equal(state["positions"].long(), touched)
        assert optimizer.touched(literal.W_tilde) == touched.numel()
        for moment, dense in (("exp_avg", adam.exp_avg), ("exp_avg_sq", adam.exp_avg_sq)):
            torch.testing.assert_close(state[moment], dense.reshape(-1)[touched], rtol=1e-11, atol=1e-12)
        sizes.append(touched.numel())
    assert sizes[0] == k
    assert out * in_ == 1 or sizes[-1] > k  # entries came in later too
    assert not torch.equal(layer.weight(), linear.weight.detach())


def test_sparse_adam_of_torch_trains_it() -> None:
    """20 steps in float64 without the library's optimizer."""
    _, literal = pair(7, 9, k=6)
    twin = copy.deepcopy(literal)
    optimizers = [
        torch.optim.SparseAdam([literal.W_tilde], lr=1e-2),
        SparseGradAdamW([{"params": [twin.W_tilde], "sparse": True}], lr=1e-2),
    ]
    start = literal.W_tilde.detach().clone()
    for _ in range(20):
        x, target = torch.randn(8, 9, dtype=F64), torch.randn(8, 7, dtype=F64)
        for layer, optimizer in zip((literal, twin), optimizers, strict=True):
            optimizer.zero_grad()
            functional.mse_loss(layer(x), target).backward()
            optimizer.step()
    torch.testing.assert_close(literal.W_tilde, twin.W_tilde, rtol=1e-12, atol=1e-12)
    assert not torch.equal(literal.W_tilde.detach(), start)


@BOTH
def test_autocast_in_bfloat16(products: Products) -> None:
    """Computed in bfloat16 like the linear layer. Gradients have the types of their parameters."""
    linear, literal = pair(24, 32, dtype=torch.float32, k=40, products=products)
    x = torch.randn(3, 5, 32)
    given = [x.clone().requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, found = linear(given[0]), literal(given[1])
    delta = torch.randn_like(expected)
    delta[1] = 0
    expected.backward(delta)
    found.backward(delta)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_error(found, expected) < 3e-2
    assert given[1].grad.dtype == literal.bias.grad.dtype == literal.W_tilde.grad.dtype == torch.float32
    assert relative_error(given[1].grad, given[0].grad) < 3e-2
    assert relative_error(literal.bias.grad, linear.bias.grad) < 3e-2
    grad = literal.W_tilde.grad
    assert grad._nnz() == 40
    positions, values = flat_from_coo(grad)
    G_tilde = literal.basis.V @ linear.weight.grad @ literal.basis.U.T
    assert relative_error(values, G_tilde.reshape(-1)[positions]) < 3e-2
    assert len(set(positions.tolist()) & set(topk_positions(G_tilde.reshape(-1).abs(), 40).tolist())) > 35


def test_the_published_rule_of_selection() -> None:
    """Kept for comparison: a threshold on signed entries keeps more than `k`."""
    linear, literal = pair(20, 30, k=12, select=topk_signed_threshold_as_published)
    x, delta = torch.randn(9, 30, dtype=F64), torch.randn(9, 20, dtype=F64)
    literal(x).backward(delta)
    linear(x).backward(delta)
    G_tilde = literal.basis.V @ linear.weight.grad @ literal.basis.U.T
    threshold = G_tilde.reshape(-1).sort(descending=True).values[11]
    positions, values = flat_from_coo(literal.W_tilde.grad)
    kept = (G_tilde.abs() > threshold * (1 - 1e-9)).reshape(-1).nonzero().squeeze(1)
    assert torch.equal(positions, kept)
    assert positions.numel() > 12
    torch.testing.assert_close(values, G_tilde.reshape(-1)[positions], rtol=1e-12, atol=1e-12)
    optimizer = SparseGradAdamW([{"params": [literal.W_tilde], "sparse": True}])
    optimizer.step()
    assert optimizer.touched(literal.W_tilde) == positions.numel()


# Making one, and back


def test_a_conv1d_is_a_linear_layer() -> None:
    conv = Conv1D(11, 17).double()
    nn.init.normal_(conv.bias)
    literal = LiteralSparseGradLinear.from_linear(copy.deepcopy(conv), complete_basis(11, 17), k=3)
    assert (literal.out_features, literal.in_features) == (11, 17)
    x, delta = torch.randn(4, 17, dtype=F64), torch.randn(4, 11, dtype=F64)
    given = [x.clone().requires_grad_() for _ in range(2)]
    expected, found = conv(given[0]), literal(given[1])
    expected.backward(delta)
    found.backward(delta)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(literal.bias.grad, conv.bias.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(literal.to_linear().weight, conv.weight.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16])
def test_to_linear_and_back(dtype: torch.dtype, bias: bool) -> None:
    linear, literal = pair(8, 13, bias=bias, dtype=dtype)
    restored = literal.to_linear()
    assert type(restored) is nn.Linear
    assert restored.weight.dtype == dtype
    assert (
        relative_error(restored.weight, linear.weight) < {F64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    )
    assert (restored.bias is None) == (not bias)
    if bias:
        assert torch.equal(restored.bias, linear.bias)
        assert restored.bias is not literal.bias


def test_to_linear_computes_what_was_learnt() -> None:
    _, literal = pair(8, 13)
    literal.bias.requires_grad_(False)
    literal.eval()
    with torch.no_grad():
        literal.W_tilde.normal_()
    restored = literal.to_linear()
    x = torch.randn(4, 13, dtype=F64)
    torch.testing.assert_close(restored(x), literal(x), rtol=1e-12, atol=1e-12)
    assert not restored.training
    assert restored.weight.requires_grad
    assert not restored.bias.requires_grad
    assert not restored.weight.is_meta


def test_making_one_leaves_the_linear_layer_alone() -> None:
    """The weight is copied into the basis. The bias stays the linear layer's own parameter."""
    linear = nn.Linear(5, 4, dtype=F64).eval()
    weight = linear.weight.detach().clone()
    literal = LiteralSparseGradLinear.from_linear(linear, complete_basis(4, 5), k=3)
    assert literal.bias is linear.bias
    assert not literal.training
    with torch.no_grad():
        literal.W_tilde.zero_()
    assert torch.equal(linear.weight, weight)


def test_parameters_are_the_weight_and_the_bias() -> None:
    """The bases are no parameters."""
    _, literal = pair(4, 5)
    assert [name for name, _ in literal.named_parameters()] == ["W_tilde", "bias"]
    assert str(literal).count("k=3, products=regular") == 1


def test_a_density_is_a_share_of_the_entries() -> None:
    _, literal = pair(20, 30, density=0.0125)
    assert literal.k == 7
    assert literal.select is topk_magnitude


def make(
    linear: nn.Module | None = None, basis: Basis | None = None, **options: Any
) -> Callable[[], LiteralSparseGradLinear]:
    return lambda: LiteralSparseGradLinear.from_linear(
        linear or nn.Linear(5, 4, dtype=F64), basis or complete_basis(4, 5), **({"k": 1} | options)
    )


@pytest.mark.parametrize(
    ("attempt", "error", "words"),
    [
        (make(basis=Basis(orthogonal(5)[:3], orthogonal(4))), ValueError, r"needs a complete basis, U \(5, 5\) and V "
         r"\(4, 4\), found U=\(3, 5\), V=\(4, 4\).*use SparseGradLinear"),
        (make(basis=Basis(orthogonal(5), orthogonal(4)[:1])), ValueError, r"needs a complete basis.*V=\(1, 4\)"),
        (make(basis=Basis.identity()), ValueError, "needs a complete basis.*found U=identity, V=identity"),
        (make(basis=Basis(orthogonal(5), None)), ValueError, "needs a complete basis.*V=identity"),
        (make(basis=complete_basis(5, 4)), ValueError, r"for layers with .* = \(5, 4\), found a layer with \(4, 5\)"),
        (make(products="dense"), ValueError, """products must be "regular" or "sparse", found 'dense'"""),
        (make(k=0), ValueError, "k must be between 1 and the 20 entries there are, found 0"),
        (make(k=21), ValueError, "k must be between 1 and the 20 entries there are, found 21"),
        (make(density=0.5), ValueError, "exactly one of k"),
        (make(k=None), ValueError, "exactly one of k"),
        (make(k=None, density=1.5), ValueError, "density must be above 0 and at most 1"),
        (make(nn.LayerNorm(5)), TypeError, "expected a torch.nn.Linear or a Conv1D, found LayerNorm"),
    ],
)  # fmt: skip
def test_errors(attempt: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        attempt()
