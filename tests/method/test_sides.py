"""Sides that select features, and scaled cores, against the reference: values, gradients, products, files."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from helpers import F64, multiply_adds_done, orthogonal
from sparsegrad_peft import (
    Basis,
    LiteralSparseGradLinear,
    Sizes,
    SparseGradAdamW,
    SparseGradLinear,
    calibrate,
    param_groups,
    refresh,
)
from sparsegrad_peft.method import function, reference
from sparsegrad_peft.method.costs import LayerShape, step_cost
from sparsegrad_peft.method.hosvd import strongest_features
from sparsegrad_peft.method.sides import as_matrix, check_selected, put, take

OUT, IN, R, C = 11, 7, 4, 3
KINDS = ["rotated", "selected", "identity"]


def side(kind: str, n: int, k: int) -> Tensor | None:
    if kind == "identity":
        return None
    return orthogonal(n, k) if kind == "rotated" else torch.randperm(n)[:k].sort().values.int()


def make_basis(kind_in: str, kind_out: str, *, scales: bool = True, out: int = OUT, in_: int = IN) -> Basis:
    U, V = side(kind_in, in_, C), side(kind_out, out, R)
    c, r = in_ if U is None else C, out if V is None else R
    scale = {"scale_in": torch.rand(c, dtype=F64) + 0.5, "scale_out": torch.rand(r, dtype=F64) + 0.5} if scales else {}
    return Basis(U, V, in_features=in_, out_features=out, **scale)


def matrices(basis: Basis, out: int = OUT, in_: int = IN) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V, scale_in, scale_out of the reference."""
    U, V = as_matrix(basis.U, in_, F64), as_matrix(basis.V, out, F64)
    ones = [torch.ones(len(side), dtype=F64) for side in (U, V)]
    scale_in = ones[0] if basis.scale_in is None else basis.scale_in
    return U, V, scale_in, ones[1] if basis.scale_out is None else basis.scale_out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_take_and_put_are_products_with_the_matrix(kind: str, shape: tuple[int, ...]) -> None:
    this = side(kind, IN, C)
    matrix = as_matrix(this, IN, F64)
    x, z = torch.randn(*shape, IN, dtype=F64), torch.randn(*shape, len(matrix), dtype=F64)
    torch.testing.assert_close(take(x, this), x @ matrix.T)
    torch.testing.assert_close(put(z, this, IN), z @ matrix)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("formed", [None, True, False])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind_out", KINDS)
@pytest.mark.parametrize("kind_in", KINDS)
def test_a_layer_equals_the_reference(
    kind_in: str, kind_out: str, packed: bool, formed: bool | None, prefer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Output and all gradients, with the update formed or applied by its factors, as block or packed."""
    if formed is not None:
        monkeypatch.setattr(function, "forms_update", lambda *_: formed)
    basis = make_basis(kind_in, kind_out)
    U, V, scale_in, scale_out = matrices(basis)
    linear = nn.Linear(IN, OUT, dtype=F64)
    layer = SparseGradLinear.from_linear(linear, basis, prefer=prefer)
    S = torch.randn(layer.core_shape, dtype=F64)
    positions = torch.arange(S.numel())[::2] if packed else None
    if positions is not None:
        S.view(-1)[1::2] = 0
    with torch.no_grad():
        layer.S.copy_(S)
    if positions is not None:
        layer.pack(positions)
    x = torch.randn(6, IN, dtype=F64, requires_grad=True)
    delta = torch.randn(6, OUT, dtype=F64)
    delta[2] = 0
    y = layer(x)
    y.backward(delta)

    update = reference.scaled_update(S, U, V, scale_in, scale_out)
    torch.testing.assert_close(y, x @ (linear.weight + update).T + linear.bias)
    torch.testing.assert_close(x.grad, delta @ (linear.weight + update))
    expected = scale_out[:, None] * (V @ reference.weight_gradient(x, delta) @ U.T) * scale_in
    found, expected = (layer.values.grad, expected.reshape(-1)[::2]) if packed else (layer.S.grad, expected)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(layer.delta_weight(), update)
    torch.testing.assert_close(layer.to_linear().weight, linear.weight + update)
    torch.testing.assert_close(layer.eval()(x.detach()), y.detach())
    layer.fold()
    torch.testing.assert_close(layer(x), y)


@pytest.mark.parametrize("kind_out", KINDS)
@pytest.mark.parametrize("kind_in", KINDS)
def test_change_of_basis(kind_in: str, kind_out: str) -> None:
    basis = make_basis(kind_in, kind_out)
    U, V, scale_in, scale_out = matrices(basis)
    G, S = torch.randn(OUT, IN, dtype=F64), torch.randn(len(V), len(U), dtype=F64)
    torch.testing.assert_close(basis.to_basis(G), scale_out[:, None] * (V @ G @ U.T) * scale_in)
    torch.testing.assert_close(basis.from_basis(S), reference.scaled_update(S, U, V, scale_in, scale_out))
    torch.testing.assert_close(basis.coordinates(basis.from_basis(S)), S)
    assert basis.core_shape(OUT, IN) == tuple(S.shape)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize(("kind_in", "kind_out"), [("rotated", "selected"), ("selected", "rotated")])
@pytest.mark.parametrize("tokens", [1, 3, 40, 200])
def test_a_selected_side_multiplies_nothing(kind_in: str, kind_out: str, tokens: int, prefer: str) -> None:
    layer = SparseGradLinear.from_linear(nn.Linear(IN, OUT, dtype=F64), make_basis(kind_in, kind_out), prefer=prefer)

    def step() -> None:
        layer(torch.randn(tokens, IN, dtype=F64, requires_grad=True)).sum().backward()

    shape = LayerShape(OUT, IN, R, C, rotates_out=kind_out == "rotated", rotates_in=kind_in == "rotated")
    assert multiply_adds_done(step) == step_cost(shape, tokens, prefer=prefer)


def test_strongest_features() -> None:
    G = torch.randn(5, 8, 6, dtype=F64)
    _, gram_out = reference.grams(G)
    found = strongest_features(gram_out.diagonal(), 3)
    torch.testing.assert_close(as_matrix(found.features, 8, F64), reference.strongest_features(gram_out, 3))
    assert found.features.tolist() == sorted(found.features.tolist())
    assert strongest_features(torch.tensor([4.0, 1.0, 5.0]), "energy:0.9").features.tolist() == [0, 2]
    assert strongest_features(torch.tensor([1.0, 2.0, 2.0]), 1).features.tolist() == [1]  # of equal ones the first
    with pytest.raises(ValueError, match="no gradient reached"):
        strongest_features(torch.zeros(3), 1)


class Block(nn.Module):
    """An MLP block of hidden size 6 and width 10."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, dtype=F64), nn.Linear(10, 6, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def calibrated_block(exponent: float = 0.5) -> tuple[dict[str, Basis], dict[str, Tensor]]:
    """Bases of a block, and the stack of its gradients."""
    block = Block()
    batches = list(torch.randn(4, 5, 6, dtype=F64))
    sizes = Sizes(narrow=2, wide=3, neurons=True)
    gradients: dict[str, list[Tensor]] = {"up": [], "down": []}
    for batch in batches:
        block.zero_grad()
        block(batch).square().mean().backward()
        for name in gradients:
            gradients[name].append(block.get_submodule(name).weight.grad.clone())
    calibration = calibrate(
        block, batches, sizes=sizes, loss_fn=lambda model, x: model(x).square().mean(), n_steps=4,
        gram_dtype=F64, progress=False,
    )  # fmt: skip
    bases = calibration.bases(sizes=sizes, exponent=exponent, dtype=F64)
    return bases, {name: torch.stack(found) for name, found in gradients.items()}


def test_calibration_selects_neurons() -> None:
    """The wide side is the output of `up` and the input of `down`. Single gradients give no scales."""
    bases, gradients = calibrated_block()
    for name, wide in (("up", "V"), ("down", "U")):
        gram_in, gram_out = reference.grams(gradients[name])
        gram_wide, gram_narrow = (gram_out, gram_in) if wide == "V" else (gram_in, gram_out)
        basis = bases[name]
        neurons, directions = (basis.V, basis.U) if wide == "V" else (basis.U, basis.V)
        expected = reference.strongest_features(gram_wide, 3)
        torch.testing.assert_close(as_matrix(neurons, 10, F64), expected)
        _, vectors = torch.linalg.eigh(gram_narrow)
        torch.testing.assert_close((directions @ vectors.flip(1)[:, :2]).abs(), torch.eye(2, dtype=F64))
        assert basis.scale_in.tolist() == [1.0] * len(basis.scale_in)
        assert basis.scale_out.tolist() == [1.0] * len(basis.scale_out)


def test_the_sums_of_a_selected_side_are_its_diagonal() -> None:
    sizes = Sizes(narrow=2, wide=3, neurons=True)
    options = {"loss_fn": lambda model, x: model(x).square().mean(), "n_steps": 2, "progress": False}
    block, batches = Block(), list(torch.randn(2, 5, 6, dtype=F64))
    small, whole = calibrate(block, batches, sizes=sizes, **options), calibrate(block, batches, **options)
    assert small.groups["up"].gram_out.shape == (10,)
    torch.testing.assert_close(small.groups["up"].gram_out, whole.groups["up"].gram_out.diagonal())
    for name in ("U", "V", "scale_in", "scale_out"):  # whole Gram matrices give the same bases
        found, expected = (getattr(s.bases(sizes=sizes, exponent=0.25)["down"], name) for s in (small, whole))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="collected for features, expected directions"):
        small.bases(sizes=Sizes(narrow=2, wide=3))


def test_no_exponent_no_scales() -> None:
    bases, _ = calibrated_block(exponent=0.0)
    assert not any(basis.is_scaled for basis in bases.values())


@pytest.mark.parametrize("kind_out", KINDS)
def test_saved_copied_and_cast(kind_out: str) -> None:
    """Indices stay integers and scales stay as they are when a model is cast; a state dict has both."""
    basis = make_basis("rotated", kind_out)
    half = copy.deepcopy(basis).to(torch.float16)
    for name, value in basis.state_dict().items():
        assert torch.equal(half.state_dict()[name], value), name
    R_, C_ = basis.core_shape(OUT, IN)
    if kind_out != "identity":
        room = Basis.allocate(
            r=R_,
            c=C_,
            out_features=OUT,
            in_features=IN,
            dtype=F64,
            selected=(kind_out == "selected", False),
            scales=True,
        )
        room.load_state_dict(basis.state_dict())
        S = torch.randn(R_, C_, dtype=F64)
        torch.testing.assert_close(room.from_basis(S), basis.from_basis(S), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("indices", "message"),
    [([0, 0], "2 \\(1 distinct\\)"), ([0, 7], "from 0 to 7"), ([-1], "from -1"), ([], "found 0")],
)
def test_bad_indices(indices: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Basis(torch.tensor(indices, dtype=torch.int32), None, in_features=7)
    with pytest.raises(TypeError, match="int32"):
        check_selected(torch.tensor([1]), 7, "U")
    with pytest.raises(ValueError, match="total number"):
        Basis(torch.tensor([1], dtype=torch.int32), None)


@pytest.mark.parametrize("scale", [[1.0], [1.0, 0.0, 1.0], [1.0, float("nan"), 1.0], [1.0, -1.0, 1.0]])
def test_bad_scales(scale: list[float]) -> None:
    with pytest.raises(ValueError, match="scale_in: expected"):
        Basis(orthogonal(IN, C), None, scale_in=torch.tensor(scale))


def test_default_sizes() -> None:
    """1/32 of the hidden side, from 64 to 128 and at most a third; as many neurons as make 1 % of the entries."""
    sizes = Sizes(narrow=None, wide=None, neurons=True)
    assert sizes.counts(1536, 384) == (96, 64)  # MiniLM
    assert sizes.counts(576, 1536) == (64, 136)  # SmolLM2, down
    assert sizes.counts(3072, 768) == (368, 64)  # BERT-base
    assert sizes.counts(8192, 2048) == (2624, 64)  # Llama-3.2-1B
    assert sizes.counts(100, 90) == (2, 32)
    assert sizes.counts(100, 50) == (3, 16)
    assert sizes.counts(11008, 4096) == (3520, 128)  # LLaMA-2-7B
    assert sizes.counts(32, 16) == (1, 5)
    assert Sizes(narrow=None, wide=None, share=0.25, neurons=True).counts(1536, 384) == (1536, 96)
    assert Sizes(narrow=None, wide=10, share=0.25, neurons=True).counts(1536, 384) == (10, 64)
    assert Sizes(narrow="full", wide=None, neurons=True).counts(3072, 768) == (32, 768)
    assert Sizes(narrow=1, wide=None, share=0.5, neurons=True).counts(6, 6) == (6, 1)
    assert Sizes(narrow="energy:0.5", wide=None, neurons=True).counts(1536, 384) == (96, None)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("old_kind", "new_kind"), [("rotated", "selected"), ("selected", "rotated"), ("identity", "selected")]
)
def test_refresh_between_kinds_of_sides(old_kind: str, new_kind: str, sparse: bool) -> None:
    """Into a complete basis, where all of the update and of the moments fits."""

    def complete(kind: str, n: int) -> Tensor | None:
        return side(kind, n, n)

    def basis_of(kind: str) -> Basis:
        return Basis(
            complete(kind, IN), complete(kind, OUT), in_features=IN, out_features=OUT,
            scale_in=torch.rand(IN, dtype=F64) + 0.5, scale_out=torch.rand(OUT, dtype=F64) + 0.5,
        )  # fmt: skip

    old, new = basis_of(old_kind), basis_of(new_kind)
    layer = SparseGradLinear.from_linear(nn.Linear(IN, OUT, dtype=F64), old)
    groups = param_groups(layer, density=1.0 if sparse else None)
    optimizer = SparseGradAdamW(groups, lr=0.1)
    x = torch.randn(5, IN, dtype=F64)
    layer(x).square().sum().backward()
    optimizer.step()
    gradient = layer.S.grad.clone()  # one step: the first moment is a tenth of it
    before = layer(x)
    refresh([layer], new, optimizer)
    torch.testing.assert_close(layer(x), before)
    U, V, scale_in, scale_out = matrices(old)
    plain = V.T @ (gradient / scale_out[:, None] / scale_in) @ U
    expected = new.to_basis(plain) * 0.1
    found = optimizer.state[layer.S]["exp_avg"]
    torch.testing.assert_close(found.reshape(expected.shape), expected, atol=1e-6, rtol=1e-6)


def test_forms_that_need_the_papers_basis_refuse_others() -> None:
    weight = nn.Parameter(torch.zeros(OUT, IN, dtype=F64))
    for basis in (make_basis("rotated", "rotated"), make_basis("rotated", "selected", scales=False)):
        with pytest.raises(ValueError, match="basis of directions without scales"):
            SparseGradAdamW([{"params": [weight], "sparse": True, "k": 1}], bases={weight: basis})
    scaled = Basis(orthogonal(IN, IN), orthogonal(OUT, OUT), scale_in=torch.ones(IN))
    with pytest.raises(ValueError, match="needs a complete basis"):
        LiteralSparseGradLinear.from_linear(nn.Linear(IN, OUT, dtype=F64), scaled, k=1)
