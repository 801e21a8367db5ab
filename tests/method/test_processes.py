"""Calibration in several processes gives the bases that one process finds on the whole batches."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groups_of_processes import in_group, message_of, run_in_processes
from helpers import F64
from sparsegrad_peft import CalibrationConfig, GramStatistics, calibrate, group_linears
from sparsegrad_peft.method import processes
from sparsegrad_peft.method.calibrate import Calibration
from sparsegrad_peft.method.config import Trajectory, normalized_step, sign_step
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.pairs import PairStatistics
from sparsegrad_peft.method.positions import select_positions

ROWS, STEPS = 8, 5
CONFIGS = {
    "paper": CalibrationConfig.paper(n_steps=STEPS, gram_dtype=F64),
    "signs": CalibrationConfig.paper(
        n_steps=STEPS, gram_dtype=F64, normalize=True, trajectory=Trajectory(1e-2, sign_step)
    ),
    "mean": CalibrationConfig.paper(
        n_steps=STEPS, gram_dtype=F64, normalize=True, mean_gradient=True, trajectory=Trajectory(1e-2, sign_step)
    ),
    "steps": CalibrationConfig.paper(n_steps=STEPS, gram_dtype=F64, trajectory=Trajectory(1e-2, normalized_step)),
}
SIZES: list[dict[str, Any]] = [{}, {"c": "energy:0.9", "r": "energy:0.9"}, {"c": 3, "r": 0.5}]


class Experts(nn.Module):
    """Two experts; the sign of a row's first entry chooses one. The head trains beside them, and one part is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 9)) for _ in range(2))
        self.head = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long()
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            if bool((chosen == number).any()):
                y = y.index_add(0, (chosen == number).nonzero().squeeze(1), expert(x[chosen == number]))
        return self.head(y)


def experts(dtype: torch.dtype = F64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Experts().to(dtype)


def batches(rank: int, n: int, dtype: torch.dtype = F64, *, sorted_rows: bool = True) -> list[Tensor]:
    """A process's share of the same global batches. Sorted, the first process has no row for the second expert."""
    torch.manual_seed(7)
    whole = torch.randn(STEPS, ROWS, 9, dtype=dtype)
    if sorted_rows:
        whole = torch.stack([batch[batch[:, 0].sort().indices] for batch in whole])
    share = ROWS // n
    return list(whole[:, rank * share : (rank + 1) * share])


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def statistics(rank: int, n: int, dtype: torch.dtype, config: CalibrationConfig) -> Calibration:
    model = experts(dtype)
    groups = group_linears(model, r".*experts.*")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = calibrate(model, batches(rank, n, dtype), groups=groups, config=config, loss_fn=loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return found


def described(calibration: Calibration) -> dict[str, Any]:
    return {
        "grams": {name: (*sums_of(group), group.n_gradients) for name, group in calibration.groups.items()},
        "bases": [buffers(calibration, **sizes) for sizes in SIZES],
    }


def sums_of(statistics: Any) -> list[Tensor]:
    assert isinstance(statistics, GramStatistics)
    whole = list(statistics.M.values()) if isinstance(statistics, PairStatistics) else []
    return [statistics.gram_in, statistics.gram_out, *whole]


def buffers(calibration: Calibration, **sizes: Any) -> dict[str, dict[str, Tensor]]:
    return {name: dict(basis.named_buffers()) for name, basis in calibration.bases(**sizes, dtype=F64).items()}


def positions(rank: int, n: int) -> dict[str, Tensor]:
    model = experts()
    groups = group_linears(model, r".*experts.*")
    bases = statistics(rank, n, F64, CONFIGS["paper"]).bases(dtype=F64)
    return select_positions(model, groups, bases, batches(rank, n), k=9, n_steps=STEPS, loss_fn=loss, progress=False)


def disagreeing(rank: int) -> Calibration:
    """Return statistics that differ between the processes, as eigenvectors may between machines.

    For a share of energy one process would keep 47 of 1024 directions and the other 139.
    """
    spectrum = torch.exp(-torch.arange(1024, dtype=F64) / (20 if rank == 0 else 60))
    gram = GramStatistics(
        "g", ("a",), torch.diag(spectrum), torch.diag(torch.tensor([3.0, 2.0 - rank, 0.5], dtype=F64))
    )
    return Calibration({"g": gram})


def refusals(rank: int) -> dict[str, str]:
    """The messages of calibrations that cannot be right. In most of them only rank 1 finds an error."""

    def run(
        model: nn.Module, loss_fn: Callable[..., Tensor] = loss, rows: Iterable[Tensor] | None = None
    ) -> Calibration:
        rows = batches(rank, 2) if rows is None else rows
        groups = group_linears(model, r".*experts.*")
        return calibrate(model, rows, groups=groups, n_steps=2, loss_fn=loss_fn, progress=False)

    def not_finite(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch) * (float("nan") if rank == 1 else 1)

    def detached(model: nn.Module, batch: Tensor) -> Tensor:
        return loss(model, batch).detach() if rank == 1 else loss(model, batch)

    def raises(model: nn.Module, batch: Tensor) -> Tensor:
        return {0: loss(model, batch)}[rank]

    def raises_in_backward(model: nn.Module, batch: Tensor) -> Tensor:
        hidden = model.get_submodule("experts.1")(batch)
        if rank == 1:
            hidden.register_hook(lambda gradient: gradient.view(-1, 5))
        return loss(model, batch) + hidden.square().mean()

    def received(name: str, G: Tensor) -> None:
        if rank == 1 and name == "experts.0.2":  # after the gradients of experts.1
            raise MemoryError("no room for a gradient")

    larger = experts()
    if rank == 1:
        larger.more = nn.Linear(2, 2)
    return {
        "seed": message_of(lambda: run(experts(seed=rank))),
        "layers": message_of(lambda: run(larger)),
        "loss": message_of(lambda: run(experts(), not_finite)),
        "empty": message_of(lambda: run(experts(), rows=batches(rank, 2)[rank * STEPS :])),
        "used up": message_of(lambda: run(experts(), rows=batches(rank, 2) if rank == 0 else iter(batches(1, 2)[:1]))),
        "detached": message_of(lambda: run(experts(), detached)),
        "loss function": message_of(lambda: run(experts(), raises)),
        "backward": message_of(lambda: run(experts(), raises_in_backward)),
        "receiver": message_of(
            lambda: stream_gradients(
                model := experts(), model_targets(model), received, batches(rank, 2), loss_fn=loss, n_steps=2
            )
        ),
    }


def model_targets(model: nn.Module) -> list[str]:
    return [name for names in group_linears(model, r".*experts.*").values() for name in names]


def alone(rank: int) -> str:
    """Calibrate on rank 0 only, while rank 1 does something else for longer than the others have patience."""
    processes.PATIENCE = 0.5
    if rank == 1:
        time.sleep(1.5)
        return ""
    return message_of(lambda: statistics(0, 2, F64, CONFIGS["paper"]))


def group_work(rank: int, n: int) -> dict[str, Any]:
    processes.PATIENCE = 30
    results: dict[str, Any] = {"refusals": refusals(rank)} if n == 2 else {}
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        results |= {name: described(statistics(rank, n, F64, config)) for name, config in CONFIGS.items()}
    results["stderr"] = stderr.getvalue()
    results["float32"] = described(statistics(rank, n, torch.float32, CalibrationConfig.paper(n_steps=STEPS)))
    results["positions"] = positions(rank, n)
    if n == 2:
        results["disagreeing"] = buffers(disagreeing(rank), c="energy:0.9", r="energy:0.9")
    return results


def work(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "2": in_group(2, rank, folder, "two", partial(group_work, n=2)),
        "4": in_group(4, rank, folder, "four", partial(group_work, n=4)),
        "alone": in_group(2, rank, folder, "alone", alone),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_processes(4, work, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", [*CONFIGS, "float32"])
def test_statistics_of_the_whole_batches(results: list[dict[str, Any]], n: int, name: str) -> None:
    """Also along a common walk, and where some processes have no row for an expert."""
    dtype = torch.float32 if name == "float32" else F64
    config = CONFIGS.get(name, CalibrationConfig.paper(n_steps=STEPS))
    expected = described(statistics(0, 1, dtype, config))
    tolerance = 1e-10 if dtype == F64 else 1e-5
    assert list(expected["grams"]) == ["experts.*.0", "experts.*.2"]
    for rank in range(n):
        found = results[rank][str(n)][name]
        for group, (*sums, n_gradients) in expected["grams"].items():
            assert n_gradients == found["grams"][group][-1] == 2 * STEPS
            for value, other in zip(sums, found["grams"][group], strict=False):
                assert float((value - other).norm()) <= tolerance * float(value.norm())


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("name", list(CONFIGS))
@pytest.mark.parametrize("size", range(len(SIZES)))
def test_bases_of_the_whole_batches(results: list[dict[str, Any]], n: int, name: str, size: int) -> None:
    """Equal to the bit on all processes, and to rounding to those of one process."""
    expected = described(statistics(0, 1, F64, CONFIGS[name]))["bases"][size]
    first = results[0][str(n)][name]["bases"][size]
    for group, sides in expected.items():
        assert list(first[group]) == ["U", "V", "spectrum_in", "spectrum_out"]
        for buffer, value in sides.items():
            for rank in range(1, n):
                assert torch.equal(results[rank][str(n)][name]["bases"][size][group][buffer], first[group][buffer])
            # Directions of next to no gradient energy are not determined.
            kept = slice(0, 6) if size == 0 and buffer in "UV" else slice(None)
            torch.testing.assert_close(first[group][buffer][kept], value[kept], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("n", [2, 4])
def test_positions_of_the_whole_batches(results: list[dict[str, Any]], n: int) -> None:
    for layer, chosen in positions(0, 1).items():
        for rank in range(n):
            assert torch.equal(results[rank][str(n)]["positions"][layer], chosen)


def test_bases_agree_where_the_eigenvalues_do_not(results: list[dict[str, Any]]) -> None:
    """Every process gets rank 0's bases and number of rows, also where it would decompose in another way."""
    first, second = (result["2"]["disagreeing"]["g"] for result in results[:2])
    own = [buffers(disagreeing(rank), c="energy:0.9", r="energy:0.9")["g"] for rank in range(2)]
    assert [(len(one["U"]), len(one["V"])) for one in own] == [(47, 2), (139, 3)]
    for buffer, value in own[0].items():
        assert torch.equal(first[buffer], second[buffer])
        torch.testing.assert_close(first[buffer], value, rtol=0, atol=1e-12)


def test_one_progress_bar(results: list[dict[str, Any]]) -> None:
    shown = [result["2"]["stderr"] for result in results[:2]]
    assert "Calibrating" in shown[0]
    assert shown[1] == ""


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("seed", "ValueError: the processes start from different weights: 12 of 12 differ, such as unused.weight"),
        ("layers", "ValueError: the processes hold different layers"),
        ("loss", "ValueError: the loss of step 1 is nan"),
        ("empty", "ValueError: expected batches for 2 steps on each process, found none"),
        ("used up", "ValueError: expected batches for 2 steps on each process, found 1, from an iterator that"),
        ("detached", "ValueError: the loss of step 1 does not depend on any target weight"),
        ("loss function", "{KeyError}1"),
        ("backward", "RuntimeError: "),
        ("receiver", "{MemoryError}no room for a gradient"),
    ],
)
def test_every_process_refuses(results: list[dict[str, Any]], case: str, words: str) -> None:
    """Where one process finds the error, the others raise its message. The group works on: other tests use it later."""
    first, second = (result["2"]["refusals"][case] for result in results[:2])
    assert second.startswith(words.replace("{", "").replace("}", ": "))
    if case in ("seed", "layers"):
        assert first.startswith(words)
    elif "{" in words:  # an error of another type
        assert first == f"RuntimeError: {second} (on rank 1 of 2 processes)"
    else:
        assert first == f"{second} (on rank 1 of 2 processes)"


def test_on_one_process_alone(results: list[dict[str, Any]]) -> None:
    assert results[0]["alone"].startswith(
        "RuntimeError: Calibration runs on every process, and rank 1 of 2 processes did not call it within"
    )
