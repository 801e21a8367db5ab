"""Two processes with `SparseGradTrainer` and with TRL, under DDP and FSDP2: the adapter that one process gives."""

from __future__ import annotations

import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from trainers import arguments, rows, saved
from transformers import Trainer

from groups_of_processes import free_port, launcher_environment, run_in_processes
from helpers import cores, tiny_batch, tiny_model, tuner_layers, uncalibrated_adapter
from sparsegrad_peft import CalibrationConfig, SparseGradTrainer, SparseGradTrainerMixin, calibrate_adapter
from sparsegrad_peft.method.config import Trajectory, normalized_step
from sparsegrad_peft.tuner.trainer import SparseGradCalibration, TrainingDivergedError

CALIBRATION = CalibrationConfig.paper(n_steps=8, trajectory=Trajectory(1e-3, normalized_step), gram_dtype=torch.float64)
"A walk by rounded gradients: signs would differ where a gradient is nearly zero."


def train(folder: str, checkpoint: str | None = None, **options: Any) -> dict[str, Any]:

    model = uncalibrated_adapter(dropout=0)
    trainer = SparseGradTrainer(
        model=model, train_dataset=rows(), calibration=CALIBRATION, density=0.2,
        args=arguments(folder, max_steps=3, warmup_steps=2, save_strategy="steps", save_steps=2, **options),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=checkpoint)
    deltas = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "sparsegrad_S")}
    return {"model": saved(model), "deltas": deltas, "processes": trainer.accelerator.num_processes}


def train_with_new_bases(folder: str, **options: Any) -> dict[str, Any]:

    model = uncalibrated_adapter(dropout=0, c="full", r="full")
    trainer = SparseGradTrainer(
        model=model, args=arguments(folder, max_steps=3, warmup_steps=2, **options), train_dataset=rows(),
        calibration=CalibrationConfig.paper(n_steps=12, trajectory=None), density=0.2, refresh_every=2,
    )  # fmt: skip
    trainer.train()
    state = {
        f"{name}.{part}": value
        for name, parameter in model.named_parameters()
        for part, value in trainer.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    deltas = {n: m.get_delta_weight("default").detach() for n, m in model.named_modules() if hasattr(m, "sparsegrad_S")}
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"model": {**saved(model), **state}, "deltas": deltas, "losses": losses}


def diverges_on_one(folder: str, rank: int) -> str:

    class NotFinite(SparseGradTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Tensor:
            loss: Tensor = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if rank == 1 and self.state.global_step == 1 else loss

    trainer = NotFinite(
        model=uncalibrated_adapter(), args=arguments(folder), train_dataset=rows(), calibration=CALIBRATION
    )
    with pytest.raises(TrainingDivergedError, match="loss of step 2 is nan") as error:
        trainer.train()
    return str(error.value)


def too_late(folder: str) -> str:

    trainer = Trainer(
        model=uncalibrated_adapter(), args=arguments(folder), train_dataset=rows(), callbacks=[SparseGradCalibration()]
    )
    with pytest.raises(ValueError, match="already wrapped for 2 processes") as error:
        trainer.train()
    return str(error.value)


class OnCPUs(SparseGradTrainer):
    """Takes CPUs for devices on which FSDP can shard. accelerate would run DDP there."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            from accelerate import FullyShardedDataParallelPlugin
            from accelerate.state import PartialState
            from accelerate.utils import DistributedType

            state = self.accelerator.state
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


RUNS = ("straight", "resumed", "resumed alone")


def train_llama(folder: Path, rows_at_once: int, name: str = RUNS[0], **options: Any) -> dict[str, Any]:
    """Train with selection and two micro-batches a step, or the second half of it, and save the adapter by `name`."""
    trainer = OnCPUs(
        model=uncalibrated_adapter("llama", dropout=0), train_dataset=rows("llama"), calibration=CALIBRATION,
        density=0.2, args=arguments(
            folder, save_strategy="steps", save_steps=2, per_device_train_batch_size=rows_at_once,
            gradient_accumulation_steps=2, **options,
        ),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if name == RUNS[0] else str(folder / "checkpoint-2"))
    trainer.save_model(str(folder / name))
    return {"log": log(trainer), "sharded": all(hasattr(core, "full_tensor") for core in cores(trainer.model))}


def sft(folder: Path, rows_at_once: int, **options: Any) -> dict[str, Any]:
    """Train with TRL on texts of different lengths. Calibration weighs processes alike, so it comes before."""
    from test_trainer_trl import texts, tokenizer
    from trl import SFTConfig, SFTTrainer

    class SFT(SparseGradTrainerMixin, SFTTrainer):
        pass

    model = uncalibrated_adapter("llama", dropout=0)
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=3, training=False, progress=False)
    args = SFTConfig(
        str(folder), max_steps=4, per_device_train_batch_size=rows_at_once, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_strategy="no", logging_steps=1, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0, max_length=16, gradient_checkpointing=False, **options,
    )  # fmt: skip
    trainer = SFT(model=model, args=args, train_dataset=texts(), processing_class=tokenizer(), density=0.2)
    trainer.train()
    tokens = [entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry]
    return {"deltas": updates(model), "log": log(trainer), "tokens": tokens}


def log(trainer: Any) -> list[tuple[float, float]]:
    return [(e["loss"], float(e["grad_norm"])) for e in trainer.state.log_history if "loss" in e]


def updates(model: torch.nn.Module) -> list[Tensor]:
    return [layer.get_delta_weight("default").detach() for layer in tuner_layers(model)]


def work(rank: int, folder: Path, port: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    os.environ |= launcher_environment(rank, 2, port)
    os.environ["CI"] = "1"  # no telemetry of TRL
    ddp = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    both = {**ddp, "per_device_train_batch_size": 2}
    result = {
        **train(str(folder), **both),
        "refreshed": train_with_new_bases(str(folder), **both),
        "words": [diverges_on_one(str(folder), rank), too_late(str(folder))],
        "sft": sft(folder / "sft", 1, **ddp),
    }
    sharding = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
    result["fsdp2"] = [
        train_llama(folder / "fsdp2", 1, name, fsdp=True, fsdp_config=dict(sharding), **ddp) for name in RUNS[:2]
    ]
    torch.distributed.destroy_process_group()
    if rank == 0:
        result["fsdp2"].append(resumed_alone(folder, port, sharding))
    return result


def resumed_alone(folder: Path, port: int, sharding: dict[str, Any]) -> dict[str, Any]:
    """Resume the run of two processes on one, with the rows of both in each step."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ |= launcher_environment(0, 1, port)
    torch.distributed.init_process_group("gloo")
    result = train_llama(folder / "fsdp2", 2, RUNS[2], fsdp=True, fsdp_config=dict(sharding))
    torch.distributed.destroy_process_group()
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def results(folder: Path) -> list[dict[str, Any]]:
    return run_in_processes(2, partial(work, port=free_port()), folder)


def test_ddp(results: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    first, second = results
    assert first["processes"] == 2
    assert len([name for name in first["model"] if "sparsegrad_basis" in name]) == 12
    assert any(name.endswith("sparsegrad_S.default") and value.any() for name, value in first["model"].items())
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    # The same up to the order of summation, and the signs of the basis vectors.
    resumed = train(str(tmp_path / "resumed"), f"{folder}/checkpoint-2")  # on one process
    for name, value in resumed["deltas"].items():
        torch.testing.assert_close(first["deltas"][name], value, rtol=1e-3, atol=1e-6, msg=name)
    alone = train(str(tmp_path / "alone"))
    for name, value in alone["model"].items():
        if "sparsegrad_basis" in name:
            same = (value.float() @ first["model"][name].float().T).abs()
            torch.testing.assert_close(same, torch.eye(len(value)), rtol=0, atol=1e-2)  # they are kept in bfloat16
        elif "sparsegrad_S" not in name:
            torch.testing.assert_close(first["model"][name], value, msg=name)
    for name, value in alone["deltas"].items():
        assert float((first["deltas"][name] - value).norm()) < 0.01 * float(value.norm()), name
    assert first["words"] == second["words"]


def test_new_bases_under_ddp(results: list[dict[str, Any]], tmp_path: Path) -> None:
    """New bases after step 2: the same on both, to the bit, and what one process finds on all rows."""
    first, second = (result["refreshed"] for result in results)
    assert any(name.endswith("sparsegrad_S.default.positions") for name in first["model"])
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name
    alone = train_with_new_bases(str(tmp_path))
    for name, value in alone["model"].items():
        if "sparsegrad_basis" in name:  # signs aside; the last directions are those of next to no gradient
            assert ((value @ first["model"][name].T).abs().diagonal()[:10] > 0.999).all(), name
    assert first["losses"] == second["losses"] == pytest.approx(alone["losses"], rel=1e-6)
    for name, value in alone["deltas"].items():
        # Second moments turn as the variances of uncorrelated entries, which depends on those directions too.
        assert float((first["deltas"][name] - value).norm()) < 0.2 * float(value.norm()), name


def test_trl_under_ddp(results: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With two micro-batches a step, whose texts have different lengths."""
    monkeypatch.setenv("CI", "1")
    alone = sft(tmp_path, 2)
    first, second = (result["sft"] for result in results)
    for name, value in enumerate(first["deltas"]):
        assert torch.equal(value, second["deltas"][name])
        torch.testing.assert_close(value, alone["deltas"][name], rtol=1e-4, atol=1e-6)
    assert first["tokens"] == second["tokens"] == alone["tokens"]
    for found, expected in zip(first["log"], alone["log"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


def test_fsdp2(results: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """Calibrated, trained with selection and two micro-batches, saved, and resumed on two processes and on one."""
    alone = train_llama(tmp_path, 2)
    assert not alone["sharded"]
    right = updates(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "straight"))
    assert all(bool(update.any()) for update in right)
    for result, name in zip(results[0]["fsdp2"], RUNS, strict=True):
        assert result["sharded"]
        for found, expected in zip(result["log"], alone["log"], strict=True):
            assert found == pytest.approx(expected, rel=1e-4)
        loaded = updates(PeftModel.from_pretrained(tiny_model("llama"), folder / "fsdp2" / name))
        for update, expected in zip(loaded, right, strict=True):
            torch.testing.assert_close(update, expected, rtol=1e-3, atol=1e-6)
