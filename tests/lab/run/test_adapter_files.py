"""Adapters with a missing or damaged file, or with numbers that are not finite, are refused by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.adapter_files import check_adapter
from sparsegrad_lab.run.finished_run import open_run

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_missing_file(name: str, run: Path) -> None:
    """PEFT would look for the folder's name on the hub."""
    (run / "adapter" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"run/adapter is not a saved adapter: it has no {name}; save or copy"):
        open_run(run)


@pytest.mark.parametrize(
    ("name", "size", "why"), [(WEIGHTS, 1000, "SafetensorError"), (CONFIG, 300, "JSONDecodeError"), (CONFIG, 0, "JSON")]
)
def test_a_file_that_is_cut_off(name: str, size: int, why: str, run: Path) -> None:
    os.truncate(run / "adapter" / name, size)
    with pytest.raises(ValueError, match=rf"adapter/{name} is damaged or cut off \({why}.*\); save or copy"):
        open_run(run)


def test_a_head_that_is_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merged model would give NaN, and the first class as the prediction for each row."""
    file = run / "adapter" / WEIGHTS
    tensors = load_file(file)
    head = "base_model.model.classifier.weight"
    tensors[head][0, 0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    assert main(["merge", str(run)]) == 1
    assert f"{file}: expected finite numbers, found NaN or infinity in {head}; train again" in capsys.readouterr().err
    assert not (run / "merged").exists()


def test_an_adapter_in_pytorchs_format(run: Path) -> None:
    """As earlier versions of PEFT wrote it."""
    file = run / "adapter" / WEIGHTS
    torch.save(load_file(file), file.with_name("adapter_model.bin"))
    file.unlink()
    assert check_adapter(run / "adapter").peft_type == "SPARSEGRAD"
