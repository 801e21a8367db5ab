"""Bases from the sum of each layer's gradients, compared with `reference.mean_grams`; projections of large layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import F64
from sparsegrad_peft import MeanStatistics, Trajectory, calibrate, group_linears
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.experts import ExpertLayout
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.mean import ProjectedSums, WholeSums, projection_widths, random_vectors
from sparsegrad_peft.method.sizes import Sizes


class Blocks(nn.Module):
    """Blocks with layers of odd shapes, some without a bias."""

    def __init__(self, hidden: int = 5, inner: int = 9, blocks: int = 2) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(hidden, inner) for _ in range(blocks))
        self.down = nn.ModuleList(nn.Linear(inner, hidden, bias=False) for _ in range(blocks))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.tanh(up(x)))
        return x.square().mean()


def call(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def setup(hidden: int = 5, n: int = 4, **kwargs: int) -> tuple[nn.Module, dict[str, Any]]:
    batches = [torch.randn(7, hidden, dtype=F64) for _ in range(n)]
    return Blocks(hidden, **kwargs), {"batches": batches, "loss_fn": call, "n_steps": n}


def stacks(model: nn.Module, names: list[str], **options: Any) -> Tensor:
    """Return the gradients of some layers, (layers, steps, out, in)."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    stream_gradients(model, names, lambda name, G: found[name].append(G.clone()), **options)
    return torch.stack([torch.stack(found[name]) for name in names])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("trajectory", [None, Trajectory(0.02)])
@pytest.mark.parametrize("shared", [True, False])
def test_bases_are_those_of_the_reference(normalize: bool, trajectory: Trajectory | None, shared: bool) -> None:
    model, options = setup()
    groups = group_linears(model, shared=shared)
    calibration = calibrate(
        model, groups=groups, normalize=normalize, trajectory=trajectory, mean_gradient=True, gram_dtype=F64,
        progress=False, **options,
    )  # fmt: skip
    bases = calibration.bases(exponent=0.5, dtype=F64)
    for name, layers in groups.items():
        gradients = stacks(model, layers, trajectory=trajectory, **options)
        grams = reference.mean_grams(gradients, normalize)
        for side, scale, gram in zip(
            (bases[name].U, bases[name].V), (bases[name].scale_in, bases[name].scale_out), grams, strict=True
        ):
            assert side is not None
            energies = (side @ gram * side).sum(1)
            spectrum = torch.linalg.eigvalsh(gram).flip(0)
            torch.testing.assert_close(energies, spectrum, rtol=1e-9, atol=1e-12 * float(spectrum[0]))
            rank = int((spectrum > 1e-9 * spectrum[0]).sum())
            expected = spectrum[:rank] ** 0.25
            torch.testing.assert_close(scale[:rank].double() / scale[0], expected / expected[0], rtol=1e-5, atol=1e-6)
        assert calibration.groups[name].n_gradients == gradients.shape[0] * gradients.shape[1]


@pytest.mark.parametrize("shared", [True, False])
def test_neurons_are_those_of_the_reference(shared: bool) -> None:
    model, options = setup()
    groups = group_linears(model, shared=shared)
    sizes = Sizes(narrow=3, wide=4, neurons=True)
    found = calibrate(
        model, groups=groups, sizes=sizes, mean_gradient=True, gram_dtype=F64, progress=False, **options
    )  # fmt: skip
    for name, basis in found.bases(sizes=sizes, dtype=F64).items():
        gram_in, gram_out = reference.mean_grams(stacks(model, groups[name], **options))
        neurons, gram = (basis.V, gram_out) if name.startswith("up") else (basis.U, gram_in)
        assert neurons is not None
        assert torch.equal(torch.eye(9, dtype=F64)[neurons.long()], reference.strongest_features(gram, 4))


def test_noise_cancels() -> None:
    """One direction is common to all gradients, and each has a stronger one of its own."""
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(12, dtype=F64), dim=0)
    statistics = MeanStatistics("g", ("a",), {"a": WholeSums(torch.zeros(2, 8, 12, dtype=F64))})
    left = torch.nn.functional.normalize(torch.randn(8, dtype=F64), dim=0)
    for _ in range(400):
        statistics.add(torch.outer(left, common) + torch.randn(8, 12, dtype=F64), normalize=True)
    U = statistics.basis(c=1, r=1, dtype=F64).U
    assert U is not None
    assert float((U[0] @ common).abs()) > 0.97


def projected(out: int, in_: int, left: int, right: int, dtype: torch.dtype = F64) -> ProjectedSums:
    like = torch.empty(0, dtype=dtype)
    zeros = torch.zeros(2, left, in_, dtype=dtype), torch.zeros(2, out, right, dtype=dtype)
    return ProjectedSums(*zeros, random_vectors(out, left, like), random_vectors(in_, right, like))


def low_rank(n: int, out: int, in_: int, rank: int) -> Tensor:
    """Make similar gradients (n, out, in) within `rank` directions of either side, of falling strength."""
    strength = torch.logspace(0, -0.5, rank, dtype=F64)
    left, right = (torch.linalg.qr(torch.randn(size, rank, dtype=F64)).Q for size in (out, in_))
    cores = torch.eye(rank, dtype=F64) + 0.02 * torch.randn(n, rank, rank, dtype=F64)
    return (left * strength) @ cores @ (right * strength).T


def test_projections_are_exact_for_a_low_rank() -> None:
    gradients = low_rank(6, 40, 30, 5)
    sums = {"whole": WholeSums(torch.zeros(2, 40, 30, dtype=F64)), "projected": projected(40, 30, 12, 13)}
    bases = {}
    for name, total in sums.items():
        statistics = MeanStatistics("g", ("a",), {"a": total})
        for G in gradients:
            statistics.add(G)
        bases[name] = statistics.basis(c=5, r=5, dtype=F64)
    M = torch.stack([gradients[::2].sum(0), gradients[1::2].sum(0)])
    whole, small = sums["whole"], sums["projected"]
    assert isinstance(whole, WholeSums)
    assert isinstance(small, ProjectedSums)
    torch.testing.assert_close(whole.M, M)
    torch.testing.assert_close(small.left, small.psi.T @ M / 12**0.5)
    torch.testing.assert_close(small.right, M @ small.omega / 13**0.5)
    for side in ("U", "V"):
        one, other = (getattr(bases[name], side) for name in sums)
        torch.testing.assert_close(one.T @ one, other.T @ other, rtol=0, atol=1e-9)  # the same space


@pytest.mark.parametrize(("decay", "held"), [(1.5, 0.75), (6, 0.95)])
def test_nearly_the_best_directions_and_neurons_of_a_long_spectrum(decay: float, held: float) -> None:
    torch.manual_seed(0)
    M = torch.randn(300, 200, dtype=F64) * torch.logspace(0, -decay, 200, dtype=F64)
    M *= torch.logspace(0, -1, 300, dtype=F64)[torch.randperm(300), None]
    total = projected(300, 200, 2 * 20 + 16, 64)
    statistics = MeanStatistics("g", ("a",), {"a": total})
    statistics.add(M)
    basis = statistics.basis(c=20, r=40, selected=(True, False), dtype=F64)
    assert basis.U is not None
    assert basis.V is not None
    best = torch.linalg.svdvals(M)[:20].square().sum()
    assert held < float((M @ basis.U.T).square().sum() / best) <= 1
    energies = M.square().sum(1)
    assert float(energies[basis.V.long()].sum() / energies.topk(40).values.sum()) > 0.97


@pytest.mark.parametrize(
    "make", [lambda o, i: WholeSums(torch.zeros(2, o, i, dtype=F64)), lambda o, i: projected(o, i, 6, 7)]
)
@pytest.mark.parametrize("stacks_out", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_fused_experts_are_one_matrix(make: Any, stacks_out: bool, normalize: bool) -> None:
    layout = ExpertLayout(3, 4, 5, stacks_out, False) if stacks_out else ExpertLayout(3, 5, 4, stacks_out, False)
    whole, fused = make(*layout.shape), make(*layout.shape)
    gradients = torch.randn(3, 3, layout.out, layout.in_, dtype=F64)
    gradients[:, 1] = 0  # an expert without tokens
    for G in gradients:
        MeanStatistics("g", ("a",), {"a": fused}).add(G, normalize=normalize)
        MeanStatistics("g", ("a",), {"a": whole}).add(reference.stacked(G, stacks_out), normalize=normalize)
    for one, other in zip(fused.tensors, whole.tensors, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("selected", [True, False])
def test_halves_that_disagree_everywhere_count_as_one(selected: bool) -> None:
    """No direction and no neuron has a positive product then. The basis is that of the sum of all gradients."""
    G = torch.randn(5, 6, dtype=F64)
    found, expected = (MeanStatistics("g", ("a",), {"a": WholeSums(torch.zeros(2, 5, 6, dtype=F64))}) for _ in range(2))
    found.add(3 * G)
    found.add(-G)
    expected.add(2 * G)
    one, other = (s.basis(c=2, r=3, selected=(selected, False), exponent=0.5, dtype=F64) for s in (found, expected))
    for name, value in one.named_buffers():
        torch.testing.assert_close(value, other.get_buffer(name))


def test_add_leaves_the_gradient_alone_and_a_zero_gradient_adds_nothing() -> None:
    for dtype in (torch.float32, F64):
        total = projected(4, 6, 3, 3)
        statistics = MeanStatistics("g", ("a",), {"a": total})
        G = torch.randn(4, 6, dtype=dtype)
        before = G.clone()
        statistics.add(G, normalize=True)
        sums = [tensor.clone() for tensor in total.tensors]
        statistics.add(torch.zeros_like(G), normalize=True)
        assert torch.equal(G, before)
        assert all(torch.equal(tensor, old) for tensor, old in zip(total.tensors, sums, strict=True))
        assert statistics.n_gradients == 2


@pytest.mark.parametrize(("value", "message"), [(0.0, "no gradient reached"), (float("nan"), "not finite")])
@pytest.mark.parametrize("selected", [True, False])
def test_nothing_to_choose_from(value: float, message: str, selected: bool) -> None:
    for total in (WholeSums(torch.zeros(2, 6, 5)), projected(6, 5, 3, 3)):
        statistics = MeanStatistics("g", ("layer.0",), {"layer.0": total})
        statistics.add(torch.full((6, 5), value))
        with pytest.raises(ValueError, match=rf"group 'g' \(layer\.0\), (input|output) side.*{message}"):
            statistics.basis(c=1, r=1, selected=(selected, False))


@pytest.mark.parametrize(
    ("sizes", "shape", "expected"),
    [
        (Sizes(128, 66, neurons=True), (1536, 576), (264, 32)),
        (Sizes(128, 66, neurons=True), (576, 1536), (32, 264)),
        (Sizes(190, 46), (1536, 576), (388, 100)),
        (Sizes(128, 45, neurons=True), (1536, 384), None),  # a small layer
        (Sizes("energy:0.9", 66, neurons=True), (1536, 576), None),
        (Sizes("full", 66, neurons=True), (1536, 576), None),
        (Sizes(0.33, 0.33), (1536, 576), None),  # saves less than half
        (None, (1536, 576), None),
    ],
)  # fmt: skip
def test_projections_only_where_they_save_half(sizes: Sizes | None, shape: tuple[int, int], expected: Any) -> None:
    assert projection_widths(sizes, *shape) == expected


def test_calibration_of_a_large_layer() -> None:
    """Layers of a size use the same random vectors. The sums are projections of the whole ones."""
    model, options = setup(hidden=520, inner=1040, n=2)
    sizes = Sizes(narrow=40, wide=30, neurons=True)
    groups = group_linears(model, shared=False)
    whole = calibrate(model, groups=groups, mean_gradient=True, progress=False, **options)
    small = calibrate(model, groups=groups, sizes=sizes, mean_gradient=True, progress=False, **options)
    vectors = set()
    for name, layers in groups.items():
        one, other = whole.groups[name], small.groups[name]
        assert isinstance(one, MeanStatistics)
        assert isinstance(other, MeanStatistics)
        M, total = one.sums[layers[0]], other.sums[layers[0]]
        assert isinstance(M, WholeSums)
        assert isinstance(total, ProjectedSums)
        expected = total.psi.T @ M.M / total.left.shape[1] ** 0.5
        torch.testing.assert_close(total.left, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
        vectors |= {id(total.psi), id(total.omega)}
    assert len(vectors) == 2  # (520, 32) and (1040, 88), for the up and the down projections
    found = small.bases(sizes=sizes)
    assert {tuple(len(side) for side in (basis.U, basis.V) if side is not None) for basis in found.values()} == {
        (40, 30), (30, 40),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"group 'up.0'.*input side: 200 rows .*leading 176.*sizes=None"):
        small.bases(sizes=Sizes(narrow=200, wide=30, neurons=True))


def test_under_a_callers_autocast() -> None:
    model, options = setup(hidden=520, inner=1040, n=1, blocks=1)
    options["batches"] = [batch.float() for batch in options["batches"]]
    with torch.autocast("cpu", torch.bfloat16):
        found = calibrate(model.float(), sizes=Sizes(40, 30), mean_gradient=True, progress=False, **options)
        for basis in found.bases(sizes=Sizes(40, 30)).values():
            assert all(bool(side.isfinite().all()) for side in basis.buffers())
    for statistics in found.groups.values():
        assert isinstance(statistics, MeanStatistics)
        assert {t.dtype for total in statistics.sums.values() for t in total.tensors} == {torch.float32}
