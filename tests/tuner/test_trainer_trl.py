"""`trl.SFTTrainer`: with the mixin, with the callback, and making the adapter itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from trainers import CALIBRATION, saved
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from helpers import check_equal, logits, tiny_batch, tiny_model, uncalibrated_adapter
from sparsegrad_peft import SparseGradConfig, calibrate_adapter
from sparsegrad_peft.tuner.trainer import SparseGradCalibration, SparseGradTrainerMixin


@pytest.fixture(autouse=True)
def _no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL's word for it


class SFT(SparseGradTrainerMixin, SFTTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(57))]
    found = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=found, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def texts() -> Dataset:
    return Dataset.from_dict({"text": [" ".join(f"w{(i * j) % 57}" for j in range(1, 5 + i % 7)) for i in range(24)]})


def options(folder: Path, **more: Any) -> dict[str, Any]:
    args = SFTConfig(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, save_steps=2, logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
        seed=0, max_length=16, gradient_checkpointing=False,
    )  # fmt: skip
    return {"args": args, "train_dataset": texts(), "processing_class": tokenizer(), **more}


def log(trainer: SFTTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_mixin_trains_saves_and_resumes(tmp_path: Path) -> None:
    straight = SFT(
        model=uncalibrated_adapter("llama"), calibration=CALIBRATION, density=0.2, **options(tmp_path / "straight")
    )
    straight.train()
    cores = [value for name, value in saved(straight.model).items() if "sparsegrad_S" in name]
    assert len(cores) == 9
    assert all(core.any() for core in cores)
    resumed = SFT(
        model=uncalibrated_adapter("llama"), calibration=CALIBRATION, density=0.2, **options(tmp_path / "resumed")
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    check_equal(saved(resumed.model), saved(straight.model))
    check_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    counted = "num_tokens"  # TRL counts anew when it resumes
    expected = [{name: value for name, value in entry.items() if name != counted} for entry in log(straight)]
    assert [{name: value for name, value in entry.items() if name != counted} for entry in log(resumed)] == expected
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "straight" / "checkpoint-6")
    check_equal(saved(loaded), saved(straight.model))


@pytest.mark.parametrize("training", [True, False])
def test_calibration_is_not_counted(training: bool, tmp_path: Path) -> None:
    """Neither tokens nor losses nor accuracies of its batches are in what TRL logs."""
    config = type(CALIBRATION)(n_steps=8, training=training)
    automatic = SFT(model=uncalibrated_adapter("llama"), calibration=config, **options(tmp_path))
    automatic.train()
    model = uncalibrated_adapter("llama")
    other = SFTTrainer(model=model, **options(tmp_path))
    calibrate_adapter(model, other.get_train_dataloader(), config=config, loss_fn=other.compute_loss, progress=False)
    by_hand = SFT(model=model, **options(tmp_path))
    by_hand.train()
    assert log(automatic) == log(by_hand)
    assert log(automatic)[0]["num_tokens"] > 0
    assert not automatic._metrics["eval"]
    check_equal(saved(automatic.model), saved(model))


@pytest.mark.parametrize("kind", [SFT, SFTTrainer])
def test_the_trainer_makes_the_adapter_itself(kind: type, tmp_path: Path) -> None:
    own = {"calibration": CALIBRATION} if kind is SFT else {"callbacks": [SparseGradCalibration(CALIBRATION)]}
    base = tiny_model("llama").train()
    trainer = kind(model=base, peft_config=SparseGradConfig(c=0.5, r=0.25), **options(tmp_path, **own))
    trainer.train()
    assert trainer.model.peft_config["default"].calibrated
    cores = {name: p for name, p in trainer.model.named_parameters() if "sparsegrad_S" in name}
    assert {tuple(core.shape) for core in cores.values()} == {(10, 8), (4, 16)}
    assert all(bool(core.any()) for core in cores.values())
    assert {n for n, p in trainer.model.named_parameters() if p.requires_grad} == set(cores)
    torch.manual_seed(0)
    check_equal(saved(PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-6")), saved(trainer.model))


class DPO(SparseGradTrainerMixin, DPOTrainer):
    pass


@pytest.mark.filterwarnings("ignore:adapter .* was not calibrated:UserWarning")
@pytest.mark.parametrize("start", ["trained", "new", "data-free"])
def test_the_reference_adapter_of_dpo_is_the_adapter_at_the_start(start: str, tmp_path: Path) -> None:
    """TRL adds a second adapter with the first one's config, and copies parameters by name; rewards start at 0."""
    model = uncalibrated_adapter("llama")
    if start == "trained":
        calibrate_adapter(model, [tiny_batch("llama")], n_steps=2, progress=False)
    if start != "new":
        for name, parameter in model.named_parameters():
            if "sparsegrad_S" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    base = tiny_model("llama").eval()
    row = tiny_batch("llama")
    assert (start == "new") == torch.equal(logits(model.eval(), row), logits(base, row))
    args = DPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=2,
        logging_steps=1, report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, seed=0, max_length=16,
        gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    words = [" ".join(f"w{(i * j) % 57}" for j in range(1, 5)) for i in range(12)]
    data = Dataset.from_dict({"prompt": words, "chosen": words[::-1], "rejected": [f"w{i}" for i in range(12)]})
    kind = DPO if start == "new" else DPOTrainer
    trainer = kind(model=model, args=args, train_dataset=data, processing_class=tokenizer())
    assert "ref" in trainer.model.peft_config
    trainer.train()
    first, second = [entry for entry in trainer.state.log_history if "rewards/margins" in entry][:2]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert abs(second["rewards/margins"]) > 1e-5
    trainer.model.set_adapter("ref")
    expected = base if start == "new" else None
    if expected is not None:
        assert torch.equal(logits(trainer.model.eval(), row), logits(expected, row))
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "checkpoint-2" / "ref").eval()
    assert torch.equal(logits(loaded, row), logits(trainer.model.eval(), row))


class GRPO(SparseGradTrainerMixin, GRPOTrainer):
    pass


def test_grpo_calibrates_with_its_own_loss(tmp_path: Path) -> None:
    """Its loss reads what the Trainer sets when training begins; tokens of calibration are not counted."""
    args = GRPOConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, num_generations=2, learning_rate=1e-2,
        max_completion_length=4, logging_steps=1, save_steps=2, report_to=[], use_cpu=True, bf16=False,
        disable_tqdm=True, seed=0, gradient_checkpointing=False, gradient_accumulation_steps=2,
    )  # fmt: skip
    rewards: dict[str, Any] = {"reward_funcs": lambda completions, **_: [float(len(set(text))) for text in completions]}
    data = Dataset.from_dict({"prompt": [f"w{i} w{i + 1}" for i in range(12)]})
    found = []
    for calibrated in (False, True):
        model = uncalibrated_adapter("llama")
        if calibrated:
            calibrate_adapter(model, [tiny_batch("llama")], n_steps=2, progress=False)
        trainer = GRPO(
            model=model, args=args, train_dataset=data, processing_class=tokenizer(), calibration=CALIBRATION, **rewards
        )
        trainer.train()
        assert trainer.model.peft_config["default"].calibrated
        found.append([entry["num_tokens"] for entry in trainer.state.log_history if "num_tokens" in entry])
        assert found[-1][0] <= 2 * 8 * (2 + 4)
    assert len(found[0]) == len(found[1]) == 2
    cores = [value for name, value in saved(trainer.model).items() if "sparsegrad_S" in name]
    assert any(bool(core.any()) for core in cores)
