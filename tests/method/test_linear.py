"""SparseGradLinear: the output and gradients of the layer that it replaces, in every setting."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from helpers import F64, orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear, refresh, replace_linears


def a_layer(
    out: int = 11, in_: int = 7, r: int = 5, c: int = 3, *, bias: bool = True, dtype: torch.dtype = F64,
    learnt: bool = True, prefer: str = "memory",
) -> SparseGradLinear:  # fmt: skip
    basis_dtype = F64 if dtype == F64 else torch.float32
    basis = Basis(orthogonal(in_, c, basis_dtype), orthogonal(out, r, basis_dtype))
    layer = SparseGradLinear.from_linear(nn.Linear(in_, out, bias=bias, dtype=dtype), basis, prefer=prefer)
    if learnt:
        with torch.no_grad():
            layer.S.normal_(std=0.3)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3)])
def test_replaces_without_a_trace(dtype: torch.dtype, bias: bool, lead: tuple[int, ...]) -> None:
    """An untrained layer gives the original's output and gradients."""
    linear = nn.Linear(7, 11, bias=bias, dtype=dtype)
    layer = SparseGradLinear.from_linear(linear, Basis(orthogonal(7, 3).float(), orthogonal(11, 5).float()))
    inputs = torch.randn(*lead, 7, dtype=dtype)
    results = []
    for module in (linear, layer):
        x = inputs.clone().requires_grad_()
        y = module(x)
        assert y.shape == (*lead, 11)
        assert y.dtype == dtype
        y.square().sum().backward()
        results.append((y.detach(), x.grad, None if not bias else module.bias.grad.clone()))
        if bias:
            module.bias.grad = None
    for found, expected in zip(results[1], results[0], strict=True):
        if expected is not None:
            tolerance = 1e-6 if dtype in (torch.float32, F64) else 1e-2
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefer", ["memory", "speed"])
@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_gradcheck(tokens: int, complete: bool, packed: bool, prefer: str) -> None:
    """Input, core and bias against finite differences, with few tokens (factors) and many (formed weight)."""
    r, c = (4, 5) if complete else (2, 3)
    layer = a_layer(4, 5, r, c, prefer=prefer)
    if packed:
        layer.fold()
        layer.pack(torch.tensor([0, 2, 5]))
        with torch.no_grad():
            layer.values.normal_()
    x = torch.randn(tokens, 5, dtype=F64, requires_grad=True)

    def function(x: Tensor, core: Tensor, bias: Tensor) -> Tensor:
        name = "values" if packed else "S"
        return torch.func.functional_call(layer, {name: core, "bias": bias}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.core, layer.bias), fast_mode=tokens > 1)


def test_gradcheck_with_a_trained_weight() -> None:
    """Calibration relies on it: a weight that asks for a gradient gets the right one."""
    layer = a_layer(4, 5, 2, 3)
    layer.weight.requires_grad_(True)
    x = torch.randn(6, 5, dtype=F64, requires_grad=True)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(function, (x, layer.weight))


def test_frozen_weight_gets_no_gradient() -> None:
    layer = a_layer()
    layer(torch.randn(3, 7, dtype=F64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.S.grad is not None
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"S", "bias"}


def test_sgd_in_a_complete_basis_is_sgd() -> None:
    """With all entries selected and square bases, gradient descent gives the same weights.

    Adam does not: it scales entry by entry, so it is Adam on `W_tilde` (next test).
    """
    layer, plain = a_layer(6, 5, 6, 5, learnt=False), nn.Linear(5, 6, dtype=F64)
    with torch.no_grad():
        plain.weight.copy_(layer.weight)
        plain.bias.copy_(layer.bias)
    ours, theirs = torch.optim.SGD([layer.S], lr=0.1), torch.optim.SGD([plain.weight], lr=0.1)
    for _ in range(20):
        x, delta = torch.randn(9, 5, dtype=F64), torch.randn(9, 6, dtype=F64)
        for module, optimizer in ((layer, ours), (plain, theirs)):
            module(x).backward(delta)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(layer.to_linear().weight, plain.weight, rtol=1e-11, atol=1e-11)


def test_all_entries_selected_is_sparse_adam_on_w_tilde() -> None:
    """With all entries selected and square bases, the method is torch's SparseAdam on every entry of `W_tilde`."""
    layer = a_layer(6, 5, 6, 5, learnt=False)
    U, V = layer.basis.U, layer.basis.V
    W_tilde = nn.Parameter(V @ layer.weight.detach() @ U.T)
    ours = SparseGradAdamW([{"params": [layer.S], "sparse": True, "density": 1.0}], lr=0.01)
    theirs = torch.optim.SparseAdam([W_tilde], lr=0.01)
    for _ in range(20):
        x, delta = torch.randn(9, 5, dtype=F64), torch.randn(9, 6, dtype=F64)
        layer(x).backward(delta)
        ((x @ U.T) @ W_tilde.T @ V + layer.bias.detach()).backward(delta)
        W_tilde.grad = W_tilde.grad.to_sparse_coo()
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(layer.to_linear().weight, V.T @ W_tilde @ U, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [2, 200])
def test_autocast(weights: torch.dtype, to: torch.dtype, tokens: int) -> None:
    """The layer computes in the type of autocast. Parameters get gradients in their own type."""
    layer = a_layer(48, 32, 12, 8, dtype=weights)
    x = torch.randn(tokens, 32, dtype=weights, requires_grad=True)
    exact = copy.deepcopy(layer).double()
    expected = exact(x.detach().double())
    with torch.autocast("cpu", dtype=to):
        y = layer(x)
        plain = layer.to_linear()(x)
    assert y.dtype == plain.dtype == to
    assert float((y.detach().double() - expected.detach()).norm() / expected.detach().norm()) < 2e-2
    y.float().square().sum().backward()
    expected.square().sum().backward()
    assert layer.S.grad.dtype == torch.float32
    assert layer.bias.grad.dtype == weights
    assert x.grad.dtype == weights
    error = (layer.S.grad.double() - exact.S.grad.double()).norm() / exact.S.grad.double().norm()
    assert float(error) < 5e-2


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_small_update_is_not_swallowed_under_autocast(to: torch.dtype) -> None:
    """An update of a sixteenth of a rounding of `W` is present in the mean. Added to a rounded `W` it would be lost."""
    torch.manual_seed(0)
    weight = 1 + torch.rand(200, 300)
    basis = Basis(orthogonal(300).float(), orthogonal(200).float())
    update = torch.full((200, 300), torch.finfo(to).eps / 16)
    linear = nn.Linear(300, 200, bias=False)
    linear.weight.data = weight
    layer = SparseGradLinear.from_linear(linear, basis)
    layer.S.data = basis.to_basis(update)
    with torch.autocast("cpu", dtype=to):
        found = (
            layer(torch.eye(300).repeat(10, 1)).detach()[:300].T.double()
        )  # enough tokens for `W + Vᵀ S U` to be formed
    drift = float((found - weight.double()).mean() / update.double().mean())
    assert drift == pytest.approx(1, rel=0.2)
    assert torch.equal(weight.to(to) + update.to(to), weight.to(to))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("tokens", [2, 200])
def test_gradient_checkpointing(reentrant: bool, tokens: int) -> None:
    block = nn.Sequential(a_layer(9, 7, 4, 3), nn.GELU(), a_layer(7, 9, 3, 4))
    x = torch.randn(tokens, 7, dtype=F64, requires_grad=True)
    outputs, gradients = [], []
    for run in (block, partial(checkpoint, block, use_reentrant=reentrant)):
        x.grad = None
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    assert torch.equal(outputs[0], outputs[1])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


# torch's tracer makes an instance of autograd.Function for each one that it meets, and warns of it itself (torch 2.13).
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("tokens", [2, 200])
@pytest.mark.parametrize("packed", [True, False])
def test_compiles_without_graph_breaks(tokens: int, packed: bool) -> None:
    torch.compiler.reset()
    layer = a_layer(24, 16, 6, 4, dtype=torch.float32, learnt=not packed)
    if packed:
        layer.pack(torch.tensor([1, 5, 9]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(tokens, 16, requires_grad=True)
    results = []
    for module in (layer, compiled):
        x.grad = layer.core.grad = layer.bias.grad = None
        y = module(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.core.grad, layer.bias.grad))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), results[0][0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_from_conv1d(bias: bool) -> None:
    """GPT-2's layers store their weight as (in, out). The storage is shared here too."""
    conv = Conv1D(11, 7).double()
    if not bias:  # Conv1D's own forward needs one; ours does not
        conv.bias = None
    layer = SparseGradLinear.from_linear(conv, Basis(orthogonal(7, 3), orthogonal(11, 5)))
    assert (layer.out_features, layer.in_features) == (11, 7)
    assert layer.weight.data_ptr() == conv.weight.data_ptr()
    x = torch.randn(2, 3, 7, dtype=F64)
    expected = conv(x).detach() if bias else x @ conv.weight.detach()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    linear = layer.to_linear()
    assert type(linear) is nn.Linear
    torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_to_linear(dtype: torch.dtype) -> None:
    layer = a_layer(48, 32, 12, 8, dtype=dtype)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    linear = layer.eval().to_linear()
    assert type(linear) is nn.Linear
    assert linear.weight.dtype == dtype
    assert linear.weight.requires_grad
    assert not linear.training
    x = torch.randn(5, 32, dtype=dtype)
    tolerance = {torch.float32: 1e-5, F64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(linear(x), layer(x), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(linear.weight - layer.weight, layer.delta_weight().to(dtype), rtol=0.1, atol=tolerance)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def saved(forward: partial[Tensor], parameters: list[Tensor]) -> list[tuple[int, ...]]:
    """Return the shapes that autograd saves for backward, without the layer's own tensors."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    shapes: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    assert output.requires_grad
    return shapes


def test_saves_the_projected_input() -> None:
    """Backward keeps (T, c), not (T, in). This is where the method saves memory."""
    layer = a_layer(48, 32, 12, 8)
    own = [*layer.parameters(), *layer.buffers()]
    for tokens in (3, 200):
        x = torch.randn(tokens, 32, dtype=F64, requires_grad=True)
        assert saved(partial(layer, x), own) == [(tokens, 8)]
    layer.S.requires_grad_(False)
    assert saved(partial(layer, torch.randn(3, 32, dtype=F64)), own) == []
    complete = a_layer(48, 32, 48, 32)
    x = torch.randn(3, 32, dtype=F64)
    kept = saved(partial(complete, x), [*complete.parameters(), *complete.buffers()])
    assert kept == [(3, 32)]  # complete: nothing smaller to keep, and `x` itself needs no copy
    fast = a_layer(48, 320, 12, 200, prefer="speed")
    x = torch.randn(500, 320, dtype=F64, requires_grad=True)
    assert saved(partial(fast, x), [*fast.parameters(), *fast.buffers()]) == [(500, 320), (48, 320)]


def test_holds_nothing_else() -> None:
    """After a step the layer has the attributes that it was made with: no optimizer state, no activations."""
    layer = a_layer()
    before = set(vars(layer))
    x = torch.randn(4, 7, dtype=F64, requires_grad=True)
    layer(x).sum().backward()
    SparseGradAdamW([{"params": [layer.S], "sparse": True, "k": 2}]).step()
    assert set(vars(layer)) == before
    assert set(layer.state_dict()) == {"weight", "bias", "S", "basis.U", "basis.V"}


def test_pack_and_unpack() -> None:
    layer = a_layer(11, 7, 5, 3, learnt=False)
    positions = torch.tensor([14, 2, 7], dtype=torch.int64)
    with torch.no_grad():
        layer.S.view(-1)[positions] = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    x = torch.randn(4, 7, dtype=F64)
    expected, block = layer(x), layer.S.detach().clone()
    layer.pack(positions)
    assert layer.S is None
    assert layer.values.tolist() == [2.0, 3.0, 1.0]
    assert torch.equal(layer(x), expected)
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 3 + 11
    stored = layer.state_dict()
    assert stored["positions"].dtype == torch.int32
    assert set(stored) == {"weight", "bias", "values", "positions", "basis.U", "basis.V"}
    loaded = SparseGradLinear.from_linear(nn.Linear(7, 11, dtype=F64), layer.basis, positions=torch.tensor([0, 1, 2]))
    loaded.load_state_dict(stored)
    assert torch.equal(loaded(x), expected)
    layer.unpack()
    assert torch.equal(layer.S, block)
    assert layer.values is None
    assert layer.positions is None
    assert torch.equal(layer(x), expected)


def test_pack_refuses_to_drop_what_was_learnt_and_fold_keeps_it() -> None:
    layer = a_layer(11, 7, 5, 3)
    x = torch.randn(4, 7, dtype=F64)
    expected, shared = layer(x), layer.weight
    kept = shared.detach().clone()
    with pytest.raises(ValueError, match=r"packing 2 of 15 entries would drop 13 learnt ones.*call fold"):
        layer.pack(torch.tensor([0, 1]))
    layer.fold()
    assert torch.equal(shared, kept)  # a model that shares the storage does not move
    assert not layer.S.any()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    layer.pack(torch.tensor([0, 1]))
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("positions", "error", "words"),
    [
        (torch.tensor([0, 15]), ValueError, "expected positions between 0 and 14, each once; found 2 .* from 0 to 15"),
        (torch.tensor([-1, 3]), ValueError, "from -1 to 3"),
        (torch.tensor([3, 3]), ValueError, r"found 2 \(1 distinct\)"),
        (torch.tensor([], dtype=torch.int64), ValueError, "found 0"),
        (torch.tensor([0.5]), TypeError, "expected positions as a vector of integers, found torch.float32"),
        (torch.tensor([[1]]), TypeError, r"of shape \(1, 1\)"),
        (torch.tensor([True]), TypeError, "found torch.bool"),
    ],
)
def test_positions_are_checked(positions: Tensor, error: type[Exception], words: str) -> None:
    basis = Basis(orthogonal(7, 3), orthogonal(11, 5))
    with pytest.raises(error, match=words):
        SparseGradLinear.from_linear(nn.Linear(7, 11, dtype=F64), basis, positions=positions)


def test_errors() -> None:
    basis = Basis(orthogonal(7, 3), orthogonal(11, 5))
    with pytest.raises(TypeError, match=r"expected a torch.nn.Linear or a Conv1D, found Embedding"):
        SparseGradLinear.from_linear(nn.Embedding(7, 11), basis)
    with pytest.raises(
        ValueError, match=r"basis is for layers with \(out, in\) = \(11, 7\), found a layer with \(7, 11\)"
    ):
        SparseGradLinear.from_linear(nn.Linear(11, 7), basis)
    with pytest.raises(ValueError, match=r'prefer must be "memory" or "speed", found \'disk\''):
        SparseGradLinear.from_linear(nn.Linear(7, 11, dtype=F64), basis, prefer="disk")
    quantized = nn.Linear(7, 11)
    quantized.weight = nn.Parameter(torch.zeros(11, 7, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"expected a floating point weight .out, in., found torch.int8"):
        SparseGradLinear.from_linear(quantized, basis)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
def test_wrong_input_type_is_an_error_as_for_linear(dtype: torch.dtype, bias: bool) -> None:
    """Without a bias the layer computed in the type of the input."""
    layer = a_layer(dtype=torch.float32, bias=bias)
    with pytest.raises(RuntimeError, match=r"have the same dtype, but got: .* != torch.float32"):
        layer(torch.randn(3, 7, dtype=dtype))


def test_copies_and_moves() -> None:
    """deepcopy keeps the sharing of a basis; a cast does not cast the basis; train mode is taken over."""
    linear = nn.Linear(7, 7).eval()
    basis = Basis(orthogonal(7).float(), orthogonal(7).float())
    model = nn.Sequential(SparseGradLinear.from_linear(linear, basis), SparseGradLinear.from_linear(linear, basis))
    assert not model[0].training
    twin = copy.deepcopy(model)
    assert twin[0].basis is twin[1].basis
    assert twin[0].basis is not basis
    twin.to(torch.bfloat16)
    assert twin[0].weight.dtype == torch.bfloat16
    assert twin[0].basis.U.dtype == torch.float32
    assert len({b.data_ptr() for b in twin.buffers()}) == 2
    assert "S=(7, 7)" in repr(model)


def test_one_dimensional_and_empty_inputs() -> None:
    layer = a_layer()
    x = torch.randn(7, dtype=F64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x), rtol=1e-12, atol=1e-12)
    empty = layer(torch.empty(0, 7, dtype=F64))
    assert empty.shape == (0, 11)
    empty.sum().backward()
    assert not layer.S.grad.any()


def test_shared_basis_is_saved_once_and_moves_with_any_layer() -> None:
    """One layer registers the basis, the others refer to it. A state dict holds it once and loads strictly."""
    basis = Basis(orthogonal(7).float(), orthogonal(7).float())
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 7))
    layers = list(replace_linears(model, {"all": ["0", "1", "2"]}, {"all": basis}).values())
    assert [layer.registers_basis for layer in layers] == [True, False, False]
    stored = model.state_dict()
    assert [name for name in stored if "basis" in name] == ["0.basis.U", "0.basis.V"]
    twin = copy.deepcopy(model)
    assert len({id(layer.basis) for layer in twin}) == 1
    assert twin[2].basis is not basis
    assert [layer.registers_basis for layer in twin] == [True, False, False]
    with torch.no_grad():
        twin[1].basis.U.zero_()
    twin.load_state_dict(stored)
    assert torch.equal(twin[1].basis.U, basis.U)
    moved = copy.deepcopy(layers[1]).to("meta")  # alone, and only referring to its basis
    assert moved.basis.U.device.type == "meta"
    assert basis.U.device.type == "cpu"
    twin.to("meta")
    assert all(layer.basis.U.device.type == "meta" for layer in twin)
    other = Basis(orthogonal(7).float(), orthogonal(7).float())
    refresh(layers, other)
    assert [layer.registers_basis for layer in layers] == [True, False, False]
    assert all(layer.basis is other for layer in layers)
    assert torch.equal(model.state_dict()["0.basis.U"], other.U)


@pytest.mark.parametrize("tokens", [2, 300])
def test_narrow_core_on_a_wide_weight(tokens: int) -> None:
    """`core_dtype` may be narrower than the weight's type. Sums are computed in the wider type."""
    basis = Basis(orthogonal(32, 8).float(), orthogonal(48, 12).float())
    layer = SparseGradLinear.from_linear(nn.Linear(32, 48), basis, core_dtype=torch.bfloat16)
    with torch.no_grad():
        layer.S.normal_(std=0.1)
    x = torch.randn(tokens, 32)
    y = layer(x)
    y.sum().backward()
    assert layer.S.grad.dtype == layer.S.dtype == torch.bfloat16
    torch.testing.assert_close(layer.to_linear()(x), y, rtol=2e-2, atol=2e-2)
    layer.fold()
    torch.testing.assert_close(layer(x), y, rtol=2e-2, atol=2e-2)


def test_a_graph_from_before_a_refresh_is_refused() -> None:
    """Its gradient of the input would be computed with the new core."""
    layer = SparseGradLinear.from_linear(nn.Linear(4, 4), Basis(orthogonal(4), orthogonal(4)))
    nn.init.normal_(layer.S)
    x = torch.randn(3, 4, requires_grad=True)
    loss = layer(x).square().sum()
    refresh([layer], Basis(orthogonal(4), orthogonal(4)))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_weight_that_trains_is_not_replaced() -> None:
    """An optimizer would go on with the old tensor."""
    layer = SparseGradLinear.from_linear(nn.Linear(4, 4), Basis(orthogonal(4), orthogonal(4)))
    weight = layer.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"weight trains \(requires_grad\), .*; freeze it"):
        layer.fold()
    with pytest.raises(ValueError, match="weight trains"):
        refresh([layer], Basis(orthogonal(4), orthogonal(4)))
    assert layer.weight is weight


@pytest.mark.parametrize("shape", [(2, 6), (2, 8)])
def test_inputs_of_another_width(shape: tuple[int, int]) -> None:
    layer = SparseGradLinear.from_linear(nn.Linear(4, 4), Basis(orthogonal(4), orthogonal(4)))
    with pytest.raises(ValueError, match=rf"expected inputs with 4 features, found shape \({shape[0]}, {shape[1]}\)"):
        layer(torch.zeros(shape))
