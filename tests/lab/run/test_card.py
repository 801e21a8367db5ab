"""The folder of an adapter is complete: the code in its card loads it, with its tokenizer and its class names."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.card import make_card
from sparsegrad_lab.run.train import train


def card_of(folder: Path) -> tuple[dict[str, Any], str, str]:
    """Metadata, text, and the code in it."""
    _, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    code = re.search(r"```python\n(.*?)```", body, re.DOTALL)
    assert code is not None
    return yaml.safe_load(header), body, code[1]


@pytest.mark.parametrize("method", ["sparsegrad", "full"])
def test_the_code_in_the_card_loads_the_model(
    method: str, arguments: Callable[..., Any], tiny_bert: Path, tmp_path: Path
) -> None:
    """Run in a fresh process: PEFT knows SparseGrad only after an import, which the card names."""
    [result] = train(arguments(tmp_path / "run", "--method", method, "--training.epochs", "1"), progress=False)
    folder = shutil.move(tmp_path / "run" / ("model" if method == "full" else "adapter"), tmp_path / "elsewhere")
    metadata, body, code = card_of(folder)
    assert metadata["library_name"] == ("transformers" if method == "full" else "peft")
    assert (metadata["tags"], metadata["pipeline_tag"]) == ([method], "text-classification")
    assert metadata["model-index"][0]["results"][0]["metrics"] == [
        {"type": "accuracy", "value": pytest.approx(result["score"], abs=1e-6)}
    ]
    assert f"| validation | accuracy | {result['score']:.4f} |" in body
    assert f"| training loss at the end | {result['training_loss_last_sixth']:.4f}, mean of the last sixth" in body
    assert "| learning rate | 0.01, schedule linear |" in body
    assert "| data | `train.csv`, `dev.csv`; 48 train rows, 24 validation rows |" in body
    assert re.search(r"^\| good \| [\d.]{6} \| [\d.]{6} \| [\d.]{6} \| 12 \|$", body, re.M)
    assert body.index("KeyError" if method == "sparsegrad" else "```python") < 300
    assert ("sparsegrad_peft" in code) == (method == "sparsegrad")
    script = code.replace("PATH", str(folder)).replace("BASE", str(tiny_bert))
    script += "\nprint(model.config.id2label, tokenizer('the warm film').input_ids)\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("{0: 'bad', 1: 'good'} [2, ")


def test_no_path_of_this_machine(finished_run: Path, tiny_bert: Path, rows: Path) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in (finished_run / "adapter").iterdir()
             if path.suffix != ".safetensors"}  # fmt: skip
    assert len(texts) > 3
    for path, text in texts.items():
        assert not [place for place in (tiny_bert, rows, finished_run) if str(place) in text], path
    settings = json.loads((finished_run / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert settings["base_model_name_or_path"] is None


def test_names_on_the_hub_and_strange_classes(finished_run: Path) -> None:
    result = json.loads((finished_run / "result.json").read_text(encoding="utf-8"))
    strange = "a|b\n'c"
    classes = {strange: next(iter(result["by_class"]["classes"].values()))}
    settings = {**result["config"], "task": "glue/rte"}
    settings["data"] = {**settings["data"], "train_file": None, "validation_file": None}
    card = make_card(
        {**result, "model": "minilm", "labels": [strange, "d"], "by_class": {"classes": classes}, "config": settings},
        None,
    )
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (metadata["base_model"], metadata["license"], metadata["datasets"]) == (
        "sentence-transformers/all-MiniLM-L6-v2", "apache-2.0", ["nyu-mll/glue"],
    )  # fmt: skip
    assert "| classes | a\\|b 'c, d |" in card
    assert "\n| a\\|b 'c | " in card


def test_an_export_is_complete_and_can_be_repeated(finished_run: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for rank in ("2", "full"):
        assert main(["export", str(finished_run), "--rank", rank, "--output", str(tmp_path / "lora")]) == 0
        metadata, body, code = card_of(tmp_path / "lora")
        assert (metadata["library_name"], "sparsegrad_peft" in code) == ("peft", False)
        assert f"Exported as LoRA of rank {2 if rank == '2' else ''}" in body
    assert AutoTokenizer.from_pretrained(tmp_path / "lora")("the warm film").input_ids
    (tmp_path / "lora" / "notes.txt").write_text("mine")
    assert main(["export", str(finished_run), "--output", str(tmp_path / "lora")]) == 1
