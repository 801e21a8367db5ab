"""Every shipped experiment is loaded, checked, and each of its methods run at a cut-down size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sparsegrad_peft.cli.train import as_arguments
from sparsegrad_peft.run.train import train
from sparsegrad_peft.study.experiment import SHIPPED, Experiment, Method, experiment_names, load_experiment, merged
from sparsegrad_peft.study.reproduce import trials_of
from tiny_runs import save_tokenizer

EXPERIMENTS = {name: load_experiment(name) for name in experiment_names()}
METHODS = [(name, method) for name, experiment in EXPERIMENTS.items() for method in experiment.methods]


def test_all_are_found() -> None:
    """A folder that is not listed, or a config that no experiment uses, would never be run."""
    assert len(EXPERIMENTS) == 8
    assert len(METHODS) == 45
    folders = {path.name for path in SHIPPED.iterdir() if path.is_dir()}
    assert folders == set(EXPERIMENTS)
    used = {Path(method.settings.get("method", "")).resolve() for _, method in METHODS}
    assert {path.resolve() for path in SHIPPED.glob("*/*.json")} <= used


@pytest.mark.parametrize(("scale", "name"), [("cpu", name) for name in EXPERIMENTS] + [
    ("paper", name) for name in ("comparison", "rest-trained", "kept-entries")
])  # fmt: skip
def test_settings_are_valid(name: str, scale: str) -> None:
    experiment = load_experiment(name, scale)
    cells = list(experiment.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    searches = trials_of(
        cell for other in experiment_names(scale=scale) for cell in load_experiment(other, scale).cells()
    )
    checked = set()
    for cell in cells:
        if not {cell.method.name, cell.task, cell.model} <= checked:  # what settings depend on, each by itself
            checked |= {cell.method.name, cell.task, cell.model}
            as_arguments(cell.settings(cell.trial or 1e-3)).check()
        if cell.searched_as is not None:
            assert cell.searched_as in searches
    for method in (experiment.paper or {"scores": {}})["scores"]:
        assert method in {m.name for m in experiment.methods}


def test_scales() -> None:
    assert experiment_names(scale="paper") == ["comparison", "rest-trained", "kept-entries"]
    with pytest.raises(ValueError, match="experiment sizes is for scale cpu"):
        load_experiment("sizes", "paper")
    lora = next(method for method in load_experiment("comparison", "paper").methods if method.name == "lora")
    assert lora.settings == {"method": "lora", "adapter": {"rank": None}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_takes_its_rates_where_its_tasks_are_searched(name: str) -> None:
    """Otherwise it would wait for results that nobody makes."""
    experiment = EXPERIMENTS[name]
    for method in experiment.methods:
        if method.rates_of is not None:
            other, _, searched = method.rates_of.partition("/")
            assert searched in {m.name for m in EXPERIMENTS[other].methods if m.learning_rates}
            assert set(experiment.tasks) <= set(EXPERIMENTS[other].tasks)


@pytest.fixture(scope="module")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As wide as the model of the study, one block deep."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("one-block")
    words = save_tokenizer(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=words, hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=48,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


# SHiRA makes sparse tensors without saying whether they are to be checked; GaLore's AdamW is that of old transformers.
@pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("experiment", "method"), METHODS, ids=[f"{name}-{method.name}" for name, method in METHODS])
def test_each_method_trains(experiment: str, method: Method, one_block: Path, rows: Path, tmp_path: Path) -> None:
    if method.name == "galore":
        pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    settings = merged(settings_of(EXPERIMENTS[experiment]), method.settings)
    settings = merged(settings, {
        "model": str(one_block), "task": "files", "seeds": [0], "output": str(tmp_path / "run"),
        "data": {"train_file": str(rows / "train.csv"), "validation_file": str(rows / "dev.csv"), "text": ["text"],
                 "max_length": 16, "train_rows": 16, "validation_rows": 8},
        "calibration": {"n_steps": 2}, "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
    })  # fmt: skip
    [result] = train(as_arguments(settings), progress=False)
    assert result["steps"] == 2
    assert result["trained_entries"]["adapter"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8")) == result


def settings_of(experiment: Experiment) -> dict[str, object]:
    """What all of an experiment's runs share."""
    return experiment.settings
