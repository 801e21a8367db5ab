"""LoRA adapters that start from data: the start itself, the saved adapter, and a resumed run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback, ViTConfig, ViTModel

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.methods.training.lora_start import lora_layers, weights_of
from sparsegrad_lab.run.finished_run import evaluate
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

Arguments = Callable[..., RunArguments]
CONFIGS: dict[str, dict[str, Any]] = {
    "eva": {"eva_config": {"rho": 1.0}},
    "lora_ga": {"lora_ga_config": {"direction": "ArB2r", "scale": "gd_scale"}},
}


class Watch(TrainerCallback):
    """Keeps the weights before the first step, and may interrupt the run."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.first: dict[str, Any] = {}
        self.base: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers = lora_layers(kwargs["model"])
        self.first = {name: weights_of(layer) for name, layer in layers.items()}
        self.base = {name: layer.get_base_layer().weight.detach().clone() for name, layer in layers.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.stop_at:
            raise KeyboardInterrupt


def write_config(folder: Path, start: str) -> str:
    path = folder / f"{start}.json"
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "mlp", "init_lora_weights": start}
    path.write_text(json.dumps({**config, **CONFIGS[start]}), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("start", CONFIGS)
def test_starts_saves_and_resumes(start: str, language_arguments: Arguments, tiny_llama: Path, tmp_path: Path) -> None:
    options = ("--method", write_config(tmp_path, start), "--training.learning_rate", "0.03")
    whole = Watch()
    (result,) = train(language_arguments(tmp_path / "whole", *options), progress=False, callbacks=[whole])
    weights = load_file(tiny_llama / "model.safetensors")
    for name, (A, B) in whole.first.items():
        own = weights[f"{name.removeprefix('base_model.model.')}.weight"]
        torch.testing.assert_close(A @ A.T, torch.eye(2) * (A @ A.T)[0, 0], atol=1e-4, rtol=0)
        assert bool(B.any()) is (start == "lora_ga")
        torch.testing.assert_close(whole.base[name] + 1.5 * B @ A, own)  # the model itself is as it was
    # A plain PEFT reads the saved adapter onto the pretrained model, and finds the run's score.
    assert evaluate(tmp_path / "whole")["validation"]["loss"] == pytest.approx(result["score"], abs=1e-5)

    with pytest.raises(KeyboardInterrupt):
        train(language_arguments(tmp_path / "resumed", *options), progress=False, callbacks=[Watch(stop_at=8)])
    (resumed,) = train(language_arguments(tmp_path / "resumed", *options), progress=False)
    assert resumed["resumed"]
    assert resumed["scores"] == result["scores"]


def test_eva_of_images(tmp_path: Path) -> None:
    """They have no tokens, of which PEFT would leave out the padded ones."""
    config = ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                       patch_size=4, num_channels=1)  # fmt: skip
    ViTModel(config).save_pretrained(tmp_path / "vit")
    words = ["--model", str(tmp_path / "vit"), "--task", "digits", "--method", write_config(tmp_path, "eva")]
    words += ["--train_rows", "16", "--validation_rows", "8", "--epochs", "1", "--batch_size", "8"]
    watch = Watch()
    train(parse([*words, "--output", str(tmp_path / "run")]), progress=False, callbacks=[watch])
    assert len(watch.first) == 2
    for A, B in watch.first.values():
        torch.testing.assert_close(A @ A.T, torch.eye(2) * (A @ A.T)[0, 0], atol=1e-4, rtol=0)
        assert not B.any()
