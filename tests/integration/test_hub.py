"""Models, tasks and adapters by their names on the hub: the real clients, over HTTP, from a hub on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import hub

ROWS = {"train": 48, "validation": 24, "test": 8}
CARD = """---
configs:
- config_name: rte
  data_files:
{files}
---
"""


@pytest.fixture(scope="module")
def repositories(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nyu-mll/glue` with a few rows of RTE's shape, in the layout that it has on the hub; and `someone/tiny-bert`."""
    from datasets import ClassLabel, Dataset

    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_bert, root / "models" / "someone" / "tiny-bert")
    glue = root / "datasets" / "nyu-mll" / "glue"
    (glue / "rte").mkdir(parents=True)
    for split, count in ROWS.items():
        labels = [-1 if split == "test" else i % 2 for i in range(count)]
        rows = {
            "sentence1": [f"the film was {'kind' if i % 2 else 'cold'}" for i in range(count)],
            "sentence2": ["the film was kind"] * count,
            "label": labels,
            "idx": list(range(count)),
        }
        names = ClassLabel(names=["entailment", "not_entailment"])
        Dataset.from_dict(rows).cast_column("label", names).to_parquet(glue / f"rte/{split}-00000-of-00001.parquet")
    files = "\n".join(f"  - split: {split}\n    path: rte/{split}-*" for split in ROWS)
    (glue / "README.md").write_text(CARD.format(files=files))
    return root


@pytest.fixture
def served(repositories: Path) -> Iterator[tuple[str, list[str]]]:
    with hub(repositories) as (address, asked):
        yield address, asked


ALL = """
import json, sys
from sparsegrad_lab.cli.main import main
sys.exit(max(main(words) for words in json.loads(sys.argv[1])))
"""


def sparsegrad(*commands: list[str], cache: Path, address: str, offline: bool = False) -> subprocess.CompletedProcess:
    """Run commands in one new process, since the libraries read these variables when they are imported."""
    left_out = ("SPARSEGRAD_DATA", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    variables = {name: value for name, value in os.environ.items() if name not in left_out}
    variables |= {"HF_HOME": str(cache), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "1" if offline else "0"}
    return subprocess.run(
        [sys.executable, "-c", ALL, json.dumps(commands)], capture_output=True, text=True, check=False, env=variables
    )


def test_train_from_the_hub_and_again_without_it(
    served: tuple[str, list[str]], repositories: Path, tmp_path: Path
) -> None:
    address, asked = served
    words = ["train", "--model", "someone/tiny-bert", "--task", "glue/rte", "--epochs", "1", "--max_length", "32"]
    done = sparsegrad([*words, "--output", str(tmp_path / "run")], cache=tmp_path / "cache", address=address)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["rows"] == {"train": 48, "validation": 24}  # the test split has no labels
    assert result["labels"] == ["entailment", "not_entailment"]
    assert any("tiny-bert/resolve" in line and "model.safetensors" in line for line in asked)
    assert any("nyu-mll/glue/resolve" in line and "rte/train-" in line for line in asked)

    count = len(asked)
    words += ["--output", str(tmp_path / "offline")]
    done = sparsegrad(words, cache=tmp_path / "cache", address=address, offline=True)
    assert done.returncode == 0, done.stderr
    assert len(asked) == count
    again = json.loads((tmp_path / "offline" / "result.json").read_text())
    assert again["score"] == result["score"]
    assert again["scores"]["validation"]["loss"] == pytest.approx(result["scores"]["validation"]["loss"], rel=1e-5)

    adapter = repositories / "models" / "someone" / "adapter"
    shutil.copytree(tmp_path / "run" / "adapter", adapter)
    script = (
        "import sparsegrad_peft.tuner; from peft import AutoPeftModelForSequenceClassification as Auto;"
        "model = Auto.from_pretrained('someone/adapter'); print(model.peft_config['default'].peft_type.value)"
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "someone/tiny-bert"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "other"), "HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0"},
    )  # fmt: skip
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.split()[-1] == "SPARSEGRAD"


def test_inspect_fetches_the_config_alone(served: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = served
    done = sparsegrad(["inspect", "someone/tiny-bert"], cache=tmp_path / "cache", address=address)
    assert done.returncode == 0, done.stderr
    fetched = {line.rpartition("/")[2] for line in asked if line.startswith("GET") and "/resolve/" in line}
    assert fetched == {"config.json"}


def test_what_the_hub_does_not_have(served: tuple[str, list[str]], tmp_path: Path) -> None:
    """In a line, and before any long work."""
    cases = {
        "someone/none": ["--model", "someone/none", "--task", "glue/rte"],
        "glue/sst2 could not be loaded from the hub": ["--model", "someone/tiny-bert", "--task", "glue/sst2"],
    }
    commands = [["train", *words, "--output", str(tmp_path / "run")] for words in cases.values()]
    done = sparsegrad(*commands, cache=tmp_path / "cache", address=served[0])
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("sparsegrad train: ")]
    for said, line in zip(cases, lines, strict=True):
        assert said in line
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
