"""Which results are those of a run, and which learning rate a search gives."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from grids import result_file
from helpers import write_json
from sparsegrad_lab.run.parsing import arguments_from
from sparsegrad_lab.study.cell_run import describe
from sparsegrad_lab.study.experiment import Cell, merged
from sparsegrad_lab.study.experiment_files import experiment_names, load_experiment
from sparsegrad_lab.study.grid import Places
from sparsegrad_lab.study.stored_results import StoredResults


@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_no_rate_before_the_search_is_over(metric: str, load: Any, places: Places) -> None:
    cells = list(load("first").cells())
    trials = [cell for cell in cells if cell.trial is not None and cell.method == "lora"]
    run = next(cell for cell in cells if cell.trial is None and cell.method == "lora")
    result_file(places, trials[0].name).parent.mkdir(parents=True)
    finished = {"status": "finished", "metric": metric, "score": 0.5, "training_loss_last_sixth": 0.6}
    better, worse = (0.6, 0.4) if metric == "accuracy" else (0.4, 0.6)

    def write(trial: Any, result: dict[str, Any]) -> None:
        result_file(places, trial.name).write_text(json.dumps(result), encoding="utf-8")

    write(trials[0], finished)
    assert StoredResults(places.results).learning_rate(run) is None
    for second, best in (
        ({**finished, "score": better}, 1e-3),
        ({**finished, "score": worse}, 1e-2),
        ({**finished, "training_loss_last_sixth": 0.5}, 1e-3),
        ({**finished, "training_loss_last_sixth": None}, 1e-2),  # no loss was logged
        ({**finished, "score": None}, 1e-2),  # it was not finite
        ({**finished, "score": math.nan}, 1e-2),
        ({"status": "diverged"}, 1e-2),
    ):
        write(trials[1], second)
        assert StoredResults(places.results).learning_rate(run) == best
    write(trials[1], {"status": "finished", "score": 0.5})
    with pytest.raises(ValueError, match=r"lora-lr0\.001\.json: expected a finished result with its metric; remove it"):
        StoredResults(places.results).learning_rate(run)


def test_a_search_goes_on_while_the_best_rate_is_at_an_edge(load: Any, places: Places) -> None:
    """It stops inside, or at `most_rates`. The score of the rows that select decides, not that of the scored rows."""
    experiment = load("first")
    lora = experiment.methods["lora"].model_copy(update={"most_rates": 5})
    experiment = experiment.model_copy(update={"methods": {**experiment.methods, "lora": lora}})
    run = next(cell for cell in experiment.cells() if cell.trial is None and cell.method == "lora")
    stored = StoredResults(places.results)

    def answer(score: dict[float, float]) -> list[float]:
        """Write the trials that the search asks for, and return their rates."""
        for path in places.results.rglob("*.json"):
            path.unlink()
        while not stored.search_finished(run):
            assert stored.learning_rate(run) is None
            for name, rate in stored.search(run).items():
                result = {"status": "finished", "metric": "accuracy", "selection_score": score[rate], "score": -rate}
                stored.write(name, result)
        assert stored.learning_rate(run) == max(score, key=score.__getitem__)
        return list(stored.search(run).values())

    assert list(stored.search(run).values()) == [1e-3, 1e-2]
    assert answer({1e-4: 0.1, 1e-3: 0.3, 1e-2: 0.2}) == [1e-4, 1e-3, 1e-2]
    assert answer({1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3, 1.0: 0.2}) == [1e-3, 1e-2, 1e-1, 1.0]
    assert answer({1e-3: 0.1, 1e-2: 0.2, 1e-1: 0.3, 1.0: 0.4, 10.0: 0.5}) == [1e-3, 1e-2, 1e-1, 1.0, 10.0]


def test_settings_that_become_null_or_were_null_are_others(load: Any, places: Places) -> None:
    """And a PEFT config is what its file says, wherever that lies."""
    [cell] = [cell for cell in load("second").cells() if cell.method == "broken"]
    config = arguments_from(cell.settings(None)).as_dict()
    file = result_file(places, cell.name)
    file.parent.mkdir(parents=True)

    def differs(**changes: Any) -> list[str]:
        there = {"status": "finished", "config": merged(config, changes.pop("config", {})), **changes}
        file.write_text(json.dumps(there), encoding="utf-8")
        return [words for _, words in StoredResults(places.results).outdated([cell])]

    assert differs() == []
    assert "calibration.walk None, now 0.0001" in differs(config={"calibration": {"walk": None}})[0]
    assert "data.train_rows 3, now None" in differs(config={"data": {"train_rows": 3}})[0]


def test_a_setting_that_the_method_does_not_read_makes_no_other_run(load: Any, places: Places) -> None:
    """Such as a default of ours that has changed since."""
    cell = next(cell for cell in load("first").cells() if cell.method == "lora" and cell.trial is not None)
    config = arguments_from(cell.settings(cell.trial)).as_dict()
    stored = StoredResults(places.results)
    for change, differs in (
        ({"adapter": {"shared": True, "products": "sparse"}, "calibration": {"n_steps": 99}}, False),
        ({"adapter": {"rank": 2}}, True),
    ):
        stored.write(cell.name, {"status": "finished", "config": merged(config, change)})
        assert bool(stored.outdated([cell])) is differs
        assert (stored.equal_run(arguments_from(cell.settings(cell.trial))) is None) is differs


def test_a_peft_config_is_what_its_file_says(load: Any, experiments: Path, places: Places) -> None:
    """Two files with one name are two methods, and a file that has moved is the same."""
    content = {"peft_type": "LORA", "r": 1, "target_modules": "mlp"}
    (experiments / "second" / "lora.json").write_text(json.dumps(content), encoding="utf-8")
    methods = {"file": {"settings": {"method": "lora.json"}}}
    experiment = {"title": "S", "question": "?", "seeds": [0], "baseline": "file", "methods": methods}
    (experiments / "second" / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    [cell] = load("second").cells()
    arguments = arguments_from(cell.settings(None))
    stored = StoredResults(places.results)
    config = {**arguments.as_dict(), "method": "elsewhere/lora.json"}
    result = {"status": "finished", "config": config, **describe(cell, arguments, 1)}
    assert result["adapter_config"] == content
    stored.write(cell.name, result)
    assert stored.outdated([cell]) == []
    assert stored.equal_run(arguments) is not None
    (experiments / "second" / "lora.json").write_text(json.dumps({**content, "r": 2}), encoding="utf-8")
    [(_, words)] = stored.outdated([cell])
    assert re.search(r"'r': 1.*now \{.*'r': 2", words)
    assert stored.equal_run(arguments) is None


def grown(stored: StoredResults, cells: list[Cell]) -> list[Cell]:
    """Trials at further learning rates, which the stored results of a search ask for."""
    trials = {cell.name: cell for cell in cells if cell.trial is not None}
    asked = [replace(cell, trial=rate) for cell in trials.values() for rate in stored.search(cell).values()]
    return list({cell.name: cell for cell in asked if cell.name not in trials}.values())


def test_the_committed_results_are_of_the_shipped_experiments() -> None:
    """Each file is that of a run of theirs, with the settings and the learning rate that it would have now."""
    study = Path(__file__).parents[3] / "benchmarks" / "results" / "study"
    stored = StoredResults(study)
    experiments = [load_experiment(name, "cpu") for name in experiment_names(scale="cpu")]
    planned = [cell for experiment in experiments for cell in experiment.cells()]
    cells = [*planned, *grown(stored, planned)]
    files = {path.relative_to(study).with_suffix("").as_posix() for path in study.rglob("*.json")}
    assert len(files) > 100
    assert files <= {cell.name for cell in cells}
    assert not stored.outdated(cells)
    for cell in cells:  # and its search is whole
        if cell.name in files and cell.trial is None and cell.variant.searched_rates:
            assert stored.learning_rate(cell) is not None, cell.name


@pytest.mark.parametrize("content", [{"status": "finished"}, {"status": "finished", "config": []}, [], {"status": 1}])
def test_another_file_among_the_results_is_no_run(content: Any, load: Any, places: Places) -> None:
    stored = StoredResults(places.results)
    write_json(stored.path("something else"), content)
    [cell, *_] = load("first").cells()
    assert stored.equal_run(arguments_from(cell.settings(cell.trial))) is None


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_result_is_named(content: str, load: Any, places: Places) -> None:
    stored = StoredResults(places.results)
    [cell, *_] = load("first").cells()
    stored.path(cell.name).parent.mkdir(parents=True)
    stored.path(cell.name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"lr0\.01\.json: expected .*; remove it, and reproduce writes it again"):
        stored.outdated([cell])


def test_the_mean_over_the_seeds_of_a_search_decides(load: Any, places: Places, experiments: Path) -> None:
    """One lucky seed does not choose a rate. The first seed is not in a trial's name, as in results of before."""
    path = experiments / "first" / "experiment.yaml"
    path.write_text(path.read_text(encoding="utf-8") + "search: {seeds: [100, 101]}\n", encoding="utf-8")
    cells = [cell for cell in load("first").cells() if cell.method == "lora"]
    trials, run = [cell for cell in cells if cell.trial is not None], cells[-1]
    assert [cell.name.rpartition("/")[2] for cell in trials] == [
        "lora-lr0.01", "lora-lr0.01-101", "lora-lr0.001", "lora-lr0.001-101"
    ]  # fmt: skip
    assert {cell.seed for cell in trials} == {100, 101}
    stored = StoredResults(places.results)
    for trial, score in zip(trials, (0.9, 0.1, 0.6, 0.5), strict=True):
        assert stored.learning_rate(run) is None
        result = {"status": "finished", "metric": "accuracy", "selection_score": score, "training_loss_last_sixth": 1.0}
        stored.write(trial.name, result)
    assert stored.learning_rate(run) == 1e-3
    stored.write(trials[-1].name, {"status": "diverged"})  # it might for another seed too
    assert stored.learning_rate(run) == 1e-2
