"""Files of earlier versions load, and give what they gave then. The files: `tests/samples/README.md`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import orthogonal

SAMPLES = Path(__file__).parent / "samples"
ADAPTERS = ["default", "shared", "complete", "original-space"]


@pytest.fixture
def samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all samples, as the current folder: the runs name their model and rows by relative paths."""
    folder = tmp_path / "samples"
    shutil.copytree(SAMPLES, folder)
    monkeypatch.chdir(folder)
    return folder


def sparsegrad(*argv: str) -> None:
    from sparsegrad_lab.cli.main import main

    assert main(argv) == 0


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_a_finished_run_evaluates_and_predicts(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = read(samples / "finished_run" / "result.json")["scores"]["validation"]
    sparsegrad("evaluate", "finished_run")
    scores = json.loads(capsys.readouterr().out)
    assert scores["validation"]["accuracy"] == pytest.approx(expected["accuracy"])

    sparsegrad("predict", "finished_run", "--file", "rows/dev.csv")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = sum(row["prediction"] == row["label"] for row in rows)
    assert right / len(rows) == pytest.approx(expected["accuracy"])


def test_an_interrupted_run_goes_on_from_its_checkpoint(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sparsegrad("train", "--config", "interrupted_run/config.yaml", "--output", "interrupted_run")
    assert "step 6" in capsys.readouterr().err
    found, expected = read(samples / "interrupted_run" / "result.json"), read(samples / "interrupted_run_result.json")
    assert found["resumed"] is True
    assert found["steps"] == expected["steps"] == 18
    assert found["evaluations"][0] == pytest.approx(expected["evaluations"][0])
    for now, then in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert now["loss"] == pytest.approx(then["loss"], abs=1e-3)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_gives_the_same_outputs(name: str) -> None:
    from peft import PeftModel
    from transformers import BertModel

    import sparsegrad_peft.tuner  # noqa: F401  # registers the method with PEFT

    expected = load_file(SAMPLES / "adapters" / "expected.safetensors")
    assert (expected[name] - expected["base"]).abs().max() > 1

    def outputs(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=expected["input_ids"]).last_hidden_state

    base = BertModel.from_pretrained(SAMPLES / "base", attn_implementation="eager")
    model = PeftModel.from_pretrained(base, str(SAMPLES / "adapters" / name), is_trainable=True)
    torch.testing.assert_close(outputs(model), expected[name], rtol=0, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(outputs(model), expected["base"], rtol=0, atol=1e-4)
    torch.testing.assert_close(outputs(model.merge_and_unload()), expected[name], rtol=0, atol=1e-4)


def test_layers_and_optimizer_go_on_from_a_checkpoint() -> None:
    """The states of block, packed and literal layers and of their optimizer: four more steps end where they ended."""
    from sparsegrad_peft import Basis, LiteralSparseGradLinear, SparseGradAdamW, SparseGradLinear

    checkpoint = torch.load(SAMPLES / "method" / "checkpoint.pt", weights_only=True)
    f32 = torch.float32
    basis = Basis(orthogonal(8, 6, f32), orthogonal(8, 5, f32))
    block = SparseGradLinear.from_linear(nn.Linear(8, 8), basis)
    packed = SparseGradLinear.from_linear(nn.Linear(8, 8), basis, positions=torch.tensor([2, 3, 5]))
    complete = Basis(orthogonal(8, dtype=f32), orthogonal(8, dtype=f32))
    literal = LiteralSparseGradLinear.from_linear(nn.Linear(8, 8), complete, k=6)
    head = nn.Linear(8, 2)
    model = nn.Sequential(block, nn.GELU(), packed, nn.GELU(), literal, head)
    optimizer = SparseGradAdamW(
        [
            {"params": [block.S], "sparse": True, "k": 4},
            {"params": [literal.W_tilde], "sparse": True},
            {"params": [packed.values, *head.parameters()], "weight_decay": 0.01},
        ],
        lr=0.01,
    )
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    for step in range(4, 8):
        optimizer.zero_grad()
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), checkpoint["model_after_4_more_steps"])


def test_result_files_make_a_report(samples: Path) -> None:
    sparsegrad("report", "results", "--output", "report")
    table = (samples / "report" / "results.md").read_text(encoding="utf-8")
    for method in ("sparsegrad", "lora"):
        scores = [100 * read(samples / f"results/small/base/files/{method}-{seed}.json")["score"] for seed in (0, 1)]
        assert f"{sum(scores) / 2:.1f}" in table


def test_an_experiment_finds_its_runs_done(samples: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing runs again: the settings of today's runs are those of the result files."""
    before = {path: path.read_bytes() for path in (samples / "results").rglob("*.json")}
    assert len(before) == 8
    sparsegrad("reproduce", "small", "--folder", "experiments", "--results", "results")
    assert {path: path.read_bytes() for path in (samples / "results").rglob("*.json")} == before
    assert not list((samples / "runs").rglob("config.yaml"))
