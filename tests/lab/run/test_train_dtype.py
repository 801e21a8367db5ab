"""Runs on a base in bfloat16: what trains is float32, and what is saved gives the same scores again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run import train as run_train
from sparsegrad_lab.run.finished_run import evaluate, merge, open_run, predict
from sparsegrad_lab.run.inputs import Inputs, load_inputs
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train


@pytest.mark.parametrize("method", ["sparsegrad", "lora"])
@pytest.mark.parametrize("kind", ["text", "language"])
def test_trained_evaluated_and_merged(
    method: str, kind: str, words: Callable[..., list[str]], language_words: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen: list[Inputs] = []

    def load(arguments: RunArguments) -> Inputs:
        seen.append(load_inputs(arguments))
        return seen[-1]

    monkeypatch.setattr(run_train, "load_inputs", load)
    asked = words if kind == "text" else language_words
    more = ["--dtype", "bfloat16", "--precision", "bf16", "--method", method]
    arguments = parse([*asked(tmp_path / "run")[1:], *more])
    [result] = train(arguments, progress=False)

    types = {(p.requires_grad, p.dtype) for p in seen[0].adapted.model.parameters()}
    assert types == {(True, torch.float32), (False, torch.bfloat16)}
    assert "| type of the base model's weights | bfloat16" in (tmp_path / "run" / "adapter" / "README.md").read_text()
    scores = evaluate(tmp_path / "run")
    assert all(scores[split][result["metric"]] == result["scores"][split][result["metric"]] for split in scores)
    assert predict(tmp_path / "run", texts=["the warm film"])[0]["prediction"]
    opened = open_run(tmp_path / "run").model
    assert {p.dtype for name, p in opened.named_parameters() if "base_layer.weight" in name} == {torch.bfloat16}
    merged, _ = merge(tmp_path / "run")
    if kind == "language":
        assert AutoModelForCausalLM.from_pretrained(merged).dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"method": "full"}, "method full trains the model's own weights, in float32; leave dtype out"),
        ({"rest": "train"}, "rest: train updates the weights, in float32; use rest: freeze"),
        ({"training": {"precision": "fp32"}}, "bfloat16 needs training.precision bf16; found fp32"),
    ],
)
def test_what_needs_float32_weights(changed: dict[str, Any], reason: str) -> None:
    words = [f"--{name}={value}" for name, value in changed.items() if name != "training"]
    precision = changed.get("training", {"precision": "bf16"})["precision"]
    arguments = parse(["--dtype", "bfloat16", "--precision", precision, *words])
    [problem] = arguments.problems()
    assert problem.startswith(f"dtype: {reason}")
