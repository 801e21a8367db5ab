"""Refresh: new bases or positions keep the output, what was learnt, and the moments; refusals change nothing."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear, refresh, replace_linears
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.refresh import renew_positions

OUT, IN = 9, 12
HOW = pytest.mark.parametrize("how", [{}, {"sparse": True, "k": 7}], ids=["dense", "sparse"])


def a_basis(c: int | None = None, r: int | None = None, dtype: torch.dtype = F64) -> Basis:
    return Basis(orthogonal(IN, c, dtype), orthogonal(OUT, r, dtype))


def layers_on(basis: Basis, count: int = 2, dtype: torch.dtype = F64, **options: Any) -> list[SparseGradLinear]:
    return [SparseGradLinear.from_linear(nn.Linear(IN, OUT, dtype=dtype), basis, **options) for _ in range(count)]


def batches(steps: int, count: int, seed: int = 1) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    return [[(normal(6, IN), normal(6, OUT)) for _ in range(count)] for _ in range(steps)]


def train(
    layers: list[SparseGradLinear], optimizer: torch.optim.Optimizer, steps: int = 5, seed: int = 1
) -> list[Tensor]:
    """Train each layer towards its own targets. The returned losses keep their graphs alive."""
    losses = []
    for batch in batches(steps, len(layers), seed):
        optimizer.zero_grad()
        loss = sum(
            functional.mse_loss(layer(x.to(layer.weight.dtype)), target.to(layer.weight.dtype), reduction="sum")
            for layer, (x, target) in zip(layers, batch, strict=True)
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        losses.append(loss)
    return losses


def optimizer_for(layers: list[SparseGradLinear], lr: float = 1e-2, **how: Any) -> SparseGradAdamW:
    return SparseGradAdamW([{"params": [layer.core for layer in layers], **how}], lr=lr)


def dense_moment(optimizer: SparseGradAdamW, parameter: nn.Parameter, name: str) -> Tensor:
    """Return a moment as a matrix, in whichever form it is stored."""
    state = optimizer.state[parameter]
    if "positions" not in state:
        return state[name].clone()
    rows, columns = state["positions"].long() // parameter.shape[1], state["positions"].long() % parameter.shape[1]
    return torch.zeros(parameter.shape, dtype=state[name].dtype).index_put((rows, columns), state[name])


def tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}


# What was learnt


@pytest.mark.parametrize("old", [(None, None), (5, 4), (5, None), (1, 1)])
@pytest.mark.parametrize("new", [(None, None), (5, 4), (3, 7), (8, 8), (1, None)])
def test_the_output_stays(old: tuple[int | None, int | None], new: tuple[int | None, int | None]) -> None:
    """From any size to any other. What the new directions cannot hold goes into the weight."""
    layers = layers_on(a_basis(*old))
    train(layers, optimizer_for(layers))
    x = torch.randn(5, IN, dtype=F64)
    before = [layer(x).detach() for layer in layers]
    updates = [layer.delta_weight() for layer in layers]
    weights = [layer.weight.detach().clone() for layer in layers]
    basis = a_basis(*new)
    U, V = basis.U, basis.V
    shares = refresh(layers, basis)

    for layer, output, update, weight, share in zip(layers, before, updates, weights, shares, strict=True):
        torch.testing.assert_close(layer(x).detach(), output, rtol=1e-10, atol=1e-10)
        inside = V.T @ (V @ update @ U.T) @ U
        assert share == pytest.approx(float((update - inside).norm() / update.norm()), abs=1e-9)
        torch.testing.assert_close(layer.delta_weight(), inside, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(layer.weight.detach(), weight + update - inside, rtol=1e-10, atol=1e-10)
        assert layer.basis is basis
        assert layer.core_shape == tuple(layer.S.shape) == (V.shape[0], U.shape[0])
        assert not layer.weight.requires_grad
    if new == (None, None):
        assert shares == [0.0, 0.0]
        assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, weights, strict=True))
    else:
        assert all(0.01 < share < 1 for share in shares)


def test_a_basis_that_holds_everything_leaves_the_weight() -> None:
    """The new basis is truncated but contains the old directions, so nothing is left over."""
    U, V = orthogonal(IN), orthogonal(OUT)
    (layer,) = layers_on(Basis(U[:3], V[:2]), 1)
    train([layer], optimizer_for([layer]))
    weight, S = layer.weight.detach().clone(), layer.S.detach().clone()
    (share,) = refresh([layer], Basis(U[:6], V[:5]))
    assert share == pytest.approx(0, abs=1e-12)
    torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.S.detach(), functional.pad(S, (0, 3, 0, 3)), rtol=1e-12, atol=1e-12)


def test_a_basis_that_holds_nothing() -> None:
    U, V = orthogonal(IN), orthogonal(OUT)
    (layer,) = layers_on(Basis(U[:3], V[:2]), 1)
    train([layer], optimizer_for([layer]))
    whole = layer.to_linear().weight.detach()
    assert refresh([layer], Basis(U[6:], V[5:])) == [pytest.approx(1)]
    torch.testing.assert_close(layer.weight.detach(), whole, rtol=1e-12, atol=1e-12)
    assert layer.S.detach().abs().max() < 1e-12


def test_an_untrained_layer_has_nothing_outside() -> None:
    layers = layers_on(a_basis(4, 4))
    assert refresh(layers, a_basis(2, 2), optimizer_for(layers)) == [0.0, 0.0]


@pytest.mark.parametrize("new", [(None, None), (4, 6)])
def test_the_core_is_the_old_one_rotated(new: tuple[int | None, int | None]) -> None:
    """As `reference.rotate` computes it."""
    old, basis = a_basis(), a_basis(*new)
    layers = layers_on(old)
    train(layers, optimizer_for(layers))
    expected = [reference.rotate(layer.S.detach(), old.U, old.V, basis.U, basis.V) for layer in layers]
    refresh(layers, basis)
    for layer, S in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer.S.detach(), S, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sides", ["to identity", "from identity", "one side", "the other side"])
def test_an_identity_side_is_a_basis_like_others(sides: str) -> None:
    full = a_basis()
    old, new = {
        "to identity": (full, Basis.identity()),
        "from identity": (Basis.identity(), full),
        "one side": (Basis(full.U, None), Basis(None, full.V)),
        "the other side": (Basis(None, full.V), Basis(full.U, None)),
    }[sides]
    layers = layers_on(old)
    optimizer = optimizer_for(layers)
    train(layers, optimizer)
    eye_in, eye_out = torch.eye(IN, dtype=F64), torch.eye(OUT, dtype=F64)
    matrices = [(eye_in if b.U is None else b.U, eye_out if b.V is None else b.V) for b in (old, new)]
    expected = [reference.rotate(layer.S.detach(), *matrices[0], *matrices[1]) for layer in layers]
    moments = [reference.rotate(optimizer.state[layer.S]["exp_avg"], *matrices[0], *matrices[1]) for layer in layers]
    refresh(layers, new, optimizer)
    for layer, S, moment in zip(layers, expected, moments, strict=True):
        torch.testing.assert_close(layer.S.detach(), S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[layer.S]["exp_avg"], moment, rtol=1e-12, atol=1e-12)
    train(layers, optimizer)


@HOW
@pytest.mark.parametrize("new", [(None, None), (5, 3), (2, 6)])
def test_training_goes_on(how: dict[str, Any], new: tuple[int | None, int | None]) -> None:
    """Also in other sizes, with the same parameter objects, and with the last loss still alive.

    That loss keeps autograd's record of the parameters' old shape.
    """
    layers = layers_on(a_basis(6, 6))
    optimizer = optimizer_for(layers, **how)
    parameters = [layer.S for layer in layers]
    losses = train(layers, optimizer)
    assert losses[-1].grad_fn is not None
    refresh(layers, a_basis(*new), optimizer)
    shape = layers[0].core_shape
    assert [layer.S for layer in layers] == parameters
    assert all(layer.S.grad is None and layer.S.requires_grad and layer.S.is_leaf for layer in layers)
    before = [layer.S.detach().clone() for layer in layers]
    more = train(layers, optimizer, steps=30)
    for layer, S in zip(layers, before, strict=True):
        assert layer.S.grad.shape == layer.S.shape == shape
        assert not torch.equal(layer.S.detach(), S)
        for name in ("exp_avg", "exp_avg_sq"):
            assert dense_moment(optimizer, layer.S, name).shape == shape
    assert float(more[-1].detach()) < float(losses[0].detach())
    again = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(again)  # what a checkpoint would hold fits
    train(layers, optimizer, steps=1)


def test_gradients_after_a_refresh_are_those_of_a_new_layer() -> None:
    layers = layers_on(a_basis(6, 6), 1)
    losses = train(layers, optimizer_for(layers))
    basis = a_basis(4, 3)
    refresh(layers, basis)
    (layer,) = layers
    fresh = SparseGradLinear.from_linear(layer.to_linear(), basis)
    for each in (layer, fresh):
        each(torch.ones(2, IN, dtype=F64)).square().sum().backward()
    torch.testing.assert_close(layer.S.grad, fresh.S.grad, rtol=1e-12, atol=1e-12)
    assert losses


@pytest.mark.parametrize(
    ("weight", "core", "old", "new", "tolerance"),
    [
        (torch.float32, None, torch.float32, torch.float32, 1e-5),
        (torch.float32, None, torch.float32, F64, 1e-5),
        (torch.float32, None, F64, torch.float32, 1e-5),
        (F64, None, torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, None, torch.float32, torch.float32, 2e-2),
        (torch.float32, torch.bfloat16, torch.float32, torch.float32, 2e-2),
    ],
)
@HOW
def test_mixed_types(
    weight: torch.dtype, core: torch.dtype | None, old: torch.dtype, new: torch.dtype, tolerance: float, how: Any
) -> None:
    """Bases, weights and cores may have different types."""
    layers = layers_on(a_basis(6, 5, old), dtype=weight, core_dtype=core, prefer="memory")
    optimizer = optimizer_for(layers, **how)
    for layer in layers:
        layer.S.grad = torch.randn_like(layer.S)
    optimizer.step()
    for layer in layers:
        layer.S.data.normal_(std=0.3)
    x = torch.randn(2, IN, dtype=weight)  # few tokens: applied through the factors
    with torch.no_grad():
        before = [layer(x).double() for layer in layers]
    types = [{name: value.dtype for name, value in tensors(optimizer.state[layer.S]).items()} for layer in layers]
    refresh(layers, a_basis(4, 7, new), optimizer)
    for layer, output, expected in zip(layers, before, types, strict=True):
        with torch.no_grad():
            found = layer(x).double()
        assert float((found - output).norm() / output.norm()) < tolerance
        assert layer.weight.dtype == weight
        assert layer.S.dtype == (core or torch.promote_types(weight, torch.float32))
        assert {name: value.dtype for name, value in tensors(optimizer.state[layer.S]).items()} == expected
        layer.S.grad = torch.randn_like(layer.S)
    optimizer.step()


def test_a_core_of_half_precision_is_rounded_once() -> None:
    """The update is rotated in float32 and rounded once at the end."""
    layers = layers_on(a_basis(dtype=torch.float32), 1, torch.float32, core_dtype=torch.bfloat16)
    layers[0].S.data.normal_()
    old, new = layers[0].basis, a_basis(dtype=torch.float32)
    exact = reference.rotate(layers[0].S.detach().float(), old.U, old.V, new.U, new.V)
    refresh(layers, new)
    error = (layers[0].S.detach().float() - exact).norm() / exact.norm()
    assert float(error) < 2**-9


# The optimizer's moments


@pytest.mark.parametrize("new", [(None, None), (5, 4), (1, 1)])
def test_first_moments_are_those_of_training_in_the_new_basis(new: tuple[int | None, int | None]) -> None:
    """Gradients of a layer that does not move rotate with the basis, and so does any sum of them."""
    basis = a_basis(*new)
    layers = layers_on(a_basis())
    for layer in layers:
        layer.S.data.normal_(std=0.1)
    twins = copy.deepcopy(layers)
    refresh(twins, basis)
    optimizer, twin_optimizer = optimizer_for(layers, lr=0.0), optimizer_for(twins, lr=0.0)
    train(layers, optimizer)
    train(twins, twin_optimizer)
    refresh(layers, basis, optimizer)
    for layer, twin in zip(layers, twins, strict=True):
        found, expected = optimizer.state[layer.S], twin_optimizer.state[twin.S]
        assert expected["exp_avg"].abs().max() > 0.01
        torch.testing.assert_close(found["exp_avg"], expected["exp_avg"], rtol=1e-10, atol=1e-10)
        assert found["step"] == expected["step"] == 5
        assert found["exp_avg_sq"].shape == expected["exp_avg_sq"].shape


def test_moments_are_rotated_side_by_side() -> None:
    """By the formulas, written with dense matrices."""
    old, new = a_basis(), a_basis(7, 5)
    layers = layers_on(old)
    optimizer = optimizer_for(layers)
    train(layers, optimizer)
    states = [tensors(optimizer.state[layer.S]) for layer in layers]
    refresh(layers, new, optimizer)
    R_U, R_V = new.U @ old.U.T, new.V @ old.V.T
    for layer, state in zip(layers, states, strict=True):
        found = optimizer.state[layer.S]
        expected = reference.rotate(state["exp_avg"], old.U, old.V, new.U, new.V)
        torch.testing.assert_close(found["exp_avg"], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            found["exp_avg_sq"], R_V**2 @ state["exp_avg_sq"] @ (R_U**2).T, rtol=1e-12, atol=1e-12
        )


def test_second_moments_keep_their_total() -> None:
    """With complete bases the total stays. With any bases, none is negative."""
    layers = layers_on(a_basis())
    optimizer = optimizer_for(layers)
    train(layers, optimizer)
    totals = [float(optimizer.state[layer.S]["exp_avg_sq"].sum()) for layer in layers]
    assert min(totals) > 0
    refresh(layers, a_basis(), optimizer)
    for layer, total in zip(layers, totals, strict=True):
        exp_avg_sq = optimizer.state[layer.S]["exp_avg_sq"]
        assert float(exp_avg_sq.min()) >= 0
        assert float(exp_avg_sq.sum()) == pytest.approx(total, rel=1e-12)
    refresh(layers, a_basis(3, 3), optimizer)
    for layer, total in zip(layers, totals, strict=True):
        exp_avg_sq = optimizer.state[layer.S]["exp_avg_sq"]
        assert float(exp_avg_sq.min()) >= 0
        assert 0 < float(exp_avg_sq.sum()) < total


def test_second_moments_of_uncorrelated_entries_are_those_of_the_new_basis() -> None:
    """The meaning of `R_V² exp_avg_sq (R_U²)ᵀ`: variances of independent entries, seen in the new basis."""
    old, new = a_basis(), a_basis(4, 6)
    (layer,) = layers_on(old, 1)
    optimizer = optimizer_for([layer])
    layer.S.grad = torch.ones_like(layer.S)
    optimizer.step()
    variances = torch.rand(OUT, IN, dtype=F64)
    optimizer.state[layer.S]["exp_avg_sq"].copy_(variances)
    refresh([layer], new, optimizer)
    samples = torch.randn(20_000, OUT, IN, dtype=F64) * variances.sqrt()
    rotated = (new.V @ old.V.T) @ samples @ (new.U @ old.U.T).T
    expected = rotated.square().mean(0)
    assert float((optimizer.state[layer.S]["exp_avg_sq"] / expected - 1).abs().max()) < 0.05  # standard error 0.01


@pytest.mark.parametrize("new", [(None, None), (5, 4), (3, 3)])
def test_as_many_sparse_moments_are_kept_as_there_were(new: tuple[int | None, int | None]) -> None:
    """Those with the largest second moments, with both rotated values; fewer only if the new core is smaller."""
    old, basis = a_basis(), a_basis(*new)
    layers = layers_on(old)
    optimizer = optimizer_for(layers, sparse=True, k=7)
    train(layers, optimizer)
    touched = [optimizer.touched(layer.S) for layer in layers]
    assert all(7 < count < OUT * IN for count in touched)
    dense = [
        (
            reference.rotate(dense_moment(optimizer, layer.S, "exp_avg"), old.U, old.V, basis.U, basis.V),
            (basis.V @ old.V.T) ** 2 @ dense_moment(optimizer, layer.S, "exp_avg_sq") @ ((basis.U @ old.U.T) ** 2).T,
        )
        for layer in layers
    ]
    refresh(layers, basis, optimizer)
    for layer, count, (exp_avg, exp_avg_sq) in zip(layers, touched, dense, strict=True):
        state = optimizer.state[layer.S]
        assert optimizer.touched(layer.S) == min(count, layer.S.numel())
        positions = state["positions"]
        assert positions.dtype == torch.int32
        assert bool((positions.diff() > 0).all())
        mask = reference.topk_mask(exp_avg_sq, min(count, layer.S.numel()))
        assert torch.equal(mask.reshape(-1).nonzero().squeeze(1), positions.long())
        torch.testing.assert_close(state["exp_avg"], exp_avg[mask], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["exp_avg_sq"], exp_avg_sq[mask], rtol=1e-12, atol=1e-12)
        assert state["step"] == 5
    if new != (2, 2):
        train(layers, optimizer)


@HOW
@pytest.mark.parametrize("size", [(None, None), (5, 4)])
def test_the_same_basis_changes_nothing(how: dict[str, Any], size: tuple[int | None, int | None]) -> None:
    basis = a_basis(*size)
    layers = layers_on(basis)
    optimizer = optimizer_for(layers, **how)
    train(layers, optimizer)
    before = [
        (layer.S.detach().clone(), layer.weight.detach().clone(), tensors(optimizer.state[layer.S])) for layer in layers
    ]
    same = Basis(basis.U.clone(), basis.V.clone())
    assert refresh(layers, same, optimizer) == pytest.approx([0, 0], abs=1e-12)
    for layer, (S, weight, state) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.S.detach(), S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(layer.weight.detach(), weight, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(tensors(optimizer.state[layer.S]), state, rtol=1e-12, atol=1e-12)


def test_training_after_a_refresh_to_the_same_basis_is_the_same() -> None:
    """Compared step by step with a run without the refresh."""
    basis = a_basis()
    layers = layers_on(basis)
    twins = copy.deepcopy(layers)
    optimizers = [optimizer_for(each, sparse=True, k=7) for each in (layers, twins)]
    for each, optimizer in zip((layers, twins), optimizers, strict=True):
        train(each, optimizer)
    refresh(layers, Basis(basis.U.clone(), basis.V.clone()), optimizers[0])
    for each, optimizer in zip((layers, twins), optimizers, strict=True):
        train(each, optimizer, seed=2)
    for layer, twin in zip(layers, twins, strict=True):
        torch.testing.assert_close(layer.S, twin.S, rtol=1e-9, atol=1e-9)


def test_there_and_back() -> None:
    """Complete bases lose nothing of the core and the first moments."""
    old = a_basis()
    layers = layers_on(old)
    optimizer = optimizer_for(layers)
    train(layers, optimizer)
    before = [(layer.S.detach().clone(), optimizer.state[layer.S]["exp_avg"].clone()) for layer in layers]
    refresh(layers, a_basis(), optimizer)
    assert not torch.allclose(layers[0].S, before[0][0], atol=1e-3)
    refresh(layers, old, optimizer)
    for layer, (S, exp_avg) in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.S.detach(), S, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(optimizer.state[layer.S]["exp_avg"], exp_avg, rtol=1e-12, atol=1e-12)


# Refused, and nothing changed


def picture(layers: list[SparseGradLinear], optimizer: SparseGradAdamW) -> list[Any]:
    return [
        (
            id(layer.basis),
            layer.core_shape,
            {name: value.clone() for name, value in layer.state_dict().items()},
            tensors(optimizer.state.get(layer.core, {})),
        )
        for layer in layers
    ]


def assert_same_picture(found: list[Any], expected: list[Any]) -> None:
    for (basis, shape, values, state), (basis_2, shape_2, values_2, state_2) in zip(found, expected, strict=True):
        assert (basis, shape) == (basis_2, shape_2)
        torch.testing.assert_close(values, values_2, rtol=0, atol=0)
        torch.testing.assert_close(state, state_2, rtol=0, atol=0)


def test_a_packed_layer_is_refused() -> None:
    layers = layers_on(a_basis(), 3)
    layers[2].pack(torch.arange(10))
    optimizer = optimizer_for(layers)
    train(layers, optimizer)
    before = picture(layers, optimizer)
    with pytest.raises(ValueError, match=r"a packed layer .* call fold\(\) and unpack\(\) first, then pack\(\)"):
        refresh(layers, a_basis(4, 4), optimizer)
    assert_same_picture(picture(layers, optimizer), before)


def test_the_way_out_for_a_packed_layer() -> None:
    """The remedy in the message: fold, unpack, refresh, pack."""
    (layer,) = layers_on(a_basis(), 1)
    layer.pack(torch.arange(10))
    train([layer], optimizer_for([layer]))
    x = torch.randn(4, IN, dtype=F64)
    output = layer(x).detach()
    layer.fold()
    layer.unpack()
    refresh([layer], a_basis(4, 4))
    layer.pack(torch.arange(5))
    torch.testing.assert_close(layer(x).detach(), output, rtol=1e-12, atol=1e-12)


def test_a_basis_of_another_shape_is_refused() -> None:
    layers = layers_on(a_basis())
    other = SparseGradLinear.from_linear(nn.Linear(OUT, IN, dtype=F64), Basis.identity())
    optimizer = optimizer_for([*layers, other])
    train(layers, optimizer)
    before = picture([*layers, other], optimizer)
    with pytest.raises(ValueError, match=r"the basis is for layers with \(out, in\) = \(9, 12\), found .* \(12, 9\)"):
        refresh([*layers, other], a_basis(), optimizer)
    assert_same_picture(picture([*layers, other], optimizer), before)


def test_layers_without_moments_yet() -> None:
    """Before the first step there are no moments to carry over."""
    layers = layers_on(a_basis())
    optimizer = optimizer_for(layers, sparse=True, k=7)
    refresh(layers, a_basis(5, 5), optimizer)
    assert not optimizer.state
    train(layers, optimizer)


def test_layers_that_share_a_basis_share_the_new_one() -> None:
    """In a model: one module, saved once, before and after."""
    model = nn.Sequential(*(nn.Linear(IN, IN, dtype=F64) for _ in range(3)))
    replace_linears(model, {"all": ["0", "1", "2"]}, {"all": Basis(orthogonal(IN), orthogonal(IN))})
    layers = [layer for layer in model if isinstance(layer, SparseGradLinear)]
    saved = list(model.state_dict())
    basis = Basis(orthogonal(IN, 3), orthogonal(IN, 2))
    refresh(layers, basis)
    assert [layer.basis for layer in layers] == [basis] * 3
    assert list(model.state_dict()) == saved
    assert sum(name.endswith("basis.U") for name in saved) == 1


def test_layers_on_another_device_share_a_copy() -> None:
    """As after a calibration with `gram_device="cpu"`; `meta` stands for a GPU."""
    layers = [layer.to("meta") for layer in layers_on(a_basis())]
    basis = a_basis()
    refresh(layers, basis)
    assert layers[0].basis is layers[1].basis is not basis
    assert {str(layer.basis.U.device) for layer in layers} == {"meta"}


# New positions of a packed layer

OLD = torch.tensor([2, 3, 5, 17, 40, 41, 60, 85])
NEW = torch.tensor([85, 3, 0, 17, 50, 60, 87, 4])  # in no order: 3, 17, 60 and 85 stay
TRUNCATED = pytest.mark.parametrize("size", [(None, None), (11, 8)], ids=["complete", "truncated"])  # 108, 88 entries


def packed(positions: Tensor = OLD, basis: Basis | None = None, **how: Any) -> tuple[SparseGradLinear, SparseGradAdamW]:
    """Make a packed layer, trained for a few steps."""
    (layer,) = layers_on(basis or a_basis(), 1, positions=positions)
    optimizer = optimizer_for([layer], **how)
    train([layer], optimizer)
    assert bool(layer.values.detach().any())
    return layer, optimizer


@pytest.mark.parametrize("fold", [True, False])
@TRUNCATED
def test_entries_that_stay_keep_values_and_moments(fold: bool, size: tuple[int | None, int | None]) -> None:
    layer, optimizer = packed(OLD, a_basis(*size))
    values = dict(zip(layer.positions.tolist(), layer.values.tolist(), strict=True))
    state = {
        name: dict(zip(layer.positions.tolist(), optimizer.state[layer.values][name].tolist(), strict=True))
        for name in ("exp_avg", "exp_avg_sq")
    }
    parameter, step = layer.values, optimizer.state[layer.values]["step"].clone()
    assert renew_positions(layer, NEW, optimizer, fold=fold) == 4

    ascending = sorted(NEW.tolist())
    assert layer.positions.tolist() == ascending
    assert layer.positions.dtype == torch.int32
    assert layer.values is parameter
    assert layer.values.tolist() == [values.get(p, 0.0) for p in ascending]
    for name, kept in state.items():
        assert optimizer.state[layer.values][name].tolist() == [kept.get(p, 0.0) for p in ascending]
        assert any(kept[p] != 0 for p in ascending if p in kept)
    assert optimizer.state[layer.values]["step"] == step


@TRUNCATED
@pytest.mark.parametrize("with_optimizer", [True, False])
def test_folding_keeps_the_output(with_optimizer: bool, size: tuple[int | None, int | None]) -> None:
    """Dropped entries go into the frozen weight. Its old storage, which others may hold, does not change."""
    layer, optimizer = packed(OLD, a_basis(*size))
    x = torch.randn(5, IN, dtype=F64)
    output, weight = layer(x).detach(), layer.weight
    copied = weight.detach().clone()
    if with_optimizer:
        renew_positions(layer, NEW, optimizer)
    else:
        renew_positions(layer, NEW[:5])  # fewer
    torch.testing.assert_close(layer(x).detach(), output, rtol=1e-12, atol=1e-12)
    assert torch.equal(weight, copied)
    assert not torch.equal(layer.weight, copied)
    assert not layer.weight.requires_grad


def test_without_folding_what_leaves_is_dropped() -> None:
    layer, optimizer = packed()
    x = torch.randn(5, IN, dtype=F64)
    leaving = layer.dense_core().reshape(-1)
    leaving[[3, 17, 60, 85]] = 0
    dropped = layer.basis.from_basis(leaving.reshape(layer.core_shape))
    assert dropped.norm() > 0.01
    expected, weight = (layer(x) - x @ dropped.T).detach(), layer.weight
    renew_positions(layer, NEW, optimizer, fold=False)
    torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-12, atol=1e-12)
    assert layer.weight is weight


def test_the_weight_stays_where_nothing_learnt_leaves() -> None:
    (layer,) = layers_on(a_basis(), 1, positions=OLD)
    weight = layer.weight
    assert renew_positions(layer, NEW) == 4
    assert layer.weight is weight
    train([layer], optimizer_for([layer]))
    values = layer.values.detach().clone()
    assert renew_positions(layer, NEW.flip(0)) == 0
    assert layer.weight is weight
    assert torch.equal(layer.values.detach(), values)


@pytest.mark.parametrize("count", [3, 8, 20])
def test_training_goes_on_at_other_positions(count: int) -> None:
    """With as many positions as before, or, with another optimizer, fewer or more. The last loss is still alive."""
    layer, optimizer = packed()
    losses = train([layer], optimizer)
    positions = torch.randperm(OUT * IN)[:count]
    renew_positions(layer, positions, optimizer if count == 8 else None)
    assert layer.values.grad is None
    assert layer.values.requires_grad
    optimizer = optimizer if count == 8 else optimizer_for([layer])
    before = layer.values.detach().clone()
    train([layer], optimizer)
    assert layer.values.grad.shape == (count,)
    assert bool((layer.values.detach() != before).all())
    assert losses


def test_moments_of_selected_values_move_too() -> None:
    """Packed values may themselves be selected from. Moments then exist only for values ever selected."""
    layer, optimizer = packed(torch.arange(30), sparse=True, k=2)
    at = layer.positions[optimizer.state[layer.values]["positions"].long()].tolist()
    assert 2 < len(at) < 30
    state = {name: dict(zip(at, optimizer.state[layer.values][name].tolist(), strict=True))
             for name in ("exp_avg", "exp_avg_sq")}  # fmt: skip
    new = torch.cat([torch.arange(at[1], 30), torch.arange(40, 40 + at[1])])  # the first one touched leaves
    renew_positions(layer, new, optimizer)
    found = optimizer.state[layer.values]
    assert layer.positions[found["positions"].long()].tolist() == at[1:]
    assert found["positions"].dtype == torch.int32
    for name, kept in state.items():
        assert found[name].tolist() == [kept[p] for p in at[1:]]
    train([layer], optimizer)


@pytest.mark.parametrize("core", [torch.bfloat16, torch.float32])
def test_folding_from_a_narrow_core_into_a_wide_weight(core: torch.dtype) -> None:
    (layer,) = layers_on(a_basis(dtype=torch.float32), 1, torch.float32, positions=OLD, core_dtype=core)
    layer.values.data.normal_()
    leaving = layer.dense_core().float()
    expected = layer.weight + layer.basis.V.T @ leaving @ layer.basis.U
    renew_positions(layer, torch.tensor([0, 1]))
    torch.testing.assert_close(layer.weight.detach(), expected.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        (
            torch.tensor([0, 108]),
            ValueError,
            "expected positions between 0 and 107, each once; found 2 .*from 0 to 108",
        ),
        (torch.tensor([-1, 3]), ValueError, "expected positions between 0 and 107, each once; found 2 .*from -1 to 3"),
        (torch.tensor([4, 5, 4]), ValueError, r"each once; found 3 \(2 distinct\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, "found 0 .*none"),
        (torch.tensor([0.0, 1.0]), TypeError, "expected positions as a vector of integers, found torch.float32"),
        (torch.ones(108, dtype=torch.bool), TypeError, "expected positions as a vector of integers, found torch.bool"),
        (torch.tensor([[0, 1]]), TypeError, r"expected positions as a vector of integers, .* \(1, 2\)"),
        (torch.arange(7), ValueError, "with an optimizer the number of positions stays, found 7 in place of 8"),
    ],
)
def test_positions_are_checked(positions: Tensor, error: type[Exception], words: str) -> None:
    layer, optimizer = packed()
    before = picture([layer], optimizer)
    with pytest.raises(error, match=words):
        renew_positions(layer, positions, optimizer)
    assert_same_picture(picture([layer], optimizer), before)


def test_a_block_has_no_positions() -> None:
    (layer,) = layers_on(a_basis(), 1)
    with pytest.raises(ValueError, match=r"expected a packed layer, found a block; call pack\(positions\)"):
        renew_positions(layer, NEW)


def test_refresh_refuses_a_core_smaller_than_what_the_optimizer_selects() -> None:
    layer = SparseGradLinear.from_linear(nn.Linear(6, 6), Basis(torch.eye(6), torch.eye(6)))
    optimizer = SparseGradAdamW([{"params": [layer.S], "sparse": True, "k": 20}])
    with pytest.raises(ValueError, match="k must be between 1 and the 4 entries there are, found 20"):
        refresh([layer], Basis(torch.eye(6)[:2], torch.eye(6)[:2]), optimizer)
    assert layer.core_shape == (6, 6)


def test_the_new_basis_of_a_part_of_a_group_is_saved() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(IN, OUT, dtype=F64) for _ in range(3)))
    shared = a_basis()
    replace_linears(model, {"all": ["0", "1", "2"]}, {"all": shared})
    refresh([model[1], model[2]], a_basis())
    saved = set(model.state_dict())
    assert {name for name in saved if name.endswith(".U")} == {"0.basis.U", "1.basis.U"}
    assert model[2].basis is model[1].basis


@pytest.mark.parametrize("moved", ["0", "01", "12", "012"])
@pytest.mark.parametrize("how", ["as made", "copied", "pickled"])
def test_each_basis_of_a_divided_group_is_saved_once(moved: str, how: str) -> None:
    """Also if the layer that saved the old basis for the others is among those that leave it."""
    model = nn.Sequential(*(nn.Linear(IN, OUT, dtype=F64) for _ in range(3)))
    replace_linears(model, {"all": ["0", "1", "2"]}, {"all": a_basis()})
    if how == "copied":
        model = copy.deepcopy(model)
    elif how == "pickled":
        model = pickle.loads(pickle.dumps(model))
    old, new = model[0].basis, a_basis()
    refresh([model[int(i)] for i in moved], new)
    bases = [new if str(i) in moved else old for i in range(3)]
    assert [layer.basis for layer in model] == bases
    state = model.state_dict()
    saved = {name: value for name, value in state.items() if name.endswith(".U")}
    first = [bases.index(basis) for basis in dict.fromkeys(bases)]
    assert set(saved) == {f"{i}.basis.U" for i in first}
    assert all(torch.equal(saved[f"{i}.basis.U"], bases[i].U) for i in first)
    refresh(list(model), new)  # the divided group is whole again
    assert sum(name.endswith(".U") for name in model.state_dict()) == 1


def test_a_weight_in_half_precision_is_rounded_once() -> None:
    """The sum is computed in float32. Rounding the added part on its own would lose more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False)).to(torch.bfloat16)
    old, new = (Basis(orthogonal(64, 16, torch.float32), orthogonal(64, 16, torch.float32)) for _ in range(2))
    replace_linears(model, {"all": ["0"]}, {"all": old})
    layer = model[0]
    nn.init.normal_(layer.S, std=1e-2)
    update = layer.delta_weight()
    expected = (layer.weight + update - new.from_basis(new.to_basis(update))).to(torch.bfloat16)
    refresh([layer], new)
    assert (layer.weight == expected).float().mean() > 0.999  # but for what lies half way between two numbers


# Bases in half precision, and moments of other kinds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_complete_bases_in_half_precision_lose_nothing(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Rounded bases are only nearly orthogonal: `V Vᵀ S U Uᵀ` is up to a percent from `S`."""

    def rounded() -> Basis:
        return Basis(orthogonal(IN).to(dtype), orthogonal(OUT).to(dtype))

    (layer,) = layers_on(rounded(), 1, weight_dtype)
    with torch.no_grad():
        layer.S.normal_()
    weight, update = layer.weight.clone(), layer.delta_weight()
    new = rounded()
    naive = new.from_basis(new.to_basis(update))
    assert float((naive - update).norm() / update.norm()) > 3e-4  # as it was: this test can fail
    assert refresh([layer], new) == [0.0]
    assert torch.equal(layer.weight, weight)
    assert float((layer.delta_weight() - update).norm() / update.norm()) < 1e-6


def test_amsgrad_is_refused_before_anything_changes() -> None:
    """A running maximum of second moments has no meaning in another basis."""
    layers = layers_on(a_basis(), 2)
    optimizer = torch.optim.AdamW([layers[1].S], amsgrad=True)
    train(layers, optimizer, 2)
    old, S = layers[0].basis, [layer.S.detach().clone() for layer in layers]
    with pytest.raises(ValueError, match=r"found exp_avg, exp_avg_sq, max_exp_avg_sq, step in AdamW; .*amsgrad=False"):
        refresh(layers, a_basis(), optimizer)
    assert all(layer.basis is old for layer in layers)
    assert all(torch.equal(layer.S, before) for layer, before in zip(layers, S, strict=True))
    refresh(layers, a_basis(), torch.optim.AdamW([layers[1].S]))  # has no state yet


def test_moments_of_other_optimizers_are_refused() -> None:
    layers = layers_on(a_basis(), 1)
    optimizer = torch.optim.SGD([layers[0].S], lr=0.1, momentum=0.9)
    train(layers, optimizer, 2)
    with pytest.raises(ValueError, match="found momentum_buffer in SGD"):
        refresh(layers, a_basis(), optimizer)
    packed = layers_on(a_basis(), 1, positions=torch.arange(7))
    optimizer = torch.optim.AdamW([packed[0].values], amsgrad=True)
    train(packed, optimizer, 2)
    before = packed[0].positions
    with pytest.raises(ValueError, match="max_exp_avg_sq"):
        renew_positions(packed[0], torch.arange(1, 8), optimizer)
    assert packed[0].positions is before
