"""SparseGradAdamW: torch's update rules, exact resumption, refused gradients, schedulers and scalers."""

from __future__ import annotations

import copy
import io
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from helpers import F64, orthogonal, state_bytes, train
from sparsegrad_peft import Basis, LiteralSparseGradLinear, SparseGradAdamW, SparseGradLinear, topk_magnitude
from sparsegrad_peft.method import optim


def parameter(*shape: int, dtype: torch.dtype = F64) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape, dtype=dtype))


def sparse(p: nn.Parameter, **options: Any) -> dict[str, Any]:
    return {"params": [p], "sparse": True, **options}


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.0, 0.99)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 123), (123, 5), (30, 40)])
def test_rule_is_torchs_sparse_adam(shape: tuple[int, int], betas: tuple[float, float]) -> None:
    """torch's SparseAdam, ours from COO gradients, and ours selecting from dense gradients give the same weights."""
    k = max(1, math.prod(shape) // 7)
    start = torch.randn(*shape, dtype=F64)
    theirs, from_coo, from_dense = (nn.Parameter(start.clone()) for _ in range(3))
    optimizers = [
        torch.optim.SparseAdam([theirs], lr=0.03, betas=betas),
        SparseGradAdamW([sparse(from_coo)], lr=0.03, betas=betas),
        SparseGradAdamW([sparse(from_dense, k=k)], lr=0.03, betas=betas),
    ]
    for _ in range(20):
        G = torch.randn(*shape, dtype=F64)
        theirs.grad, from_coo.grad, from_dense.grad = topk_magnitude(G, k), topk_magnitude(G, k), G
        for optimizer in optimizers:
            optimizer.step()
        for ours in (from_coo, from_dense):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-13, atol=1e-13)
    dense = optimizers[0].state[theirs]
    state = optimizers[2].state[from_dense]
    positions = state["positions"].long()
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[moment], dense[moment].reshape(-1)[positions], rtol=1e-13, atol=1e-15)
        assert dense[moment].count_nonzero() == len(positions)
    assert state["positions"].dtype == torch.int32
    assert torch.equal(positions, positions.sort().values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rest_is_torchs_adamw_to_the_bit(dtype: torch.dtype) -> None:
    start = [torch.randn(7, 3, dtype=dtype), torch.randn(5, dtype=dtype)]
    runs = []
    for make in (torch.optim.AdamW, SparseGradAdamW):
        torch.manual_seed(1)
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer = make(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
        for _ in range(20):
            for p in parameters:
                p.grad = torch.randn_like(p)
            optimizer.step()
        runs.append(parameters)
    for theirs, ours in zip(*runs, strict=True):
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("saved", [True, False])
def test_the_fused_adamw_is_the_other_one(saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, also where it goes on with a state of the other one. A gradient in another layout is not fused."""
    start = [torch.randn(7, 3, dtype=F64), torch.randn(5, dtype=F64)]
    runs, calls = [], []
    monkeypatch.setattr(optim, "adamw", lambda *args, **how: calls.append(how["fused"]) or adamw(*args, **how))
    for devices in (set(), {"cpu"}):
        torch.manual_seed(1)
        parameters = [nn.Parameter(value.clone()) for value in start]
        optimizer = SparseGradAdamW(parameters, lr=0.01, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
        for step in range(6):
            monkeypatch.setattr(optim, "FUSED_ON", set() if saved and step < 3 else devices)
            if step == 3:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            for p in parameters:
                p.grad = torch.randn_like(p)
            if step == 5:
                parameters[0].grad = parameters[0].grad.T.contiguous().T
            optimizer.step()
        runs.append(parameters)
    assert calls == [None] * 6 + ([None] * 3 if saved else [True] * 3) + [True, True, None]
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def a_model() -> tuple[nn.Module, list[dict[str, Any]], dict[nn.Parameter, Basis]]:
    """Make a model with a layer of each kind (block, packed, plain weight with a basis, literal) and a head."""
    torch.manual_seed(2)
    basis = Basis(orthogonal(8, 6).float(), orthogonal(8, 5).float())
    complete = Basis(orthogonal(8).float(), orthogonal(8).float())
    block = SparseGradLinear.from_linear(nn.Linear(8, 8), basis)
    packed = SparseGradLinear.from_linear(nn.Linear(8, 8), basis, positions=torch.tensor([1, 4, 20]))
    plain = nn.Linear(8, 8)
    literal = LiteralSparseGradLinear.from_linear(nn.Linear(8, 8), complete, k=6)
    head = nn.Linear(8, 2)
    groups = [
        sparse(block.S, k=4),
        sparse(plain.weight, density=0.1, lr=0.02),
        sparse(literal.W_tilde),
        {"params": [packed.values, *head.parameters(), plain.bias, block.bias], "weight_decay": 0.01},
    ]
    return nn.Sequential(block, nn.GELU(), packed, plain, nn.GELU(), literal, head), groups, {plain.weight: complete}


def inputs(steps: range) -> list[Tensor]:
    return [torch.randn(16, 8, generator=torch.Generator().manual_seed(step)) for step in steps]


def mean_square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def setup() -> tuple[nn.Module, SparseGradAdamW, Any]:
    model, groups, bases = a_model()
    optimizer = SparseGradAdamW(groups, lr=0.01, bases=bases)
    return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))


def test_stop_and_resume_equals_no_stop_to_the_bit(tmp_path: Path) -> None:
    """Through a file read with `weights_only`, since the state holds only tensors and numbers."""
    straight, optimizer, scheduler = setup()
    train(straight, optimizer, inputs(range(12)), mean_square, scheduler)

    model, first, first_scheduler = setup()
    train(model, first, inputs(range(5)), mean_square, first_scheduler)
    checkpoint = {
        "model": model.state_dict(),
        "optimizer": first.state_dict(),
        "scheduler": first_scheduler.state_dict(),
    }
    torch.save(checkpoint, tmp_path / "checkpoint.pt")

    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed, second, second_scheduler = setup()
    resumed.load_state_dict(loaded["model"])
    second.load_state_dict(loaded["optimizer"])
    second_scheduler.load_state_dict(loaded["scheduler"])
    train(resumed, second, inputs(range(5, 12)), mean_square, second_scheduler)

    for (name, expected), found in zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
    states = [o.state_dict()["state"] for o in (optimizer, second)]
    assert states[0].keys() == states[1].keys()
    for key in states[0]:
        for name, value in states[0][key].items():
            other = states[1][key][name]
            assert torch.equal(value, other) if isinstance(value, Tensor) else value == other
            assert getattr(value, "dtype", None) == getattr(other, "dtype", None)


def test_half_precision_parameter_keeps_wide_moments_through_a_resume() -> None:
    """The base class casts loaded state to the parameter's type, which would turn positions into bfloat16."""
    p = parameter(40, 40, dtype=torch.bfloat16)
    optimizer = SparseGradAdamW([sparse(p, k=30)])
    for _ in range(3):
        p.grad = torch.randn_like(p)
        optimizer.step()
    twin = nn.Parameter(p.detach().clone())
    other = SparseGradAdamW([sparse(twin, k=30)])
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert other.state[twin]["positions"].dtype == torch.int32
    assert other.state[twin]["exp_avg"].dtype == torch.float32
    assert torch.equal(other.state[twin]["positions"], optimizer.state[p]["positions"])
    p.grad = twin.grad = torch.randn_like(p)
    optimizer.step()
    assert optimizer.state[p]["step"] != other.state[twin]["step"]  # no storage is shared
    other.step()
    assert torch.equal(p, twin)


def test_selection_is_made_once_on_the_accumulated_gradient() -> None:
    """Micro-batches are added up first. Selecting in each one would touch more entries, and other ones."""
    linear, basis = nn.Linear(20, 30, bias=False, dtype=F64), Basis(orthogonal(20), orthogonal(30))
    x, delta, k = torch.randn(32, 20, dtype=F64), torch.randn(32, 30, dtype=F64), 12
    parts = list(zip(x.chunk(4), delta.chunk(4), strict=True))
    layers = [SparseGradLinear.from_linear(linear, basis) for _ in range(2)]
    optimizers = [SparseGradAdamW([sparse(layer.S, k=k)]) for layer in layers]
    layers[0](x).backward(delta)
    for part, part_delta in parts:
        layers[1](part).backward(part_delta)
    exact = topk_magnitude(layers[0].S.grad, k)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(layers[1].S.detach(), layers[0].S.detach(), rtol=1e-10, atol=1e-12)
    assert [o.touched(layer.S) for o, layer in zip(optimizers, layers, strict=True)] == [k, k]

    literal = LiteralSparseGradLinear.from_linear(linear, basis, k=k)
    for part, part_delta in parts:
        literal(part).backward(part_delta)
    union = literal.W_tilde.grad.coalesce()
    assert union.indices().shape[1] >= 2 * k
    right = set(map(tuple, exact.indices().T.tolist()))
    largest = topk_magnitude(union.to_dense(), k)
    assert len(right & set(map(tuple, largest.indices().T.tolist()))) < k


def test_entries_not_selected_stand_still() -> None:
    p = parameter(6, 6)
    optimizer = SparseGradAdamW([sparse(p, k=5, weight_decay=0.5)], lr=0.1)
    touched = torch.zeros(36, dtype=torch.bool)
    for _ in range(4):
        before, p.grad = p.detach().clone(), torch.randn_like(p)
        selected = torch.zeros(36, dtype=torch.bool)
        selected[p.grad.abs().reshape(-1).topk(5).indices] = True
        optimizer.step()
        moved = (p.detach() != before).reshape(-1)
        assert torch.equal(moved, selected)
        touched |= selected
        assert optimizer.touched(p) == int(touched.sum())


def test_state_costs_twelve_bytes_for_each_touched_entry() -> None:
    p, rest = parameter(100, 100, dtype=torch.float32), parameter(10, dtype=torch.float32)
    optimizer = SparseGradAdamW([sparse(p, density=0.01), {"params": [rest]}])
    assert optimizer.touched(p) == 0
    assert state_bytes(optimizer) == 0
    p.grad = torch.randn_like(p)
    for _ in range(3):  # the same gradient: the same hundred entries
        optimizer.step()
    assert optimizer.touched(p) == 100
    assert state_bytes(optimizer) == 1200
    assert "12 bytes for each entry" in SparseGradAdamW.__doc__
    rest.grad = torch.randn_like(rest)
    optimizer.step()
    assert state_bytes(optimizer) == 1200 + 2 * 40 + 4


def test_vector_and_transposed_parameters() -> None:
    """A vector may be selected from. A parameter that is a view with other strides is written in place."""
    vector, matrix = parameter(50), nn.Parameter(torch.randn(6, 4, dtype=F64).T)
    assert not matrix.is_contiguous()
    before, storage = matrix.detach().clone(), matrix.data_ptr()
    optimizer = SparseGradAdamW([sparse(vector, k=3), sparse(matrix, k=2)], lr=0.1)
    vector.grad, matrix.grad = torch.arange(50, dtype=F64), torch.zeros(4, 6, dtype=F64)
    matrix.grad[3, 1], matrix.grad[0, 5] = 5.0, -5.0
    optimizer.step()
    assert optimizer.state[vector]["positions"].tolist() == [47, 48, 49]
    assert (matrix != before).nonzero().tolist() == [[0, 5], [3, 1]]
    assert matrix.data_ptr() == storage
    assert float(before[3, 1] - matrix.detach()[3, 1]) == pytest.approx(0.1, rel=1e-5)


def test_parameters_without_gradient_are_left_alone() -> None:
    p, q, rest = parameter(4, 4), parameter(4, 4), parameter(3)
    optimizer = SparseGradAdamW([{"params": [p, q], "sparse": True, "k": 2}, {"params": [rest]}])
    p.grad = torch.randn_like(p)
    before = [q.detach().clone(), rest.detach().clone()]
    optimizer.step()
    assert torch.equal(q, before[0])
    assert torch.equal(rest, before[1])
    assert q not in optimizer.state
    optimizer.load_state_dict(optimizer.state_dict())
    assert set(optimizer.state) == {p}


def test_closure() -> None:
    p = parameter(4, 4)
    optimizer = SparseGradAdamW([sparse(p, k=2)])

    def closure() -> float:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    before = p.detach().square().sum().item()
    assert optimizer.step(closure) == before  # the loss that the closure returned, of the weights before the step
    assert p.detach().square().sum().item() < before
    assert optimizer.touched(p) == 2


def test_clipping_and_grad_scaler() -> None:
    """Gradients are dense, so clipping sees them. A step with an overflow is skipped and changes nothing."""
    model, optimizer, _ = setup()
    model = nn.Sequential(*list(model)[:5], model[6])  # without the literal layer: clipping refuses COO gradients
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(16, 8)
    scaler.scale(model(x).square().mean()).backward()
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert 1e-3 < float(norm) < math.inf
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    optimizer.zero_grad()
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    scaler.scale(model(x).square().mean()).backward()
    model[0].S.grad[0, 0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(state[key]["exp_avg"], after[key]["exp_avg"]) for key in state)


def test_schedulers_see_one_optimizer() -> None:
    model, optimizer, _ = setup()
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[0.1, 0.2, 0.3, 0.4], total_steps=4, cycle_momentum=False
    )
    for _ in range(3):
        model(torch.randn(16, 8)).square().mean().backward()
        optimizer.step()
        schedule.step()
    assert schedule.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_learning_rate_as_a_tensor() -> None:
    """Some schedulers and compiled training keep the learning rate in a tensor."""
    p, q = parameter(5, 5), parameter(5, 5)
    q.data.copy_(p.data)
    for value, lr in ((p, 0.01), (q, torch.tensor(0.01, dtype=F64))):
        torch.manual_seed(3)
        optimizer = SparseGradAdamW([sparse(value, k=4, lr=lr)])
        value.grad = torch.randn_like(value)
        optimizer.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        (
            {"sparse": True, "k": 26},
            ValueError,
            r"group 0, parameter of shape \(5, 5\): k must be between 1 and the 25 ",
        ),
        ({"sparse": True, "k": 0}, ValueError, "k must be between 1 and the 25 entries there are, found 0"),
        ({"sparse": True, "density": 0}, ValueError, "density must be above 0 and at most 1 .* found 0"),
        ({"sparse": True, "density": 2}, ValueError, "density must be above 0 and at most 1 .* found 2"),
        ({"sparse": True, "density": 0.1, "k": 3}, ValueError, "exactly one of k .* found k=3 and density=0.1"),
        ({"sparse": True, "k": 2.5}, TypeError, "k is a count and must be an int, found 2.5"),
        ({"sparse": 1}, TypeError, "group 0: sparse is a flag, True or False, found 1"),
        ({"density": 0.1}, ValueError, 'group 0: k and density need "sparse": True, found k=None, density=0.1'),
        ({"lr": -1.0}, ValueError, "group 0: lr must be at least 0 and finite, found -1.0"),
        ({"eps": -1.0}, ValueError, "group 0: eps must be at least 0 and finite, found -1.0"),
        ({"weight_decay": -0.1}, ValueError, "group 0: weight_decay must be at least 0 and finite, found -0.1"),
        ({"betas": (1.0, 0.9)}, ValueError, r"group 0: betas must lie in \[0, 1\), found \(1.0, 0.9\)"),
    ],
)
def test_bad_groups(group: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SparseGradAdamW([{"params": [parameter(5, 5)], **group}])


def test_bad_parameters() -> None:
    p, basis = parameter(5, 5), Basis(orthogonal(5), orthogonal(5))
    with pytest.raises(ValueError, match='a parameter with a basis needs "sparse": True'):
        SparseGradAdamW([p], bases={p: basis})
    q = parameter(4, 5)
    with pytest.raises(
        ValueError, match=r"basis is for layers with \(out, in\) = \(5, 5\), found a layer with \(4, 5\)"
    ):
        SparseGradAdamW([sparse(q, k=1)], bases={q: basis})
    with pytest.raises(ValueError, match=r"must be a matrix or a vector, found shape \(2, 2, 2\)"):
        SparseGradAdamW([sparse(parameter(2, 2, 2), k=1)])
    optimizer = SparseGradAdamW([sparse(p)])
    p.grad = torch.randn_like(p)
    with pytest.raises(ValueError, match='"sparse" group needs k or density for a dense gradient, found neither'):
        optimizer.step()
    dense = SparseGradAdamW([p])
    p.grad = topk_magnitude(p.detach(), 3)
    with pytest.raises(ValueError, match='a COO gradient needs a group with "sparse": True'):
        dense.step()
    folded = SparseGradAdamW([sparse(p, k=3)], bases={p: basis})
    with pytest.raises(ValueError, match="selected from its dense gradient, found a COO gradient"):
        folded.step()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_refused_moves_nothing(bad: float) -> None:
    """Not even the parameters before the one whose gradient is not finite."""
    basis = Basis(orthogonal(5), orthogonal(5))
    first, plain, last = parameter(4, 5), parameter(3, 3), parameter(5, 5)
    groups = [sparse(first, k=3), {"params": [plain]}, sparse(last, k=3)]
    optimizer = SparseGradAdamW(groups, bases={last: basis})
    before = [p.detach().clone() for p in (first, plain, last)]
    for p in (first, plain, last):
        p.grad = torch.randn_like(p)
    last.grad[2, 3] = bad
    with pytest.raises(ValueError, match=r"group 2: the gradient .* \(5, 5\) holds entries that are NaN or infinite"):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip((first, plain, last), before, strict=True))
    assert not optimizer.state
    last.grad[2, 3] = 0.0
    optimizer.step()
    assert not any(torch.equal(p, was) for p, was in zip((first, plain, last), before, strict=True))


def refused(last: nn.Parameter, gradient: Tensor, words: str, *, options: dict[str, Any], bases: Any = None) -> None:
    """Check that the step raises and changes no parameter of the earlier groups and no state."""
    first, plain = parameter(4, 5), parameter(3, 3)
    optimizer = SparseGradAdamW([sparse(first, k=3), {"params": [plain]}, {"params": [last], **options}], bases=bases)
    before = [p.detach().clone() for p in (first, plain, last)]
    first.grad, plain.grad, last.grad = torch.randn_like(first), torch.randn_like(plain), gradient
    with pytest.raises(ValueError, match=words):
        optimizer.step()
    assert all(torch.equal(p, was) for p, was in zip((first, plain, last), before, strict=True))
    assert not optimizer.state


def test_a_gradient_that_overflows_in_the_basis_moves_nothing() -> None:
    """Every entry is finite in float32, but sums along a direction of the basis are not."""
    last = parameter(2, 2, dtype=torch.float32)
    basis = Basis(torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / math.sqrt(2), None)
    gradient = torch.full((2, 2), 3e38)
    refused(last, gradient, "group 2: .*NaN or infinite", options={"sparse": True, "k": 1}, bases={last: basis})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_coo_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    values = torch.tensor([1.0, bad], dtype=F64)
    gradient = torch.sparse_coo_tensor([[0, 1], [1, 1]], values, (2, 2), check_invariants=True)
    refused(parameter(2, 2), gradient, "group 2: .*NaN or infinite", options={"sparse": True})


def test_sparse_gradients_of_other_layouts_move_nothing() -> None:
    """Whole rows, as from an embedding; a vector; and COO in a group that does not select."""
    embedding = nn.Embedding(5, 3, sparse=True, dtype=F64)
    embedding(torch.tensor([1, 4])).sum().backward()
    rows = embedding.weight.grad
    assert rows is not None
    words = r"group 2, gradient of shape \(5, 3\): expected a dense gradient, or a COO matrix of single entries"
    refused(parameter(5, 3), rows, words, options={"sparse": True})
    refused(parameter(5), torch.eye(5, dtype=F64)[0].to_sparse(), "COO matrix of single", options={"sparse": True})
    refused(parameter(5, 3), rows, 'needs a group with "sparse": True', options={})


@pytest.mark.parametrize("kind", [{"sparse": True, "k": 3}, {}], ids=["sparse", "dense"])
def test_state_of_another_type(kind: dict[str, Any]) -> None:
    """A float64 run goes on in float32, after a cast of the model or from its saved state, and the other way round."""
    for before, after in ((F64, torch.float32), (torch.float32, F64)):
        module = nn.Linear(4, 5, bias=False, dtype=before)
        optimizer = SparseGradAdamW([{"params": [module.weight], **kind}], lr=0.1)
        gradients = torch.randn(2, 5, 4, dtype=F64)
        module.weight.grad = gradients[0].to(before)
        optimizer.step()
        module.weight.grad = None
        saved = copy.deepcopy(optimizer.state_dict())
        module.to(after)
        other = nn.Parameter(module.weight.detach().clone())
        resumed = SparseGradAdamW([{"params": [other], **kind}], lr=0.1)
        resumed.load_state_dict(copy.deepcopy(saved))
        expected = nn.Parameter(module.weight.detach().to(F64, copy=True))
        in_double = SparseGradAdamW([{"params": [expected], **kind}], lr=0.1)
        in_double.load_state_dict(saved)
        for parameter_, own in ((module.weight, optimizer), (other, resumed), (expected, in_double)):
            parameter_.grad = gradients[1].to(parameter_.dtype)
            own.step()
        torch.testing.assert_close(module.weight.double(), expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other, module.weight, rtol=0, atol=0)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = SparseGradAdamW([sparse(parameter(5, 5), k=3)])
    with pytest.raises(ValueError, match="parameter group 1"):
        optimizer.add_param_group(sparse(parameter(2, 2), k=5))
    assert len(optimizer.param_groups) == 1


def test_copies_and_pickles_are_whole() -> None:
    """Also for parameters with a basis: the basis is found by the parameter, which is copied too."""
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    basis = Basis(torch.linalg.qr(torch.randn(8, 8)).Q, torch.linalg.qr(torch.randn(6, 6)).Q)
    optimizer = SparseGradAdamW(
        [{"params": [linear.weight], "sparse": True, "k": 5}, {"params": [linear.bias]}], bases={linear.weight: basis}
    )

    def step(layer: nn.Linear, own: SparseGradAdamW) -> None:
        own.zero_grad()
        layer(torch.ones(2, 8)).square().sum().backward()
        own.step()

    step(linear, optimizer)
    pair = (linear, optimizer)
    for other, own in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        twin = copy.deepcopy(linear)
        twin_optimizer = SparseGradAdamW(
            [{"params": [twin.weight], "sparse": True, "k": 5}, {"params": [twin.bias]}],
            bases={twin.weight: basis},
        )
        twin_optimizer.load_state_dict(optimizer.state_dict())
        step(other, own)
        step(twin, twin_optimizer)
        torch.testing.assert_close(other.weight, twin.weight, rtol=0, atol=0)


def test_state_of_another_optimizer() -> None:
    linear = nn.Linear(4, 4)
    former = torch.optim.AdamW(linear.parameters())
    linear(torch.ones(2, 4)).sum().backward()
    former.step()
    twin = copy.deepcopy(linear)
    optimizer = SparseGradAdamW(twin.parameters())
    optimizer.load_state_dict(copy.deepcopy(former.state_dict()))  # PyTorch shares the tensors
    for model, its_own in ((linear, former), (twin, optimizer)):
        its_own.zero_grad()
        model(torch.full((2, 4), 2.0)).sum().backward()
        its_own.step()
    torch.testing.assert_close(twin.weight, linear.weight)


def test_a_state_with_another_selection_is_refused() -> None:
    """The saved settings would replace those of this run."""
    weight = nn.Parameter(torch.ones(4, 5))
    saved = SparseGradAdamW([{"params": [weight], "sparse": True, "density": 0.1}], lr=1e-3).state_dict()
    for group, words in (
        ({"sparse": True, "density": 0.2}, r"saved with density=0.1, found density=0.2"),
        ({}, r"saved with density=0.1, found density=None"),
    ):
        other = SparseGradAdamW([{"params": [weight], **group}], lr=1e-3)
        with pytest.raises(ValueError, match=words):
            other.load_state_dict(saved)
        assert other.param_groups[0]["density"] == group.get("density")


def test_half_precision_weights_with_a_basis_are_refused() -> None:
    weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    basis = Basis(torch.eye(4), torch.eye(4))
    with pytest.raises(ValueError, match=r"group 0: a weight in torch.bfloat16 would round its changes away"):
        SparseGradAdamW([sparse(weight, k=1)], bases={weight: basis})


def test_steps_are_counted_under_a_half_precision_default() -> None:
    """bfloat16 counts to 256."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = parameter(2, 2, dtype=torch.float32)
        optimizer = SparseGradAdamW([p])
        for _ in range(300):
            p.grad = torch.ones_like(p)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert float(optimizer.state[p]["step"]) == 300


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_the_state_of_an_adamw_with_other_options_is_refused(option: str) -> None:
    """It would go on as if the option were off; with `maximize` that is the opposite direction."""
    p = parameter(4, 5)
    saved = torch.optim.AdamW([p], **{option: True}).state_dict()
    with pytest.raises(ValueError, match=f"saved with {option}=True, expected False"):
        SparseGradAdamW([p]).load_state_dict(saved)


def test_the_state_of_an_optimizer_that_selects_nothing_is_refused() -> None:
    """It would switch the selection off."""
    p = parameter(4, 5)
    other = torch.optim.AdamW([p])
    p.grad = torch.randn_like(p)
    other.step()
    optimizer = SparseGradAdamW([sparse(p, k=3)])
    with pytest.raises(ValueError, match=r"saved with k=None, found k=3 here"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["sparse"]


def test_the_state_of_a_core_of_another_size_is_refused() -> None:
    large, small = parameter(10, 10), parameter(5, 4)
    saved = SparseGradAdamW([sparse(large, k=50)])
    large.grad = torch.randn_like(large)
    saved.step()
    optimizer = SparseGradAdamW([sparse(small, density=0.5)])
    state = saved.state_dict()
    state["param_groups"][0].update(k=None, density=0.5)
    with pytest.raises(ValueError, match=r"entry \d+ of a parameter of shape \(5, 4\), which has 20"):
        optimizer.load_state_dict(state)
    assert not optimizer.state
