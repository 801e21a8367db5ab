"""The examples run, on fewer rows and with a small chat model."""

from __future__ import annotations

import io
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
from blocks import ROOT

from sparsegrad_lab.cli.main import main

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with some of the tickets."""
    rows = (EXAMPLES / "tickets.csv").read_text(encoding="utf-8").splitlines()
    (tmp_path / "tickets.csv").write_text("\n".join(rows[:91]) + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, script: str, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", [script, *options])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")


def test_every_example_is_listed() -> None:
    listed = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")} <= listed


@pytest.mark.slow
def test_notebook(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The cells run in order; those of the file have no outputs, which would age."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((EXAMPLES / "csv_classification.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) == 7
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec("".join(cell["source"]), names)
    accuracy = re.search(r"accuracy ([0-9.]+)", capsys.readouterr().out)
    assert accuracy is not None
    assert float(accuracy[1]) > 0.6  # of three classes; the example itself reaches 1.0
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_own_loop(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "own_loop.py", "--file", "tickets.csv", "--epochs", "4")
    accuracy = re.findall(r"accuracy ([0-9.]+)", capsys.readouterr().out)
    assert float(accuracy[-1]) > 0.6
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_trl(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub_models: dict[str, str]
) -> None:
    model = hub_models["HuggingFaceTB/SmolLM2-135M-Instruct"]
    run(monkeypatch, "trl_sft.py", "--model", model, "--epochs", "20")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()


def test_museum(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], hub_models: dict[str, str]
) -> None:
    """What `make chat-demo` runs: train, then answer."""
    commands = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "sparsegrad train --config examples/museum/train.yaml\n" in commands
    assert "sparsegrad chat runs/museum\n" in commands
    (folder / "examples").symlink_to(EXAMPLES)
    model = hub_models["HuggingFaceTB/SmolLM2-135M-Instruct"]
    words = ["--model", model, "--layers", "[0]", "--n_steps", "2"]
    assert main(["train", "--config", "examples/museum/train.yaml", *words]) == 0
    losses = [entry["loss"] for entry in json.loads(Path("runs/museum/result.json").read_text())["evaluations"]]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("When is the museum open?\n"))
    assert main(["chat", "runs/museum", "--max_new_tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()
