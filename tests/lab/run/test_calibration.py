"""Runs on a base in 4 bits: calibrated before it is quantized, evaluated while they train, resumed, and used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from chat_models import save_model
from sparsegrad_lab.chat.model import open_model
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run import calibration, inputs
from sparsegrad_lab.run.finished_run import evaluate, merge, open_run, predict
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

Arguments = Callable[..., RunArguments]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Arguments:
    """Settings of a run on conversations: 6 steps, an evaluation after each third one."""
    folder = tmp_path_factory.mktemp("four-bits")
    save_model(folder / "llama")
    rows = [
        [("user", f"what is {thing}"), ("assistant", f"a {tone} film")]
        for thing in ("warm", "one", "film", "the")
        for tone in ("bright", "dull", "warm")
    ]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in row]}) for row in rows]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def make(output: Path, *more: str) -> RunArguments:
        return parse([
            "--model", str(folder / "llama"), "--task", "text", "--train_file", str(folder / "rows.jsonl"),
            "--validation_file", str(folder / "rows.jsonl"), "--text", "messages", "--n_steps", "3", "--wide", "8",
            "--epochs", "2", "--batch_size", "4", "--lr", "0.03", "--output", str(output), *more,
        ])  # fmt: skip

    return make


@pytest.fixture(scope="module")
def finished(asked: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of SparseGrad on a base in 4 bits. Tests must not change it; copy it first."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(asked(folder, "--load_in_4bit"), progress=False)
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run / "adapter" / "adapter_model.safetensors")
    return found


@pytest.mark.parametrize("method", ["sparsegrad", "lora"])
def test_trained_and_used(method: str, finished: Path, asked: Arguments, tmp_path: Path) -> None:
    """The second epoch trains after an evaluation, which makes bitsandbytes reorder weights on some CPUs."""
    if method == "sparsegrad":
        shutil.copytree(finished, tmp_path / "run")
    else:
        train(asked(tmp_path / "run", "--method", method, "--load_in_4bit"), progress=False)
    result = RunFolder(tmp_path / "run").read_result()
    first, second = (evaluation["loss"] for evaluation in result["evaluations"])
    assert second < first - 0.02
    assert result["config"]["load_in_4bit"]
    assert result["environment"]["packages"]["bitsandbytes"]
    assert (result["calibration"] is None) == (method == "lora")
    assert "| quantization of the base model | 4 bits" in (tmp_path / "run" / "adapter" / "README.md").read_text()

    model: Any = open_run(tmp_path / "run").model
    linears = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert len(linears) == 2 * 7
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert result["trained_entries"]["model"] == model.get_nb_trainable_parameters()[1]
    assert evaluate(tmp_path / "run")["validation"]["loss"] == pytest.approx(result["score"], abs=1e-6)
    assert predict(tmp_path / "run", texts=["what is warm"], max_new_tokens=4)[0]["prediction"]
    chat = open_model(str(tmp_path / "run"))
    assert chat.answer([[{"role": "user", "content": "what is warm"}]], 4)
    assert chat.base() is not None

    # Merged into the weights before they were quantized.
    folder, _ = merge(tmp_path / "run")
    merged = AutoModelForCausalLM.from_pretrained(folder)
    unquantized: Any = open_run(tmp_path / "run", unquantized=True).model
    ids = torch.tensor([[6, 7, 8]])
    torch.testing.assert_close(merged(ids).logits, unquantized(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    if method == "sparsegrad":
        words = ["export", str(tmp_path / "run"), "--rank", "8", "--output", str(tmp_path / "lora")]
        assert main(words) == 0


def test_calibrated_before_it_is_quantized(finished: Path, asked: Arguments, tmp_path: Path) -> None:
    """The bases are those of a run without quantization."""
    train(asked(tmp_path / "run"), progress=False)
    found, plain = weights(finished), weights(tmp_path / "run")
    bases = [name for name in found if "sparsegrad_basis" in name]
    assert bases
    assert all(torch.equal(found[name], plain[name]) for name in bases)
    assert not any(torch.equal(found[name], plain[name]) for name in found if "sparsegrad_S" in name)


def test_the_rest_of_the_base_in_bfloat16(asked: Arguments, tmp_path: Path) -> None:
    """Calibration takes the unquantized weights in bfloat16 too."""
    more = ("--load_in_4bit", "--dtype", "bfloat16", "--precision", "bf16")
    [result] = train(asked(tmp_path / "run", *more), progress=False)
    assert result["calibration"]
    assert result["evaluations"][1]["loss"] < result["evaluations"][0]["loss"]
    model = open_run(tmp_path / "run").model
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert evaluate(tmp_path / "run")["validation"]["loss"] == pytest.approx(result["score"], rel=1e-3)


class InterruptAt(TrainerCallback):
    """Interrupts a run at the start of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_resumed(finished: Path, asked: Arguments, tmp_path: Path) -> None:
    """An interrupted run, resumed, gives the weights and the score of one that was not interrupted."""
    with pytest.raises(KeyboardInterrupt):
        train(asked(tmp_path / "resumed", "--load_in_4bit"), progress=False, callbacks=[InterruptAt(4)])
    [resumed] = train(asked(tmp_path / "resumed", "--load_in_4bit"), progress=False)
    assert resumed["resumed"]
    assert resumed["score"] == RunFolder(finished).read_result()["score"]
    expected = weights(finished)
    assert all(torch.equal(value, expected[name]) for name, value in weights(tmp_path / "resumed").items())


def test_a_classifier(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """The new head stays in float32, and is trained."""
    [result] = train(arguments(tmp_path / "run", "--load_in_4bit"), progress=False)
    run = open_run(tmp_path / "run")
    assert evaluate(tmp_path / "run")["validation"]["accuracy"] == result["score"]
    quantized = [name for name, module in run.model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    assert quantized
    assert not any("classifier" in name or "pooler" in name for name in quantized)


def test_a_new_head_is_the_runs_own(arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration loads the model a second time. With another random head it would see other gradients."""
    heads: list[torch.Tensor] = []
    real = inputs.load_adapted

    def load(*given: Any, **options: Any) -> Any:
        adapted = real(*given, **options)
        head = adapted.model.base_model.model.classifier.modules_to_save["default"]
        heads.append(head.weight.detach().clone())
        return adapted

    for module in (inputs, calibration):
        monkeypatch.setattr(module, "load_adapted", load)
    train(arguments(tmp_path / "run", "--load_in_4bit", "--adapter.c", "0.25"), progress=False)
    quantized, unquantized = heads
    assert torch.equal(quantized, unquantized)


def test_a_chat_model_names_its_weights(finished: Path) -> None:
    assert open_model(str(finished)).weights == finished / "adapter"
