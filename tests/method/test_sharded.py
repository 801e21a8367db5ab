"""Models under DDP, FSDP2, FSDP1 and in pipeline stages: the same selection, training and bases as on one process.

The groups of 2 and 4 processes are started once for all of them, which takes most of the time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist

from groups_of_processes import in_group, message_of, run_in_processes
from helpers import F64, orthogonal
from sparsegrad_peft import Basis, CalibrationConfig, SparseGradAdamW, SparseGradLinear, calibrate, param_groups
from sparsegrad_peft.method import processes
from sparsegrad_peft.method.config import Trajectory
from sparsegrad_peft.method.selection import topk_positions
from sparsegrad_peft.method.sharded import topk_of_shards

STEPS, K, ROWS = 5, 7, 8


def magnitudes(dtype: torch.dtype) -> dict[str, tuple[Tensor, int]]:
    """Matrices and how many entries to select: with ties across the shards, with zeros, one row, all and one entry."""
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(13, 5, generator=generator, dtype=F64).abs().to(dtype)
    return {
        "normal": (normal, 9),
        "ties": (normal.mul(2).round(), 20),
        "equal": (torch.ones(13, 5, dtype=dtype), 17),
        "zeros": (normal * (normal > 2), 40),
        "one row": (normal[:1].clone(), 2),
        "all": (normal, 65),
        "one": (normal, 1),
        "tiny and huge": (normal * 10 ** torch.linspace(-36, 36, 13, dtype=dtype)[:, None], 30),
    }


def share(matrix: Tensor, rank: int, n: int) -> Tensor:
    """The rows of a process, as `fully_shard` deals them: with 13 rows and 4 processes 4, 4, 4 and 1."""
    chunks = matrix.chunk(n)
    return chunks[rank] if rank < len(chunks) else matrix[:0]


def selected_shards(rank: int, n: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The selected positions in the whole matrix that are in a process's rows."""
    cases = magnitudes(dtype)
    shards = [share(matrix, rank, n).reshape(-1) for matrix, _ in cases.values()]
    chosen = topk_of_shards(shards, [k for _, k in cases.values()], dist.group.WORLD)
    starts = [sum(share(matrix, before, n).numel() for before in range(rank)) for matrix, _ in cases.values()]
    return {name: positions + start for name, positions, start in zip(cases, chosen, starts, strict=True)}


def build() -> nn.Sequential:
    torch.manual_seed(0)
    Q = orthogonal(12)
    basis = Basis(Q[:8], Q[:6])  # cores of six rows: with four processes, the last one has none
    linears = [nn.Linear(12, 12, dtype=F64) for _ in range(2)]
    packed, block = (SparseGradLinear.from_linear(linear, basis) for linear in linears)
    packed.pack(torch.arange(0, 48, 3))
    return nn.Sequential(packed, nn.GELU(), block)


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 12, dtype=F64, generator=torch.Generator().manual_seed(step))


def run(
    model: nn.Module, optimizer: SparseGradAdamW, rows: slice, steps: range = range(STEPS), *, clip: bool = True
) -> None:
    for step in steps:
        model(batch(step)[rows]).square().mean().backward()
        if clip:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.05)
        optimizer.step()
        optimizer.zero_grad()


def rows_of(rank: int, n: int) -> slice:
    return slice(rank * ROWS // n, (rank + 1) * ROWS // n)


def run_unevenly(model: nn.Module, optimizer: SparseGradAdamW, rank: int, n: int) -> None:
    """Train on two micro-batches a step. Of several processes the last one has no rows, the others 8, or 5, 2 and 1."""
    bounds = {1: (0, 8), 2: (0, 8, 8), 4: (0, 5, 7, 8, 8)}[n]
    for step in range(STEPS):
        share = batch(step)[bounds[rank] : bounds[rank + 1]]
        for micro_batch in (share[::2], share[1::2]):
            (model(micro_batch).square().sum() * n / (ROWS * 12)).backward()
        optimizer.step()
        optimizer.zero_grad()


def build_with_plain_weight() -> tuple[nn.Sequential, SparseGradAdamW]:
    """A block, packed values, and a plain weight that is trained in a basis; all by their largest entries."""
    layers = nn.Sequential(*build(), nn.GELU(), nn.Linear(12, 12, dtype=F64))
    weight, Q = layers[4].weight, orthogonal(12)
    plain = {"params": [weight], "sparse": True, "k": K}
    optimizer = SparseGradAdamW([*param_groups(layers[:3], k=K), plain], lr=0.01, bases={weight: Basis(Q, Q)})
    return layers, optimizer


def trained_under_ddp(rank: int) -> dict[str, Any]:
    """Two micro-batches a step. The second process has 2 or no rows in the first one."""
    model, optimizer = build_with_plain_weight()
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(STEPS):
        first, second = batch(step).split([5, 3])
        cut = 3 if step % 2 else 5
        own = [first[:cut], second[:2]] if rank == 0 else [first[cut:], second[2:]]
        for micro_batch, averages in zip(own, (wrapped.no_sync(), nullcontext()), strict=True):  # once a step
            with averages:
                (wrapped(micro_batch).square().sum() * 2 / (ROWS * 12)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"model": model.state_dict(), "touched": touched(model, optimizer)}


def touched(model: nn.Sequential, optimizer: SparseGradAdamW) -> list[int]:
    return [optimizer.touched(parameter) for parameter in (model[0].values, model[2].S, model[4].weight)]


def sharded(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    for layer in model:  # type: ignore[attr-defined]
        if list(layer.parameters()):
            fully_shard(layer)
    return fully_shard(model)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: processes.gathered(value.detach()) for name, value in model.state_dict().items()}


def trained(rank: int, n: int, folder: Path) -> dict[str, Any]:
    """Train with selection, save after three steps, and train on; the last group resumes from the first one's file."""
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model = sharded(build())
    optimizer = SparseGradAdamW(param_groups(model, k=K), lr=0.01)
    if n == 2:
        run(model, optimizer, rows_of(rank, n), range(3))
        weights, state = get_state_dict(model, optimizer)
        save({"model": weights, "optimizer": state}, checkpoint_id=folder / "checkpoint")
    else:
        weights, state = get_state_dict(model, optimizer)
        content = {"model": weights, "optimizer": state}
        load(content, checkpoint_id=folder / "checkpoint")
        set_state_dict(model, optimizer, model_state_dict=content["model"], optim_state_dict=content["optimizer"])
    run(model, optimizer, rows_of(rank, n), range(3, STEPS))
    return {"model": whole_state(model), "rows": [len(p.to_local()) for p in model.parameters() if p.requires_grad]}


def trained_unevenly(rank: int, n: int) -> dict[str, Tensor]:
    model = sharded(build())
    run_unevenly(model, SparseGradAdamW(param_groups(model, k=K), lr=0.01), rank, n)
    return whole_state(model)


def plain(hidden: int = 10) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(12, hidden, dtype=F64), nn.Tanh(), nn.Linear(hidden, 12, dtype=F64))


def calibrated(model: nn.Module, rank: int, n: int) -> dict[str, tuple[Tensor, Tensor]]:
    before = whole_state(model)
    found = calibrate(
        model, [batch(step)[rows_of(rank, n)] for step in range(3)],
        config=CalibrationConfig.paper(n_steps=4, gram_dtype=F64, trajectory=Trajectory(1e-2)),
        loss_fn=lambda model, batch: model(batch).square().mean(), progress=False,
    )  # fmt: skip
    assert all(torch.equal(value, before[name]) for name, value in whole_state(model).items())
    return {name: (gram.gram_in, gram.gram_out) for name, gram in found.groups.items()}


def trained_under_fsdp1(rank: int, n: int, folder: Path) -> dict[str, Tensor]:
    """Train the cores whole. Two processes save after three steps, and four go on; returns the whole weights."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole = StateDictOptions(full_state_dict=True)
    model = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = SparseGradAdamW(param_groups(model), lr=0.01)
    if n == 2:
        run(model, optimizer, rows_of(rank, n), range(3), clip=False)
        content = get_state_dict(model, optimizer, options=whole)
        if rank == 0:
            torch.save(content, folder / "fsdp1.pt")
    else:
        weights, state = torch.load(folder / "fsdp1.pt")
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=whole)
    run(model, optimizer, rows_of(rank, n), range(3, STEPS), clip=False)
    return {name: value.clone() for name, value in get_model_state_dict(model, options=whole).items()}


def with_basis(model: nn.Module) -> SparseGradAdamW:
    """An optimizer that selects from plain weights in the same basis."""
    Q = orthogonal(12)
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return SparseGradAdamW(
        [{"params": weights, "sparse": True, "k": K}], lr=0.01, bases=dict.fromkeys(weights, Basis(Q, Q))
    )


def trained_in_stages(
    rank: int, layers: nn.Sequential, make: Callable[[nn.Module], SparseGradAdamW]
) -> dict[str, Tensor]:
    """Train each layer in a pipeline stage of its own, with two micro-batches; returns the stage's weights."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    part = nn.Sequential(*layers[:2]) if rank == 0 else nn.Sequential(layers[2])
    optimizer = make(part)
    stage = PipelineStage(part, rank, 2, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=lambda y, _: y.square().mean())
    for step in range(STEPS):
        schedule.step(batch(step)) if rank == 0 else schedule.step(target=batch(step))
        optimizer.step()
        optimizer.zero_grad()
    return part.state_dict()


STAGES: dict[str, tuple[Callable[[], nn.Sequential], Callable[[nn.Module], SparseGradAdamW]]] = {
    "whole cores": (build, lambda model: SparseGradAdamW(param_groups(model), lr=0.01)),
    "selection": (build, lambda model: SparseGradAdamW(param_groups(model, k=K), lr=0.01)),
    "plain weights": (lambda: plain(12), with_basis),
}


def refusals(rank: int) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    columns = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(1)]))
    rows = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    fsdp1 = FullyShardedDataParallel(build(), use_orig_params=True, device_id=torch.device("cpu"))
    whole = nn.Parameter(torch.zeros(4, 4))
    partitioned = SparseGradAdamW([{"params": [whole], "sparse": True, "k": 2}])
    partitioned.param_groups[0]["params"] = [torch.zeros(8, requires_grad=True)]  # as DeepSpeed ZeRO does
    partitioned.param_groups[0]["params"][0].grad = torch.ones(8)
    not_finite = nn.Parameter(distribute_tensor(torch.zeros(4, 4), mesh, [Shard(0)]))
    not_finite.grad = distribute_tensor(
        torch.eye(4).mul(float("inf")).nan_to_num(0, posinf=float("inf")), mesh, [Shard(0)]
    )
    return {
        "columns": message_of(lambda: SparseGradAdamW([{"params": [columns], "sparse": True, "k": 2}])),
        "basis": message_of(
            lambda: SparseGradAdamW([{"params": [rows], "sparse": True, "k": 2}], bases={rows: Basis.identity()})
        ),
        "fsdp1": message_of(lambda: SparseGradAdamW(param_groups(fsdp1, k=1))),
        "zero": message_of(partitioned.step),
        "finite": message_of(SparseGradAdamW([{"params": [not_finite], "sparse": True, "k": 2}]).step),
    }


def resumed_in_bfloat16(rank: int) -> list[Tensor]:
    """Cores in bfloat16 after three steps, without and with saving and loading the state after two."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    cores = []
    for resumes in (False, True):
        core = nn.Parameter(distribute_tensor(torch.zeros(4, 4, dtype=torch.bfloat16), mesh, [Shard(0)]))
        optimizer = SparseGradAdamW([{"params": [core], "sparse": True, "density": 0.25}])
        for step in range(3):
            if resumes and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = SparseGradAdamW([{"params": [core], "sparse": True, "density": 0.25}])
                optimizer.load_state_dict(state)
            gradient = torch.randn(4, 4, generator=torch.Generator().manual_seed(step)).bfloat16()
            core.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            optimizer.step()
        cores.append(processes.gathered(core.detach()))
    return cores


def group_work(rank: int, n: int, folder: Path) -> dict[str, Any]:
    processes.PATIENCE = 30
    results: dict[str, Any] = {
        "float32": selected_shards(rank, n, torch.float32),
        "float64": selected_shards(rank, n, F64),
        "trained": trained(rank, n, folder),
        "unevenly": trained_unevenly(rank, n),
        "calibrated": calibrated(sharded(plain()), rank, n),
        "fsdp1": trained_under_fsdp1(rank, n, folder),
    }
    if n == 2:
        results["ddp"] = trained_under_ddp(rank)
        results["stages"] = {name: trained_in_stages(rank, model(), make) for name, (model, make) in STAGES.items()}
        results["refusals"] = refusals(rank)
        results["resumed"] = resumed_in_bfloat16(rank)
    return results


def work(rank: int, folder: Path) -> dict[str, Any]:
    return {
        "2": in_group(2, rank, folder, "two", partial(group_work, n=2, folder=folder)),
        "4": in_group(4, rank, folder, "four", partial(group_work, n=4, folder=folder)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_in_processes(4, work, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", list(magnitudes(F64)))
def test_selects_what_one_process_selects(results: list[dict[str, Any]], n: int, dtype: str, case: str) -> None:
    matrix, k = magnitudes(getattr(torch, dtype))[case]
    found = torch.cat([results[rank][str(n)][dtype][case] for rank in range(n)])
    assert torch.equal(found, topk_positions(matrix.reshape(-1), k))


def test_trains_as_one_process(results: list[dict[str, Any]]) -> None:
    """Two processes train and save; four resume, of which the last has no row of the block."""
    assert [results[rank]["2"]["trained"]["rows"] for rank in range(2)] == [[6, 8, 6, 3]] * 2
    assert [results[rank]["4"]["trained"]["rows"] for rank in range(4)] == [[3, 4, 3, 2]] * 3 + [[3, 4, 3, 0]]
    model = build()
    optimizer = SparseGradAdamW(param_groups(model, k=K), lr=0.01)
    run(model, optimizer, slice(None))
    assert 0 < optimizer.touched(model[2].S) < 48
    for n in (2, 4):
        for name, value in model.state_dict().items():
            torch.testing.assert_close(results[0][str(n)]["trained"]["model"][name], value, rtol=1e-10, atol=1e-12)


def test_ddp(results: list[dict[str, Any]]) -> None:
    """A block, packed values and a plain weight."""
    model, optimizer = build_with_plain_weight()
    run(model, optimizer, slice(None), clip=False)
    first, second = (result["2"]["ddp"] for result in results[:2])
    for name, value in model.state_dict().items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], value, rtol=1e-10, atol=1e-12)
    assert first["touched"] == second["touched"] == touched(model, optimizer)


@pytest.mark.parametrize("n", [2, 4])
def test_micro_batches_of_different_sizes_and_a_process_without_rows(results: list[dict[str, Any]], n: int) -> None:
    model = build()
    run_unevenly(model, SparseGradAdamW(param_groups(model, k=K), lr=0.01), 0, 1)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results[0][str(n)]["unevenly"][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4])
def test_whole_cores_under_fsdp1(results: list[dict[str, Any]], n: int) -> None:
    """Two processes train and save in the middle; four resume."""
    model = build()
    run(model, SparseGradAdamW(param_groups(model), lr=0.01), slice(None), clip=False)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results[0][str(n)]["fsdp1"][name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", list(STAGES))
def test_pipeline_stages(results: list[dict[str, Any]], name: str) -> None:
    """Each core is whole in its stage, so that it selects as in one process."""
    build, make = STAGES[name]
    model = build()
    run(model, make(model), slice(None), clip=False)
    for rank, part in enumerate((nn.Sequential(*model[:2]), nn.Sequential(model[2]))):
        for key, value in part.state_dict().items():
            torch.testing.assert_close(results[rank]["2"]["stages"][name][key], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("n", [2, 4])
def test_calibrates_as_one_process(results: list[dict[str, Any]], n: int) -> None:
    for name, grams in calibrated(plain(), 0, 1).items():
        for rank in range(n):
            for found, expected in zip(results[rank][str(n)]["calibrated"][name], grams, strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (
            "columns",
            "whole or sharded into rows (fully_shard), found placements (Shard(dim=1)",
        ),
        ("basis", "a weight with a basis cannot be sharded"),
        ("fsdp1", "found parts made by FSDP1 (FullyShardedDataParallel)"),
        ("zero", "found parts made by DeepSpeed ZeRO"),
        ("finite", "1 of 1 gradients to select from hold entries that are NaN or infinite"),
    ],
)
def test_refuses(results: list[dict[str, Any]], case: str, words: str) -> None:
    for rank in range(2):
        assert words in results[rank]["2"]["refusals"][case]


def test_moments_of_bfloat16_are_loaded_as_wide_as_saved(results: list[dict[str, Any]]) -> None:
    """They were cast to bfloat16, and the next step failed."""
    for rank in range(2):
        straight, resumed = results[rank]["2"]["resumed"]
        assert torch.equal(straight, resumed)


def test_state_of_a_sharded_parameter_goes_on_in_one_process() -> None:
    """The moments of all entries become those of the entries that were ever selected."""
    models = [build(), build()]
    straight, resumed = (SparseGradAdamW(param_groups(model, k=K), lr=0.01) for model in models)
    run(models[0], straight, slice(None), range(3))
    models[1].load_state_dict(models[0].state_dict())
    saved = copy.deepcopy(straight.state_dict())
    shapes = [p.shape for group in straight.param_groups for p in group["params"]]
    for number, state in saved["state"].items():
        if "positions" not in state:  # of a bias
            continue
        positions = state.pop("positions").long()
        for name in ("exp_avg", "exp_avg_sq"):
            dense = torch.zeros(shapes[number].numel(), dtype=F64)
            dense[positions] = state[name]
            state[name] = dense.view(shapes[number])
        state["step"] = torch.tensor(float(state["step"]))
    resumed.load_state_dict(saved)
    for model, optimizer in zip(models, (straight, resumed), strict=True):
        run(model, optimizer, slice(None), range(3, STEPS))
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], value)
