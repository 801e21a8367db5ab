"""Two processes with different batches: one sum, and bases equal to the bit."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import F64
from sparsegrad_peft import GramStatistics, calibrate, group_linears
from sparsegrad_peft.method.calibrate import Calibration

SIZES: list[dict[str, Any]] = [
    {},
    {"c": "energy:0.9", "r": "energy:0.9"},
    {"c": 3, "r": 0.5},
    {"dtype": F64},
]
N_STEPS = (2, 3)  # not the same number on both


def build() -> tuple[nn.Module, dict[str, list[str]]]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Dropout(0.1), nn.Linear(12, 9)) for _ in range(2)]
    model = nn.Sequential(*blocks)
    return model, group_linears(model)


def own_calibration(rank: int, dtype: torch.dtype) -> Calibration:
    """Calibrate on one process's batches and dropout, on whichever process this runs."""
    model, groups = build()
    torch.manual_seed(100 + rank)
    batches = [torch.randn(5, 9) for _ in range(N_STEPS[rank])]
    return calibrate(
        model, batches, groups=groups, n_steps=N_STEPS[rank], gram_dtype=dtype,
        loss_fn=lambda model, batch: model(batch).square().mean(),
    )  # fmt: skip


def disagreeing(rank: int) -> Calibration:
    """Return statistics that differ between the processes, as eigenvectors may between machines.

    For a share of energy one process would keep 47 of 1024 directions and the other 139.
    """
    spectrum = torch.exp(-torch.arange(1024, dtype=F64) / (20 if rank == 0 else 60))
    gram = GramStatistics(
        "g", ("a",), torch.diag(spectrum), torch.diag(torch.tensor([3.0, 2.0 - rank, 0.5], dtype=F64))
    )
    return Calibration({"g": gram})


def buffers(calibration: Calibration, **sizes: Any) -> dict[str, dict[str, Tensor]]:
    return {name: dict(basis.named_buffers()) for name, basis in calibration.bases(**sizes).items()}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    results: dict[str, Any] = {}
    for dtype in (torch.float32, F64):
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            calibration = own_calibration(rank, dtype)
        grams = {name: (gram.gram_in, gram.gram_out, gram.n_gradients) for name, gram in calibration.groups.items()}
        results[str(dtype)] = {
            "grams": grams,
            "bases": [buffers(calibration, **sizes) for sizes in SIZES],
            "stderr": stderr.getvalue(),
        }
    results["disagreeing"] = buffers(disagreeing(rank), c="energy:0.9", r="energy:0.9", dtype=F64)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (F64, 1e-12)])
def test_the_sum_of_both(results: list[dict[str, Any]], dtype: torch.dtype, tolerance: float) -> None:
    alone = [own_calibration(rank, dtype).groups for rank in range(2)]
    found = [result[str(dtype)]["grams"] for result in results]
    assert list(found[0]) == list(found[1]) == list(alone[0]) == ["*.0", "*.3"]
    for name, (gram_in, gram_out, n_gradients) in found[0].items():
        assert gram_in.dtype == dtype
        assert n_gradients == found[1][name][2] == 2 * sum(N_STEPS)
        assert torch.equal(gram_in, found[1][name][0])
        assert torch.equal(gram_out, found[1][name][1])
        for gram, own in ((gram_in, "gram_in"), (gram_out, "gram_out")):
            expected = sum(getattr(one[name], own) for one in alone)
            torch.testing.assert_close(gram, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))
            assert not torch.allclose(gram, getattr(alone[0][name], own), rtol=0.01)  # neither's own


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_bases_are_equal_to_the_bit(results: list[dict[str, Any]], dtype: torch.dtype, size: int) -> None:
    """They are the bases of the sum."""
    first, second = (result[str(dtype)]["bases"][size] for result in results)
    for name, (gram_in, gram_out, n_gradients) in results[0][str(dtype)]["grams"].items():
        assert list(first[name]) == ["U", "V", "spectrum_in", "spectrum_out"]
        for buffer, value in first[name].items():
            assert torch.equal(value, second[name][buffer])
        gram = GramStatistics(name, (), gram_in, gram_out, n_gradients)
        expected = Calibration({name: gram}).bases(**SIZES[size])[name]
        for buffer, value in expected.named_buffers():
            torch.testing.assert_close(
                first[name][buffer], value, rtol=1e-4, atol=1e-4 if dtype == torch.float32 else 1e-6
            )


def test_bases_agree_where_the_eigenvalues_do_not(results: list[dict[str, Any]]) -> None:
    """Every process gets rank 0's bases and number of rows, also where it would decompose in another way."""
    first, second = (result["disagreeing"]["g"] for result in results)
    own = [buffers(disagreeing(rank), c="energy:0.9", r="energy:0.9", dtype=F64)["g"] for rank in range(2)]
    assert [(len(one["U"]), len(one["V"])) for one in own] == [(47, 2), (139, 3)]
    for buffer, value in own[0].items():
        assert torch.equal(first[buffer], second[buffer])
        torch.testing.assert_close(first[buffer], value, rtol=0, atol=1e-12)


def test_one_progress_bar(results: list[dict[str, Any]]) -> None:
    shown = [result[str(F64)]["stderr"] for result in results]
    assert "Calibrating" in shown[0]
    assert shown[1] == ""
