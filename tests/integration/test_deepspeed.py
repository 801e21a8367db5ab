"""DeepSpeed ZeRO with two real processes: whole cores train as in one process, and `k` is refused by name.

In a loop of our own, and with `SparseGradTrainer`, which also saves and resumes.
"""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from groups_of_processes import free_port, launcher_environment, message_of, run_in_processes
from helpers import orthogonal
from sparsegrad_peft import Basis, SparseGradAdamW, SparseGradLinear, param_groups

pytest.importorskip("deepspeed", reason="the extra deepspeed is not installed: pip install '.[deepspeed]'")

STEPS, ROWS = 5, 8


def build() -> nn.Module:
    torch.manual_seed(0)
    Q = orthogonal(12, dtype=torch.float32)
    layers = [SparseGradLinear.from_linear(nn.Linear(12, 12), Basis(Q[:8], Q[:6])) for _ in range(2)]
    layers[1].pack(torch.arange(0, 48, 3))
    return nn.Sequential(layers[0], nn.GELU(), layers[1])


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(step))


def train(rank: int, stage: int, k: int | None) -> dict[str, Tensor]:
    import deepspeed

    model = build()
    optimizer = SparseGradAdamW(param_groups(model, k=k), lr=0.01)
    settings = {
        "train_batch_size": ROWS, "train_micro_batch_size_per_gpu": ROWS // 2, "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        engine.backward(engine(batch(step)[rank * ROWS // 2 : (rank + 1) * ROWS // 2]).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        return {name: value.detach().clone() for name, value in model.state_dict().items()}


def train_with_trainer(folder: Path, resumed: bool = False, density: float | None = None, **options: Any) -> Any:
    """Train the adapter of a tiny LLaMA, or the second half of it, and save it. Returns the Trainer's log."""
    from trainers import arguments, losses, rows

    from helpers import uncalibrated_adapter
    from sparsegrad_peft import CalibrationConfig, SparseGradTrainer

    args = arguments(folder, save_strategy="steps", save_steps=2, **options)  # before the model, as ZeRO-3 needs it
    trainer = SparseGradTrainer(
        model=uncalibrated_adapter("llama", dropout=0), args=args, train_dataset=rows("llama"), density=density,
        calibration=CalibrationConfig.paper(n_steps=8, gram_dtype=torch.float64),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resumed else None)
    trainer.save_model(str(folder / ("resumed" if resumed else "straight")))
    return losses(trainer)


def with_trainer(folder: Path, stage: int) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # the settings of the stage before
    settings = {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    train = partial(
        train_with_trainer, folder / f"zero{stage}", per_device_train_batch_size=2, ddp_backend="gloo",
        deepspeed=settings, bf16=False,
    )  # fmt: skip
    return {
        "logs": [train(), train(resumed=True)],
        "selection": message_of(partial(train, density=0.2)),
    }


def work(rank: int, folder: Path, port: int) -> dict[int, Any]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ |= launcher_environment(rank, 2, port)
    warnings.simplefilter("ignore")
    import deepspeed.ops

    for name in ("shm_comm", "deepspeed_shm_comm"):  # an extension whose build can hang
        deepspeed.ops.__compatible_ops__[name] = False
    torch.distributed.init_process_group("gloo")
    found: dict[int, Any] = {
        stage: {
            "weights": train(rank, stage, None),
            "k": message_of(partial(train, rank, stage, 7)),
            "trainer": with_trainer(folder, stage),
        }
        for stage in (1, 2, 3)
    }
    torch.distributed.barrier()  # DeepSpeed keeps groups of its own: destroying this one would abort the process
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[int, Any]]:
    return run_in_processes(2, partial(work, port=free_port()), folder)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whole_cores_train_as_in_one_process(results: list[dict[int, Any]], stage: int) -> None:
    model = build()
    optimizer = SparseGradAdamW(param_groups(model), lr=0.01)
    for step in range(STEPS):
        model(batch(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(results[0][stage]["weights"][name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_selection_is_refused(results: list[dict[int, Any]], stage: int) -> None:
    for result in results:
        assert "found parts made by DeepSpeed ZeRO; train the cores whole" in result[stage]["k"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_trainer_calibrates_trains_saves_and_resumes(
    results: list[dict[int, Any]], folder: Path, tmp_path: Path, stage: int
) -> None:
    """The model is whole when the trainer gets it. A model that is loaded in parts is refused (tuner/trainer.py)."""
    expected = train_with_trainer(tmp_path)
    right = adapter_updates(tmp_path / "straight")
    assert all(bool(update.any()) for update in right)
    for result in results:
        for log in result[stage]["trainer"]["logs"]:
            for found, one in zip(log, expected, strict=True):
                assert found == pytest.approx(one, rel=1e-4)
        assert "density and k select the largest entries of whole cores" in result[stage]["trainer"]["selection"]
    for name in ("straight", "resumed"):
        for update, one in zip(adapter_updates(folder / f"zero{stage}" / name), right, strict=True):
            # The first steps of Adam turn with the signs of gradients that are zero to rounding.
            assert float((update - one).norm()) < 0.01 * float(one.norm())


def adapter_updates(folder: Path) -> list[Tensor]:
    from peft import PeftModel

    from helpers import tiny_model, tuner_layers

    model = PeftModel.from_pretrained(tiny_model("llama"), folder)
    return [layer.get_delta_weight("default").detach() for layer in tuner_layers(model)]
