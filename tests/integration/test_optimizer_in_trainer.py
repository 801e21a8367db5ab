"""`accelerate` and `transformers.Trainer` see one ordinary optimizer: accumulation, clipping, schedule, resumption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from sparsegrad_peft import SparseGradAdamW, calibrate, group_linears, param_groups, replace_linears, weight_bases

MLP = r".*layer\.\d+\.(intermediate|output)\.dense"


def rows(n: int = 48) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(n):
        ids = torch.randint(5, 60, (12,), generator=generator)
        found.append(
            {"input_ids": ids, "attention_mask": torch.ones(12, dtype=torch.int64), "labels": (ids[0] > 30).long()}
        )
    return found


def setup(kind: str) -> tuple[nn.Module, SparseGradAdamW]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    groups = group_linears(model, MLP)
    batch = {key: torch.stack([row[key] for row in rows(16)]) for key in rows(1)[0]}
    calibration = calibrate(model, [batch], groups=groups, n_steps=4, progress=False)
    if kind == "plain weights":
        weights = weight_bases(model, groups, calibration.bases())
        rest = [p for p in model.parameters() if not any(p is w for w in weights)]
        sparse = {"params": list(weights), "sparse": True, "density": 0.05}
        return model, SparseGradAdamW([sparse, {"params": rest}], lr=3e-3, bases=weights)
    replace_linears(model, groups, calibration.bases(c=0.5, r=0.5))
    if kind == "packed":
        for module in model.modules():
            if hasattr(module, "pack"):
                module.pack(torch.arange(0, module.S.numel(), 7))
        return model, SparseGradAdamW(param_groups(model), lr=3e-3)
    return model, SparseGradAdamW(param_groups(model, density=0.1), lr=3e-3)


def trainer(kind: str, folder: Path) -> Trainer:
    model, optimizer = setup(kind)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=8, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        max_grad_norm=0.5, learning_rate=3e-3, warmup_steps=2, save_steps=4, save_total_limit=3, logging_steps=2,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    return Trainer(model=model, args=arguments, train_dataset=rows(), optimizers=(optimizer, None))


@pytest.mark.parametrize("kind", ["block", "packed", "plain weights"])
def test_trainer_stopped_and_resumed_equals_never_stopped(kind: str, tmp_path: Path) -> None:
    straight = trainer(kind, tmp_path / "straight")
    straight.train()
    resumed = trainer(kind, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-4"))
    assert resumed.state.global_step == 8
    losses = [log["loss"] for log in straight.state.log_history if "loss" in log]
    assert len(losses) == 4
    assert all("grad_norm" in log for log in straight.state.log_history if "loss" in log)
    for (name, expected), found in zip(
        straight.model.state_dict().items(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(found, expected), name
    rates = [group["lr"] for group in straight.optimizer.param_groups]
    assert rates[0] < 3e-3  # one schedule over all groups


@pytest.mark.parametrize("kind", ["block", "packed", "plain weights"])
def test_accelerate_accumulates_clips_and_steps(kind: str) -> None:
    """Two micro-batches through accelerate are one batch without it."""
    results = []
    for use in (True, False):
        model, optimizer = setup(kind)
        model.eval()
        batches = [{k: torch.stack([row[k] for row in part]) for k in part[0]} for part in (rows()[:8], rows()[8:16])]
        if use:
            accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
            model, wrapped = accelerator.prepare(model, optimizer)
            for batch in batches:
                with accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), 0.1)
                    wrapped.step()
                    wrapped.zero_grad()
            model = accelerator.unwrap_model(model)
        else:
            loss: Any = sum(model(**batch).loss for batch in batches)
            (loss / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        results.append(model.state_dict())
    for (name, expected), found in zip(results[1].items(), results[0].values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)
