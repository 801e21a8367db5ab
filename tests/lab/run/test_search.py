"""A search runs its trials once each, resumes, and writes a configuration that `train` takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from transformers import TrainerControl, TrainerState

from commands import Command
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.process_identity import process_identity
from sparsegrad_lab.run.search import _Message, _ReportToOptuna, _requeue_interrupted, search
from sparsegrad_lab.run.settings import RunArguments, SearchArguments

# Optuna's own: two of its classes that are marked as new, one that it will rename.
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")

Arguments = Callable[..., RunArguments]


def what(**options: Any) -> SearchArguments:
    return SearchArguments(**{"trials": 3, "lowest": 1e-3, "highest": 1e-1, "batch_sizes": [8, 16], **options})


def lines() -> tuple[list[str], Callable[[str], None]]:
    said: list[str] = []
    return said, said.append


def test_trials_best_and_again(arguments: Arguments, tmp_path: Path) -> None:
    said, say = lines()
    result = search(arguments(tmp_path / "s"), what(), say)
    assert [trial["number"] for trial in result["trials"]] == [0, 1, 2]
    rates = {trial["learning_rate"] for trial in result["trials"]}
    assert all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert len(rates) == 3  # with one seed for the samplers of all trials, they would be equal
    assert {trial["batch_size"] for trial in result["trials"]} <= {8, 16}
    scores = [trial["score"] for trial in result["trials"] if trial["state"] == "complete"]
    assert result["best"]["score"] == max(scores)
    assert result["best"]["metric"] == "accuracy"  # the label of the axis in search.png
    assert len(said) == 3
    assert json.loads((tmp_path / "s" / "search.json").read_text(encoding="utf-8"))["best"] == result["best"]
    assert (tmp_path / "s" / "search.png").read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "s").rglob("*.safetensors"))  # the numbers are kept, the weights are not

    again = search(arguments(tmp_path / "s"), what(), say)
    assert again == result
    assert len(said) == 3  # nothing was run
    more = search(arguments(tmp_path / "s"), what(trials=4), say)
    assert more["trials"][:3] == result["trials"]
    assert len(more["trials"]) == len(said) == 4


def test_best_is_what_train_takes(arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = search(arguments(tmp_path / "s"), what(trials=2), lambda words: None)
    best = tmp_path / "s" / "best.yaml"
    assert main(["train", "--config", str(best), "--output", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert found["learning_rate"] == result["best"]["learning_rate"]
    assert found["config"]["training"]["batch_size"] == result["best"]["batch_size"]
    assert found["score"] == result["best"]["score"]  # the same seed, settings and rows


def test_diverged_trials_count(arguments: Arguments, tmp_path: Path) -> None:
    said, say = lines()
    settings = arguments(tmp_path / "s", "--method", "full")
    with pytest.raises(ValueError, match=r"none of the 2 trials finished; lower search.highest"):
        search(settings, what(trials=2, lowest=1e30, highest=1e35), say)
    assert all(line.endswith("diverged") for line in said)
    assert len(said) == 2


def test_an_interrupted_trial_is_run_again(arguments: Arguments, tmp_path: Path) -> None:
    """A trial of a dead process is queued again and is not counted twice."""
    gone = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    left = process_identity(gone.pid)
    gone.communicate()
    search(arguments(tmp_path / "s"), what(trials=1), lambda words: None)
    journal = str(tmp_path / "s" / "trials.journal")
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
    [name] = optuna.study.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    trial = study.ask()
    drawn = (
        trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True),
        trial.suggest_categorical("batch_size", [8, 16]),
    )
    trial.set_user_attr("process", left)

    result = search(arguments(tmp_path / "s"), what(trials=2), lambda words: None)
    states = [(trial["number"], trial["state"]) for trial in result["trials"]]
    assert states == [(0, "complete"), (1, "interrupted"), (2, "complete")]
    assert result["trials"][2]["learning_rate"] == float(f"{drawn[0]:.3g}")
    assert result["trials"][2]["batch_size"] == drawn[1]


def test_two_processes_share_the_trials(search_words: Callable[..., list[str]], tmp_path: Path) -> None:
    words = search_words(tmp_path / "s")
    words += ["--search.trials", "5", "--search.lowest", "1e-3", "--search.batch_sizes", "[8,16]"]
    both = [Command(words, tmp_path / f"printed-{number}") for number in range(2)]
    shown = [command.wait() for command in both]
    assert [code for code, _, _ in shown] == [0, 0], shown
    trials = [line.split(":")[0] for _, out, _ in shown for line in out.splitlines() if line.startswith("trial ")]
    assert len(set(trials)) == len(trials)  # none was run twice
    assert 5 <= len(trials) <= 6  # both may have begun the last one
    assert "next:   sparsegrad train --config" in shown[0][1]


def test_another_search_in_the_folder(arguments: Arguments, tmp_path: Path) -> None:
    search(arguments(tmp_path / "s"), what(trials=1), lambda words: None)
    with pytest.raises(FileExistsError, match=r"another search, which differs in search.highest \(0.1 there, 1.0 here"):
        search(arguments(tmp_path / "s"), what(trials=1, highest=1.0), lambda words: None)
    with pytest.raises(FileExistsError, match=r"differs in training.epochs \(2.0 there, 3.0 here\)"):
        search(arguments(tmp_path / "s", "--training.epochs", "3"), what(trials=1), lambda words: None)
    changed = arguments(tmp_path / "s")
    rows = tmp_path / "rows.csv"
    shutil.copy(str(changed.data.train_file), rows)
    changed.data.train_file, changed.output = str(rows), str(tmp_path / "other")
    search(changed, what(trials=1), lambda words: None)
    rows.write_text(rows.read_text(encoding="utf-8") + "x,warm,good,1\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"differs in rows of data.train_file \(SHA-256"):
        search(changed, what(trials=2), lambda words: None)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"trials": 0}, r"search.trials must be at least 1, found 0"),
        ({"lowest": 0.0}, r"search.lowest must be above 0 and finite, found 0.0"),
        ({"lowest": 0.1}, r"found 0.1 and 0.1"),
        ({"batch_sizes": []}, r"search.batch_sizes: expected different sizes"),
        ({"batch_sizes": [8, 8]}, r"search.batch_sizes: expected different sizes"),
    ],
)
def test_refused_before_any_work(options: dict[str, Any], problem: str, arguments: Arguments, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=problem):
        search(arguments(tmp_path / "s"), what(**options), lambda words: None)
    assert not (tmp_path / "s").exists()


def test_a_search_on_a_machine_that_did_not_run_the_first_trial(arguments: Arguments, tmp_path: Path) -> None:
    """Or whose first trial diverged, after which its folder is deleted. The storage is elsewhere."""
    (tmp_path / "s" / "trial-001").mkdir(parents=True)
    storage = f"sqlite:///{tmp_path / 'trials.db'}"
    result = search(arguments(tmp_path / "s"), what(trials=1, storage=storage), lambda line: None)
    assert len(result["trials"]) == 1


def test_a_resumed_trial_is_compared_with_the_same_evaluations_of_others() -> None:
    """Its first evaluation after a kill is the third of the run. Runs with other seeds are not reported, and a pruned
    trial stops all of them."""
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=0.5))
    trial = study.ask()
    message = _Message(RunArguments(seeds=[3, 4]))
    report = _ReportToOptuna(trial, message)
    args = SimpleNamespace(metric_for_best_model="accuracy", seed=3)
    state = TrainerState(global_step=30, max_steps=90)
    state.log_history = [{"step": step, "eval_accuracy": 0.8} for step in (10, 20, 30)]
    control = TrainerControl()
    for seed in (4, 3, 3):
        args.seed = seed
        report.on_evaluate(args, state, control, metrics={"eval_accuracy": 0.8})
    assert study.trials[0].intermediate_values == {1: 0.8, 2: 0.8, 3: 0.8}
    assert not control.should_training_stop
    state.global_step = 40
    report.on_evaluate(args, state, control, metrics={"eval_accuracy": 0.1})
    assert control.should_training_stop
    other = TrainerControl()
    args.seed = 4
    report.on_evaluate(args, state, other, metrics={"eval_accuracy": 0.9})
    assert other.should_training_stop
    assert study.trials[0].intermediate_values == {1: 0.8, 2: 0.8, 3: 0.8, 4: 0.1}
    assert study.trials[0].user_attrs["pruned"]
    again = TrainerControl()  # killed and resumed
    args.seed = 3
    _ReportToOptuna(trial, replace(message, pruned=True)).on_evaluate(args, state, again, metrics={"eval_accuracy": 1})
    assert again.should_training_stop


def test_a_dead_trial_is_queued_once() -> None:
    """Two searches that start at the same time both find it."""
    study = optuna.create_study()
    trial = study.ask()
    trial.suggest_float("learning_rate", 1e-3, 1e-1)
    for name, value in {"process": process_identity(), "folder": "trial-000", "pruned": True}.items():
        trial.set_user_attr(name, value)
    found = study.get_trials()
    second = SimpleNamespace(
        get_trials=lambda states: found, _storage=study._storage, tell=study.tell, enqueue_trial=study.enqueue_trial
    )
    for one in (study, second):
        _requeue_interrupted(one)
    (queued,) = study.get_trials(states=(optuna.trial.TrialState.WAITING,))
    assert queued.user_attrs == {"folder": "trial-000", "pruned": True}
