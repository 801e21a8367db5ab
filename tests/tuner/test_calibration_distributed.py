"""Adapters under FSDP2 and DDP, with two real processes: the adapter that one process gives."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from groups_of_processes import in_group, message_of, run_in_processes
from helpers import F64, tiny_batch, tiny_model, tuner_layers
from sparsegrad_peft import (
    CalibrationConfig,
    SparseGradAdamW,
    SparseGradConfig,
    Trajectory,
    calibrate_adapter,
    exclude_bases_from_ddp,
    param_groups,
)
from sparsegrad_peft.method import processes
from sparsegrad_peft.method.processes import gathered

ROWS, STEPS = 8, 3
CALIBRATION = CalibrationConfig.paper(n_steps=3, normalize=True, trajectory=Trajectory(1e-4), gram_dtype=F64)

FORMS = {"directions": {"c": 6, "r": 10}, "neurons": {"narrow": 6, "wide": 10}}
"Directions on both sides; and the default form: neurons on the wide side, and entries with scales."


def adapter(form: str = "directions", **options: Any) -> PeftModel:
    config = SparseGradConfig(**{**FORMS[form], "basis_dtype": "float64", **options})
    return get_peft_model(tiny_model("llama").double(), config, autocast_adapter_dtype=False)


def share(rank: int, n: int, step: int = 0) -> dict[str, Tensor]:
    rows = slice(step * ROWS + rank * ROWS // n, step * ROWS + (rank + 1) * ROWS // n)
    return {name: value[rows] for name, value in tiny_batch("llama", STEPS * ROWS).items()}


def calibrate(model: PeftModel, rank: int, n: int) -> None:
    config = replace(CALIBRATION, mean_gradient=not model.peft_config["default"].sizes.by_side)
    calibrate_adapter(model, [share(rank, n, step) for step in range(STEPS)], config=config, progress=False)


def train(model: nn.Module, rank: int, n: int, k: int | None) -> None:
    optimizer = SparseGradAdamW(param_groups(model, k=k), lr=0.01)
    for _ in range(STEPS):
        model(**share(rank, n)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def fully_sharded(model: PeftModel) -> PeftModel:
    from torch.distributed.fsdp import fully_shard

    for block in model.base_model.model.model.layers:
        fully_shard(block)
    return fully_shard(model)


def updates(model: nn.Module) -> list[Tensor]:
    """The update of each layer, which does not depend on the signs of basis vectors."""
    found = []
    for layer in tuner_layers(model):
        core, basis = layer.core_and_basis("default")
        found.append(basis.from_basis(gathered(core.detach())))
    return found


def trained(rank: int, n: int, form: str, first: str, k: int | None, folder: Path) -> dict[str, Any]:
    """Calibrate before or after `fully_shard`, train, save, and load what was saved."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    model = adapter(form)
    if first == "calibrate":
        calibrate(model, rank, n)
    model = fully_sharded(model)
    assert tuple(tuner_layers(model)[0].sparsegrad_S["default"].to_local().shape) != (10, 6)
    if first == "shard":
        calibrate(model, rank, n)
    train(model, rank, n, k)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        model.save_pretrained(folder / f"{form}-{first}-{k}", state_dict=state)
    return {"updates": updates(model)}


def with_ddp(rank: int, n: int, form: str) -> dict[str, Any]:
    model = adapter(form)
    plain = nn.parallel.DistributedDataParallel(adapter())
    exclude_bases_from_ddp(loaded := adapter())
    calibrate(model, rank, n)
    wrapped = nn.parallel.DistributedDataParallel(model)
    train(wrapped, rank, n, None)
    before = sum(buffer.numel() for buffer in plain.modules_buffers)
    return {
        "updates": updates(model),
        "broadcast": [before, *(sum(b.numel() for b in one.modules_buffers) for one in (
            wrapped, nn.parallel.DistributedDataParallel(loaded)))],
    }  # fmt: skip


def refusals(rank: int, folder: Path) -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def parallel() -> nn.Module:
        model = tiny_model("llama").double()
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        return parallelize_module(model, mesh, {"model.layers.*.mlp.up_proj": ColwiseParallel()})

    def stage() -> nn.Module:
        """One stage of a pipeline: the first process has other blocks than the second one."""
        model = adapter()
        blocks = model.base_model.model.model.layers
        model.base_model.model.model.layers = nn.ModuleDict({str(i + 2 * rank): blocks[i] for i in range(2 - rank)})
        return model

    energy = adapter(c="energy:0.9", r="energy:0.9")
    batch = share(rank, 2)
    if rank == 1:
        del batch["labels"]
    different = adapter()
    torch.manual_seed(rank)
    for layer in tuner_layers(different):
        basis = layer.core_and_basis("default")[1]
        basis.U = basis.U + torch.randn(basis.U.shape, dtype=F64)
    return {
        "tensor parallel": message_of(lambda: get_peft_model(parallel(), SparseGradConfig())),
        "adapter after shard": message_of(lambda: get_peft_model(fully_sharded_base(), SparseGradConfig())),
        "pipeline": message_of(lambda: calibrate(stage(), rank, 2)),
        "energy": message_of(lambda: calibrate(fully_sharded(energy), rank, 2)),
        "no labels": message_of(lambda: calibrate_adapter(adapter(), [batch], n_steps=2, progress=False)),
        "no labels, sharded": message_of(
            lambda: calibrate_adapter(fully_sharded(adapter()), [batch], n_steps=2, progress=False)
        ),
        "bases": message_of(lambda: exclude_bases_from_ddp(different)),
    }


def fully_sharded_base() -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(tiny_model("llama").double())


def group_work(rank: int, folder: Path) -> dict[str, Any]:
    processes.PATIENCE = 30
    return {
        **{
            f"{form}-{first}-{k}": trained(rank, 2, form, first, k, folder)
            for form, first, k in product(FORMS, ("calibrate", "shard"), (None, 7))
        },
        **{f"ddp, {form}": with_ddp(rank, 2, form) for form in FORMS},
        "refusals": refusals(rank, folder),
    }


def work(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = in_group(2, rank, folder, "two", partial(group_work, folder=folder))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return run_in_processes(2, work, folder)


def one_process(form: str, k: int | None) -> list[Tensor]:
    model = adapter(form)
    calibrate(model, 0, 1)
    for layer in tuner_layers(model):
        scale = layer.core_and_basis("default")[1].scale_in
        assert (scale is not None and float(scale.std()) > 0.01) == (form == "neurons")
    train(model, 0, 1, k)
    return updates(model)


@pytest.mark.parametrize("first", ["calibrate", "shard"])
@pytest.mark.parametrize("k", [None, 7])
@pytest.mark.parametrize("form", FORMS)
def test_fsdp2(results: list[dict[str, Any]], folder: Path, form: str, first: str, k: int | None) -> None:
    """Calibrated before or after `fully_shard`, with cores trained whole or by their largest entries."""
    expected, case = one_process(form, k), f"{form}-{first}-{k}"
    loaded = updates(PeftModel.from_pretrained(tiny_model("llama").double(), folder / case))
    assert len(expected) == len(loaded) == 9
    for found in (*(result[case]["updates"] for result in results), loaded):
        for update, right in zip(found, expected, strict=True):
            torch.testing.assert_close(update.double(), right, rtol=1e-6, atol=1e-7 * float(right.abs().max()))


@pytest.mark.parametrize("form", FORMS)
def test_ddp(results: list[dict[str, Any]], form: str) -> None:
    for update, right in zip(results[0][f"ddp, {form}"]["updates"], one_process(form, None), strict=True):
        torch.testing.assert_close(update, right, rtol=1e-6, atol=1e-7 * float(right.abs().max()))


def test_ddp_does_not_broadcast_the_bases(results: list[dict[str, Any]]) -> None:
    numbers = (6 * 16 + 10 * 40) + (6 * 40 + 10 * 16)  # data-free bases: a pair for each shape
    buffers = sum(buffer.numel() for buffer in tiny_model("llama").buffers())
    assert results[0]["ddp, directions"]["broadcast"] == [numbers + buffers, buffers, buffers]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("tensor parallel", "up_proj is already sharded ((Shard(dim=0),)): make the adapter before fully_shard"),
        ("adapter after shard", "is already sharded ((Shard(dim=0),)): make the adapter before fully_shard"),
        ("pipeline", "the processes hold different layers"),
        ("energy", "a sharded core keeps its size"),
        ("no labels", "has no loss; put labels into the batches"),
        ("no labels, sharded", "has no loss; put labels into the batches"),
        ("bases", "the processes start from different weights: 9 of 18 differ"),
    ],
)
def test_refuses(results: list[dict[str, Any]], case: str, words: str) -> None:
    for result in results:
        assert words in result["refusals"][case]
