"""Every fast form against `reference.py`: twenty steps in float64, with weights and moments compared after each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from helpers import orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear
from sparsegrad_peft.method import reference

STEPS = 20
SHAPES = [(1, 1), (5, 123), (123, 5), (8, 8), (40, 12), (12, 40)]  # (out, in)


def a_linear(out: int, in_: int, bias: bool, dtype: torch.dtype = torch.float64) -> nn.Linear:
    return nn.Linear(in_, out, bias=bias, dtype=dtype)


def counts(n: int) -> list[int]:
    return sorted({1, max(1, n // 100), max(1, n // 7), n})


def close(found: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = float((found - expected).abs().max()) if found.numel() else 0.0
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    assert error <= tolerance * scale, f"{what}: differs by {error:.3g}, may differ by {tolerance * scale:.3g}"


def check_moments(
    optimizer: SparseGradAdamW, parameter: nn.Parameter, oracle: reference.SparseAdam, tol: float
) -> None:
    """Check that compact moments equal the oracle's at the touched entries, and that the oracle's others are zero."""
    state = optimizer.state[parameter]
    assert oracle.exp_avg is not None
    assert oracle.exp_avg_sq is not None
    assert torch.equal(oracle.touched.reshape(-1).nonzero().squeeze(1), state["positions"].long())
    close(state["exp_avg"], oracle.exp_avg[oracle.touched], tol, "exp_avg")
    close(state["exp_avg_sq"], oracle.exp_avg_sq[oracle.touched], tol, "exp_avg_sq")
    assert not oracle.exp_avg[~oracle.touched].any()
    assert state["step"] == oracle.step_count


def batches(out: int, in_: int, tokens: int, case: str) -> list[tuple[Tensor, Tensor]]:
    found = []
    for step in range(STEPS):
        x, delta = torch.randn(tokens, in_, dtype=torch.float64), torch.randn(tokens, out, dtype=torch.float64)
        if case == "zero gradient" and step % 3 == 1:
            delta = torch.zeros_like(delta)
        if case == "padding":
            delta[tokens // 2 :] = 0
        found.append((x, delta))
    return found


CASES = [(7, "dense"), (1, "dense"), (7, "zero gradient"), (8, "padding")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("tokens", "case"), CASES)
def test_block_with_complete_basis_is_the_published_method(
    shape: tuple[int, int], bias: bool, tokens: int, case: str
) -> None:
    """With a complete basis, the paper's `W_tilde` is `V W Uᵀ + S` at every step, for every k."""
    torch.manual_seed(0)
    out, in_ = shape
    for k in counts(out * in_):
        linear, basis = a_linear(out, in_, bias), Basis(orthogonal(in_), orthogonal(out))
        oracle = reference.Layer.from_weight(linear.weight.detach(), linear.bias, basis.U, basis.V)
        oracle_bias = None if linear.bias is None else linear.bias.detach().clone()
        start = oracle.W_tilde.clone()
        rule, bias_rule = reference.SparseAdam(lr=0.01), reference.AdamW(lr=0.02, weight_decay=0.1)
        layer = SparseGradLinear.from_linear(linear, basis)
        groups = [{"params": [layer.S], "sparse": True, "k": k, "lr": 0.01}]
        if bias:
            groups.append({"params": [layer.bias], "lr": 0.02, "weight_decay": 0.1})
        optimizer = SparseGradAdamW(groups)
        for x, delta in batches(out, in_, tokens, case):
            oracle.bias = oracle_bias
            x.requires_grad_()
            y = layer(x)
            y.backward(delta)
            close(y.detach(), oracle.forward(x.detach()), 1e-11, "output")
            grad_x, G_tilde, grad_bias = oracle.backward(x.detach(), delta)
            close(x.grad, grad_x, 1e-11, "input gradient")
            close(layer.S.grad, G_tilde, 1e-11, "gradient in the basis")
            if bias:
                close(layer.bias.grad, grad_bias, 1e-11, "bias gradient")
                oracle_bias = bias_rule.step(oracle_bias, grad_bias)
            # k = n//100 of nearly equal entries could differ by rounding; the mask is taken from the same gradient.
            mask = reference.topk_mask(layer.S.grad, k)
            assert int(mask.sum()) == k
            oracle.W_tilde = rule.step(oracle.W_tilde, G_tilde, mask)
            optimizer.step()
            optimizer.zero_grad()
            close(layer.S.detach(), oracle.W_tilde - start, 1e-11, "S")
            close(layer.to_linear().weight.detach(), oracle.weight(), 1e-11, "weight")
            if bias:
                close(layer.bias.detach(), oracle_bias, 1e-11, "bias")
            check_moments(optimizer, layer.S, rule, 1e-11)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("tokens", [1, 3, 200])
@pytest.mark.parametrize(("out", "in_", "r", "c"), [(123, 5, 9, 2), (5, 123, 2, 9), (40, 30, 4, 30), (40, 30, 40, 3)])
def test_truncated_block_against_the_oracle(out: int, in_: int, r: int, c: int, tokens: int, prefer: str) -> None:
    """Few tokens take the way through the factors, and many tokens through the formed weight."""
    torch.manual_seed(1)
    linear, basis = a_linear(out, in_, True), Basis(orthogonal(in_, c), orthogonal(out, r))
    linear.bias.requires_grad_(False)
    oracle = reference.Layer.from_weight(linear.weight.detach(), linear.bias.detach(), basis.U, basis.V)
    start = oracle.W_tilde.clone()
    k = max(1, r * c // 5)
    rule = reference.SparseAdam(lr=0.01)
    layer = SparseGradLinear.from_linear(linear, basis, prefer=prefer)
    optimizer = SparseGradAdamW([{"params": [layer.S], "sparse": True, "k": k}], lr=0.01)
    for x, delta in batches(out, in_, tokens, "dense"):
        x.requires_grad_()
        y = layer(x)
        y.backward(delta)
        with torch.no_grad():
            assert torch.equal(layer(x), y)  # with and without gradients: the same bits
        close(y.detach(), oracle.forward(x.detach()), 1e-11, "output")
        grad_x, G_tilde, _ = oracle.backward(x.detach(), delta)
        close(x.grad, grad_x, 1e-11, "input gradient")
        close(layer.S.grad, G_tilde, 1e-11, "gradient in the basis")
        oracle.W_tilde = rule.step(oracle.W_tilde, G_tilde, reference.topk_mask(layer.S.grad, k))
        optimizer.step()
        optimizer.zero_grad()
        close(layer.S.detach(), oracle.W_tilde - start, 1e-11, "S")
        check_moments(optimizer, layer.S, rule, 1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("truncate", [False, True])
def test_plain_weight_with_basis_in_the_optimizer(shape: tuple[int, int], truncate: bool) -> None:
    """The exact form on an `nn.Linear`: only the gradient is taken into the basis."""
    torch.manual_seed(2)
    out, in_ = shape
    r, c = (max(1, out // 3), max(1, in_ // 2)) if truncate else (out, in_)
    basis = Basis(orthogonal(in_, c), orthogonal(out, r))
    linear = a_linear(out, in_, False)
    k = max(1, r * c // 9)
    oracle = reference.Layer.from_weight(linear.weight.detach().clone(), None, basis.U, basis.V)
    rule = reference.SparseAdam(lr=0.01)
    optimizer = SparseGradAdamW(
        [{"params": [linear.weight], "sparse": True, "k": k}], lr=0.01, bases={linear.weight: basis}
    )
    for x, delta in batches(out, in_, 6, "dense"):
        linear(x).backward(delta)
        _, G_tilde, _ = oracle.backward(x, delta)
        mask = reference.topk_mask(basis.to_basis(linear.weight.grad), k)
        oracle.W_tilde = rule.step(oracle.W_tilde, G_tilde, mask)
        optimizer.step()
        optimizer.zero_grad()
        close(linear.weight.detach(), oracle.weight(), 1e-11, "weight")
        check_moments(optimizer, linear.weight, rule, 1e-11)


@pytest.mark.parametrize("side", ["neither", "U", "V"])
def test_identity_sides(side: str) -> None:
    """None gives the numbers of an identity matrix, in the layer and in the optimizer (MeProp's rule)."""
    torch.manual_seed(3)
    out, in_, k = 6, 9, 5
    U = orthogonal(in_) if side == "U" else None
    V = orthogonal(out) if side == "V" else None
    dense = Basis(
        torch.eye(in_, dtype=torch.float64) if U is None else U, torch.eye(out, dtype=torch.float64) if V is None else V
    )
    linear = a_linear(out, in_, True)
    layers = [SparseGradLinear.from_linear(linear, basis) for basis in (Basis(U, V), dense)]
    optimizers = [SparseGradAdamW([{"params": [layer.S], "sparse": True, "k": k}]) for layer in layers]
    plain = [a_linear(out, in_, True) for _ in layers]
    plain[1].load_state_dict(plain[0].state_dict())
    for p, basis in zip(plain, (Basis(U, V), dense), strict=True):
        optimizers.append(SparseGradAdamW([{"params": [p.weight], "sparse": True, "k": k}], bases={p.weight: basis}))
    for x, delta in batches(out, in_, 4, "dense"):
        for module in (*layers, *plain):
            module(x).backward(delta)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        close(layers[0].S.detach(), layers[1].S.detach(), 1e-12, "layer")
        close(plain[0].weight.detach(), plain[1].weight.detach(), 1e-12, "plain weight")


def test_packed_core_is_the_block_at_its_positions() -> None:
    """Packed values under AdamW move like a block's entries under AdamW with all other gradients set to zero."""
    torch.manual_seed(4)
    out, in_, r, c = 10, 14, 6, 8
    basis = Basis(orthogonal(in_, c), orthogonal(out, r))
    positions = torch.tensor([40, 3, 17, 5])
    linear = a_linear(out, in_, True)
    packed = SparseGradLinear.from_linear(linear, basis, positions=positions)
    assert packed.positions.dtype == torch.int32
    assert packed.positions.tolist() == [3, 5, 17, 40]
    oracle = reference.Layer.from_weight(linear.weight.detach(), linear.bias.detach(), basis.U, basis.V)
    start, rule = oracle.W_tilde.clone(), reference.AdamW(lr=0.01)
    values = torch.zeros(4, dtype=torch.float64)
    optimizer = SparseGradAdamW([packed.values], lr=0.01)
    for x, delta in batches(out, in_, 5, "dense"):
        y = packed(x)
        close(y.detach(), oracle.forward(x), 1e-11, "output")
        y.backward(delta)
        G_tilde = oracle.backward(x, delta)[1].reshape(-1)[packed.positions.long()]
        close(packed.values.grad, G_tilde, 1e-11, "gradient of the values")
        values = rule.step(values, G_tilde)
        oracle.W_tilde = (start.reshape(-1).index_add(0, packed.positions.long(), values)).view(r, c)
        optimizer.step()
        optimizer.zero_grad()
        close(packed.values.detach(), values, 1e-11, "values")


def test_two_groups_in_one_optimizer() -> None:
    """Layers of two shapes and the rest of a model in one optimizer: each follows its own oracle."""
    torch.manual_seed(5)
    up, down, head = a_linear(20, 8, True), a_linear(8, 20, True), a_linear(2, 8, True)
    bases = [Basis(orthogonal(8), orthogonal(20)), Basis(orthogonal(20), orthogonal(8))]
    layers = [SparseGradLinear.from_linear(linear, basis) for linear, basis in zip((up, down), bases, strict=True)]
    rest = [layers[0].bias, layers[1].bias, head.weight, head.bias]
    optimizer = SparseGradAdamW(
        [
            {"params": [layers[0].S], "sparse": True, "density": 0.1},
            {"params": [layers[1].S], "sparse": True, "k": 3, "lr": 0.1},
            {"params": rest, "weight_decay": 0.01, "lr": 0.003},
        ],
        lr=0.01,
    )
    rules = [reference.SparseAdam(lr=0.01), reference.SparseAdam(lr=0.1)]
    rest_rules = [reference.AdamW(lr=0.003, weight_decay=0.01) for _ in rest]
    expected = [layer.S.detach().clone() for layer in layers]
    expected_rest = [parameter.detach().clone() for parameter in rest]
    for _ in range(STEPS):
        x = torch.randn(6, 8, dtype=torch.float64)
        head(layers[1](torch.nn.functional.gelu(layers[0](x)))).square().mean().backward()
        for i, (layer, k) in enumerate(zip(layers, (16, 3), strict=True)):
            expected[i] = rules[i].step(expected[i], layer.S.grad, reference.topk_mask(layer.S.grad, k))
        expected_rest = [r.step(e, p.grad) for r, e, p in zip(rest_rules, expected_rest, rest, strict=True)]
        optimizer.step()
        optimizer.zero_grad()
        for layer, rule, S in zip(layers, rules, expected, strict=True):
            close(layer.S.detach(), S, 1e-12, "S")
            check_moments(optimizer, layer.S, rule, 1e-12)
        for parameter, value in zip(rest, expected_rest, strict=True):
            close(parameter.detach(), value, 1e-12, "rest")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("tokens", [2, 300])
def test_lower_precision_against_the_float64_oracle(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    """One pass from the same rounded numbers. Tolerances are a few roundings, relative to the largest value."""
    torch.manual_seed(6)
    out, in_, r, c = 48, 32, 12, 8
    linear = a_linear(out, in_, True, dtype)
    basis = Basis(orthogonal(in_, c).float(), orthogonal(out, r).float())
    layer = SparseGradLinear.from_linear(linear, basis)
    assert layer.S.dtype == torch.float32
    with torch.no_grad():
        layer.S.normal_(std=0.1)
    x, delta = torch.randn(tokens, in_, dtype=dtype, requires_grad=True), torch.randn(tokens, out, dtype=dtype)
    U, V = basis.U.double(), basis.V.double()
    oracle = reference.Layer.from_weight(linear.weight.detach().double(), linear.bias.detach().double(), U, V)
    oracle.W_tilde = oracle.W_tilde + layer.S.detach().double()
    y = layer(x)
    assert y.dtype == dtype
    y.backward(delta)
    grad_x, G_tilde, grad_bias = oracle.backward(x.detach().double(), delta.double())
    for found, expected in (
        (y.detach(), oracle.forward(x.detach().double())), (x.grad, grad_x), (layer.S.grad, G_tilde),
        (layer.bias.grad, grad_bias),
    ):  # fmt: skip
        assert float((found.double() - expected).norm() / expected.norm()) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_twenty_steps_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """The core stays in float32 whatever the weight's type. Only the products are rounded."""
    torch.manual_seed(7)
    out, in_, r, c, k = 48, 32, 12, 8, 20
    linear = a_linear(out, in_, True, dtype)
    basis = Basis(orthogonal(in_, c).float(), orthogonal(out, r).float())
    layer = SparseGradLinear.from_linear(linear, basis)
    U, V = basis.U.double(), basis.V.double()
    oracle = reference.Layer.from_weight(linear.weight.detach().double(), linear.bias.detach().double(), U, V)
    start, rule = oracle.W_tilde.clone(), reference.SparseAdam(lr=0.01)
    optimizer = SparseGradAdamW([{"params": [layer.S], "sparse": True, "k": k}], lr=0.01)
    for x, delta in batches(out, in_, 30, "dense"):
        x, delta = x.to(dtype), delta.to(dtype)
        layer(x).backward(delta)
        G_tilde = oracle.backward(x.double(), delta.double())[1]
        oracle.W_tilde = rule.step(oracle.W_tilde, G_tilde, reference.topk_mask(layer.S.grad, k))
        optimizer.step()
        optimizer.zero_grad()
        expected = oracle.W_tilde - start
        assert float((layer.S.detach() - expected).norm() / expected.norm()) < tolerance
