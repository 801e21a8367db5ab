"""Bases from the products of different steps, compared with `reference.pair_grams`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import F64
from sparsegrad_peft import PairStatistics, Trajectory, calibrate, group_linears
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.gradients import stream_gradients
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


def pair_statistics(out: int, in_: int, dtype: torch.dtype = F64) -> PairStatistics:
    """Make empty sums of one layer."""
    grams = torch.zeros(in_, in_, dtype=dtype), torch.zeros(out, out, dtype=dtype)
    return PairStatistics("g", ("a",), *grams, {"a": torch.zeros(out, in_, dtype=dtype)})


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
        grams = reference.pair_grams(gradients, normalize)
        for side, scale, gram, seen in zip(
            (bases[name].U, bases[name].V), (bases[name].scale_in, bases[name].scale_out), grams,
            (gradients, gradients.mT), strict=True,
        ):  # fmt: skip
            assert side is not None
            energies = (side @ gram * side).sum(1)
            spectrum = torch.linalg.eigvalsh(gram).flip(0)
            torch.testing.assert_close(energies, spectrum, rtol=1e-9, atol=1e-12 * float(spectrum[0]))
            rank = int((spectrum > 1e-9 * spectrum[0]).sum())
            expected = reference.scales(reference.common_shares(seen, side[:rank], normalize), 0.5)
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
    for name, basis in found.bases(sizes=sizes, exponent=1.5, dtype=F64).items():
        gradients = stacks(model, groups[name], **options)
        gram_in, gram_out = reference.pair_grams(gradients)
        neurons, gram = (basis.V, gram_out) if name.startswith("up") else (basis.U, gram_in)
        assert neurons is not None
        expected = reference.strongest_features(gram, 4)
        assert torch.equal(torch.eye(9, dtype=F64)[neurons.long()], expected)
        scale, seen = (basis.scale_out, gradients.mT) if name.startswith("up") else (basis.scale_in, gradients)
        assert scale is not None
        shares = reference.common_shares(seen, expected)
        torch.testing.assert_close(scale.double(), reference.scales(shares.clamp_min(1e-6), 1.5), rtol=1e-5, atol=1e-6)


def test_noise_cancels() -> None:
    """One direction is common to all gradients, and each has a stronger one of its own."""
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(12, dtype=F64), dim=0)
    statistics = pair_statistics(8, 12)
    left = torch.nn.functional.normalize(torch.randn(8, dtype=F64), dim=0)
    for _ in range(400):
        statistics.add(torch.outer(left, common) + torch.randn(8, 12, dtype=F64), normalize=True)
    U = statistics.basis(c=1, r=1, dtype=F64).U
    assert U is not None
    assert float((U[0] @ common).abs()) > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("selected", [True, False])
def test_one_gradient_and_empty_steps_are_decomposed_themselves(dtype: torch.dtype, selected: bool) -> None:
    """`MᵀM - GᵀG` is only rounding then."""
    G = torch.randn(5, 7, dtype=dtype)
    statistics = pair_statistics(5, 7, dtype)
    for gradient in (G, torch.zeros_like(G)):
        statistics.add(gradient, normalize=True)
    basis = statistics.basis(c=5, r=2, selected=(selected, False), dtype=dtype)
    assert basis.U is not None
    torch.testing.assert_close(G @ basis.U.T @ basis.U, G)
    if selected:
        assert basis.V is not None
        assert basis.V.tolist() == sorted(G.square().sum(1).topk(2).indices.tolist())
