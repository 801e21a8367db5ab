"""Every shipped experiment is loaded, checked, and each of its methods run at a cut-down size."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sparsegrad_lab.run.parsing import arguments_from
from sparsegrad_lab.run.train import train
from sparsegrad_lab.study.experiment import merged
from sparsegrad_lab.study.experiment_files import SHIPPED, experiment_names, load_experiment
from sparsegrad_lab.tasks.registry import kind_of
from sparsegrad_lab.tasks.task import IMAGES, LANGUAGE, TEXT
from tiny_runs import save_tokenizer

AT_PAPER = ["comparison", "rest-trained", "speed", "kept-entries", "conversations", "long-sequences", "t5"]
EXPERIMENTS = {
    name: load_experiment(name, "cpu" if name in experiment_names(scale="cpu") else "paper")
    for name in experiment_names()
}
METHODS = [(name, method) for name, experiment in EXPERIMENTS.items() for method in experiment.methods]
ALIKE = (
    "kept-entries",
    "openassistant",
    "default-form",
    "default-form-glue",
    "conversations",
    "every-third-block",
    "paraphrases",
)
"Experiments whose methods are alike: the first and the last of them are run."
RUN = [
    (name, method)
    for name, method in METHODS
    if name not in ALIKE or list(EXPERIMENTS[name].methods).index(method) in (0, len(EXPERIMENTS[name].methods) - 1)
]


def test_all_are_found() -> None:
    """A folder that is not listed, or a config that no experiment uses, would never be run."""
    assert len(EXPERIMENTS) == 19
    assert len(METHODS) == 110
    folders = {path.name for path in SHIPPED.iterdir() if path.is_dir()}
    assert folders == set(EXPERIMENTS)
    used = {Path(EXPERIMENTS[name].methods[method].settings.get("method", "")).resolve() for name, method in METHODS}
    assert {path.resolve() for path in SHIPPED.glob("*/*.json")} <= used


@pytest.mark.parametrize(("scale", "name"), [("cpu", name) for name in experiment_names(scale="cpu")] + [
    ("paper", name) for name in AT_PAPER
])  # fmt: skip
def test_settings_are_valid(name: str, scale: str) -> None:
    experiment = load_experiment(name, scale)
    cells = list(experiment.cells())
    assert len({cell.name for cell in cells}) == len(cells)
    others = [load_experiment(other, scale) for other in experiment_names(scale=scale)]
    trials = {cell.name for other in others for cell in other.cells() if cell.trial is not None}
    checked = set()
    for cell in cells:
        if not {cell.method, cell.task, cell.model} <= checked:  # what settings depend on, each by itself
            checked |= {cell.method, cell.task, cell.model}
            arguments_from(cell.settings(cell.trial or 1e-3)).check()
        assert trials.issuperset(cell.trials(cell.variant.searched_rates))
    for of in ("scores", "costs"):
        for method in (experiment.paper or {}).get(of, {}):
            assert method in experiment.methods


def test_scales() -> None:
    assert experiment_names(scale="paper") == AT_PAPER
    assert len(experiment_names(scale="cpu")) == 18
    with pytest.raises(ValueError, match="experiment attention is for scale cpu"):
        load_experiment("attention", "paper")
    lora = load_experiment("comparison", "paper").methods["lora"]
    assert lora.settings == {"method": "lora", "adapter": {"rank": None}}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_it_takes_its_rates_where_its_tasks_are_searched(name: str) -> None:
    """Otherwise it would wait for results that nobody makes."""
    experiment = EXPERIMENTS[name]
    for method in experiment.methods.values():
        if method.rates_of is not None:
            other, _, searched = method.rates_of.partition("/")
            assert EXPERIMENTS[other].methods[searched].learning_rates
            assert set(experiment.tasks) <= set(EXPERIMENTS[other].tasks)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As wide as the models of the study, a block or two deep: by kind of task."""
    from transformers import (
        BertConfig,
        BertModel,
        LlamaConfig,
        LlamaForCausalLM,
        T5Config,
        T5Model,
        ViTConfig,
        ViTForImageClassification,
    )  # fmt: skip

    root = tmp_path_factory.mktemp("models")
    words = save_tokenizer(root / "bert")
    save_tokenizer(root / "llama")
    save_tokenizer(root / "t5")
    torch.manual_seed(0)
    BertModel(BertConfig(
        vocab_size=words, hidden_size=384, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=12,
        max_position_embeddings=48,
    )).save_pretrained(root / "bert")  # fmt: skip
    LlamaForCausalLM(LlamaConfig(
        vocab_size=words, hidden_size=128, intermediate_size=172, num_hidden_layers=31, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=48,
    )).save_pretrained(root / "llama")  # fmt: skip
    T5Model(T5Config(
        vocab_size=words, d_model=32, d_ff=64, d_kv=8, num_heads=4, num_layers=1, decoder_start_token_id=0,
        eos_token_id=3,
    )).save_pretrained(root / "t5")  # fmt: skip
    ViTForImageClassification(ViTConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=8, image_size=28, patch_size=7,
        num_channels=1,
    )).save_pretrained(root / "vit")  # fmt: skip
    return {TEXT: root / "bert", LANGUAGE: root / "llama", "t5": root / "t5", IMAGES: root / "vit"}


# SHiRA makes sparse tensors without saying whether they are to be checked.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(("name", "method"), RUN, ids=[f"{name}-{method}" for name, method in RUN])
def test_each_method_trains(name: str, method: str, models: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    experiment = EXPERIMENTS[name]
    kind = kind_of(next(iter(experiment.tasks)))
    own = {"train_file": str(rows / "train.csv"), "validation_file": str(rows / "dev.csv"), "text": ["text"]}
    task, data = {
        TEXT: ("files", own), LANGUAGE: ("text", own), IMAGES: ("digits", {}),
    }[kind]  # fmt: skip
    small: dict[str, Any] = {
        "model": str(models["t5" if name == "t5" else kind]), "task": task, "seeds": [0],
        "output": str(tmp_path / "run"),
        "data": {**data, "max_length": 16, "train_rows": 16, "validation_rows": 8}, "calibration": {"n_steps": 2},
        "training": {"epochs": 1, "batch_size": 8, "gradient_accumulation": 1, "learning_rate": 1e-3},
    }  # fmt: skip
    settings = merged(merged(experiment.settings, experiment.methods[method].settings), small)
    for name in ("val_size", "language", "unrelated"):  # of OpenAssistant, for which these rows stand
        settings["data"].pop(name, None)
    if "refresh" in settings["calibration"]:
        settings["calibration"]["refresh"] = 1
    [result] = train(arguments_from(settings), progress=False)
    assert result["steps"] == 2
    assert result["trained_entries"]["adapter"] > 0
    assert json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8")) == result


MINE = "mine/experiment"
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "search": (MINE, {"search": 5}, "search: Input should be a valid dictionary"),
    "seeds of the search": (MINE, {"search": {"seeds": 5}}, "search.seeds: Input should be a valid list"),
    "scales": (MINE, {"scales": ["cpu"]}, "scales: Input should be a valid dictionary"),
    "search of a scale": (MINE, {"scales": {"cpu": {"search": 5}}}, "scales.cpu.search: Input should be"),
    "settings": (MINE, {"methods": {"lora": {"settings": "lora"}}}, "methods.lora.settings: Input should"),
    "source": (MINE, {"methods": {"lora": {"rates_of": 5}}}, "methods.lora.rates_of: Input should be a"),
    "no scales": ("default", {"scales": None}, "scales: Input should be a valid dictionary, found 'None'"),
    "no order": ("default", {"order": None}, "order: Input should be a valid list, found 'None'"),
    "no models": (MINE, {"models": []}, "models: Tuple should have at least 1 item"),
    "no seeds": (MINE, {"seeds": []}, "seeds: Tuple should have at least 1 item"),
    "no trials": (MINE, {"search": {"seeds": []}}, "search.seeds: Tuple should have at least 1 item"),
    "a rate of 0": (MINE, {"methods": {"lora": {"learning_rates": [0]}}}, "rates.0: Input should be greater"),
    "no rate": (MINE, {"methods": {"lora": {"learning_rates": [float("inf")]}}}, "should be a finite number"),
    "a rate twice": (MINE, {"methods": {"lora": {"learning_rates": [1e-3, 1e-3]}}}, "expected each of"),
    "two sources of a rate": (
        MINE, {"methods": {"lora": {"learning_rates": [1e-3], "rates_of": "a/b"}}}, "and rates_of exclude each other"
    ),
    "a seed twice": (MINE, {"seeds": [1, 1]}, "seeds: expected each of them once, found '[1, 1]'"),
    "a task twice": (MINE, {"tasks": ["files", "files"]}, "tasks: expected each of them once"),
    "a scale": (MINE, {"scales": {"cpus": {}}}, "scales: expected some of cpu, paper; found cpus"),
    "a task": (MINE, {"task_settings": {"file": {}}}, "task_settings: expected tasks of the experiment, some "
               "of files; found file"),
    "a task of the search": (MINE, {"search": {"task_settings": {"file": {}}}}, "search.task_settings: "),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_in_a_file_is_named(name: str, tmp_path: Path) -> None:
    place, change, words = WRONG[name]
    mine = {"title": "A", "question": "B", "tasks": ["files"], "methods": {"lora": {"learning_rates": [1e-3]}}}
    contents = {MINE: mine, "default": {"scales": {"cpu": {}, "paper": {}}}}
    contents[place] |= change
    for file, content in contents.items():
        path = tmp_path / f"{file}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
    where = f"experiment mine|{re.escape(str(tmp_path / place))}.yaml"
    with pytest.raises(ValueError, match=f"({where}): .*{re.escape(words)}"):
        load_experiment("mine", folder=tmp_path)


def test_the_same_relative_folder_elsewhere_is_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files are parsed once, by absolute path and time: not by a name that the working directory decides."""
    for place, title in (("here", "First"), ("there", "Second")):
        folder = tmp_path / place / "experiments" / "mine"
        folder.mkdir(parents=True)
        (folder / "experiment.yaml").write_text(
            f"title: {title}\nquestion: Which?\ntasks: [files]\nmethods: {{lora: {{learning_rates: [0.001]}}}}\n",
            encoding="utf-8",
        )
    titles = []
    for place in ("here", "there"):
        monkeypatch.chdir(tmp_path / place)
        titles.append(load_experiment("mine", folder=Path("experiments")).title)
    assert titles == ["First", "Second"]
