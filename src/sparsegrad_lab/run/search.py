"""Learning rate and batch size of a method on a task, by Optuna: every trial is a run, in a folder of its own."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from ..tasks.registry import kind_of
from .folder import RunFolder, write_whole
from .picture import search_picture
from .process_identity import is_alive, is_here, mark
from .settings import RunArguments, SearchArguments, flat

# What a search tries; the rest of the settings is the same in all of its trials.
_SEARCHED = ("output", "training.learning_rate", "training.batch_size")

_OWN = ("trials.journal", "search.json", "trial-000")
"What the folder of a search holds, one of these at least."


def search(
    arguments: RunArguments, what: SearchArguments, say: Callable[[str], None] = print, *, progress: bool = False
) -> dict[str, Any]:
    """Run trials until there are as many as asked for; those that are there already count.

    The output folder then holds `best.yaml`, which `sparsegrad train --config` takes, `search.json` with every trial,
    and `search.png`. Interrupted, it goes on where it was: a trial that was under way is run to its end.

    Args:
        arguments: of all trials; learning rate and batch size are the search's.
        what: what is tried.
        say: takes a line for each trial.
        progress: show each trial's own progress.

    Returns:
        What `search.json` holds: "best", "trials".

    Raises:
        ValueError: settings that are not valid; no trial came to its end.
        FileExistsError: the folder or storage holds another search.
    """
    import optuna

    what.check()
    arguments.check()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    from ..tasks.metrics import metrics_for
    from ..tasks.task import higher_is_better
    from .precision import slow_precision
    from .train import output_folder

    if slow := slow_precision(arguments.training.precision):
        say(slow)
    # All metrics for a kind of task have one direction.
    higher = higher_is_better(metrics_for((), kind_of(arguments.task))[0])
    folder = output_folder(arguments)
    RunFolder(folder).check_writable()
    if folder.is_dir() and not any((folder / name).exists() for name in _OWN) and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty and holds no search; choose another output folder")
    folder.mkdir(parents=True, exist_ok=True)
    study = optuna.create_study(
        study_name=f"{arguments.task}, {arguments.method}, {arguments.model}",
        storage=what.storage or journal(folder / "trials.journal"),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5) if what.prune else optuna.pruners.NopPruner(),
        direction="maximize" if higher else "minimize",
        load_if_exists=True,
    )
    _check_same(study, arguments, what)
    _take_up_interrupted(study)
    while len(_counted(study)) < what.trials:
        _one(study, study.ask(), arguments, what, folder, say, progress)
    return _finish(study, arguments, folder, higher)


def journal(path: Path) -> Any:
    """Optuna's storage in a file that several processes can share."""
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock

    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _check_same(study: Any, arguments: RunArguments, what: SearchArguments) -> None:
    settings = {**flat(arguments.as_dict()), **{f"search.{name}": value for name, value in asdict(what).items()}}
    for name in (*_SEARCHED, "search.trials", "search.storage"):
        settings.pop(name)
    there = study.user_attrs.get("settings")
    if there is None:
        study.set_user_attr("settings", settings)
        return
    other = [name for name in settings if there.get(name) != settings[name]]
    if other:
        found = ", ".join(f"{name} ({there.get(name)} there, {settings[name]} here)" for name in other)
        raise FileExistsError(f"{arguments.output} holds another search, which differs in {found}; name another output")


def _take_up_interrupted(study: Any) -> None:
    """A trial whose process is gone is put in line again; its folder has its checkpoints."""
    from optuna.trial import TrialState

    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get("process")
        if process is not None and is_here(process) and (process == mark() or not is_alive(process)):
            if trial.params:
                folder = trial.user_attrs.get("folder")
                study.enqueue_trial(trial.params, user_attrs={"folder": folder} if folder else None)
            study._storage.set_trial_user_attr(trial._trial_id, "error", "interrupted")
            study.tell(trial.number, state=TrialState.FAIL)


def _counted(study: Any) -> list[Any]:
    """Trials that are over or under way; one that was interrupted is run again as another."""
    from optuna.trial import TrialState

    return [
        trial for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and trial.user_attrs.get("error") != "interrupted"
    ]  # fmt: skip


def _one(
    study: Any, trial: Any, arguments: RunArguments, what: SearchArguments, folder: Path, say: Callable[[str], None],
    progress: bool,
) -> None:  # fmt: skip
    import torch
    from optuna.samplers import TPESampler
    from optuna.trial import TrialState

    from sparsegrad_peft.tuner.trainer import TrainingDivergedError

    from .train import train

    trial.set_user_attr("process", mark())
    # A sampler for each trial: processes that share a search would otherwise draw the same.
    study.sampler = TPESampler(seed=what.sampler_seed + trial.number)
    drawn = trial.suggest_float("learning_rate", what.lowest, what.highest, log=True)
    single = copy.deepcopy(arguments)
    single.training.learning_rate = float(f"{drawn:.3g}")
    single.training.batch_size = trial.suggest_categorical("batch_size", what.batch_sizes)
    name = trial.user_attrs.get("folder") or f"trial-{trial.number:03d}"
    trial.set_user_attr("folder", name)
    single.output = str(folder / name)
    words = f"trial {trial.number}: learning rate {single.training.learning_rate:g}, batch {single.training.batch_size}"
    # A score is reported for the first seed's evaluations; with several, the others only count in the end.
    report = _reporter(trial)
    try:
        results = train(single, progress=progress, callbacks=[report])
    except (TrainingDivergedError, torch.OutOfMemoryError, MemoryError) as error:
        reason = "diverged" if isinstance(error, TrainingDivergedError) else "out of memory"
        trial.set_user_attr("error", reason)
        study.tell(trial, state=TrialState.FAIL)
        shutil.rmtree(single.output, ignore_errors=True)
        say(f"{words}: {reason}")
        return
    score = sum(result["score"] for result in results) / len(results)
    trial.set_user_attr("score", score)
    trial.set_user_attr("seconds", sum(result["training"]["seconds"] for result in results))
    for weights in (*Path(single.output).rglob("adapter"), *Path(single.output).rglob("model")):
        shutil.rmtree(weights, ignore_errors=True)  # a search is for the numbers
    if report.pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, score)
    say(f"{words}: {results[0]['metric'].replace('_', ' ')} {score:.4f}{', cut short' if report.pruned else ''}")


def _reporter(trial: Any) -> Any:
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        """Tells Optuna the best score so far, and stops the run if Optuna says so."""

        pruned = False

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            score = kwargs["metrics"].get(f"eval_{args.metric_for_best_model}")
            if score is None or self.pruned or state.global_step in self._reported:
                return
            self._reported.add(state.global_step)
            trial.report(score, len(self._reported))  # not the step: with a small batch, there are more in an epoch
            if state.global_step < state.max_steps and trial.should_prune():
                self.pruned = control.should_training_stop = True

        def __init__(self) -> None:
            self._reported: set[int] = set()

    return Report()


def _finish(study: Any, arguments: RunArguments, folder: Path, higher: bool) -> dict[str, Any]:
    from optuna.trial import TrialState

    trials = [
        {
            "number": trial.number,
            "learning_rate": float(f"{trial.params['learning_rate']:.3g}") if trial.params else None,
            "batch_size": trial.params.get("batch_size"),
            "state": trial.user_attrs.get("error")
            or {"COMPLETE": "complete", "PRUNED": "cut short", "RUNNING": "under way"}.get(trial.state.name, "failed"),
            "score": trial.user_attrs.get("score"),
            "seconds": trial.user_attrs.get("seconds"),
        }
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING
    ]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        raise ValueError(f"{folder}: none of the {len(trials)} trials came to its end; lower search.highest")
    best = max(complete, key=lambda trial: trial["score"] if higher else -trial["score"])
    settings = arguments.as_dict()
    settings["training"] |= {name: best[name] for name in ("learning_rate", "batch_size")}
    settings["output"] = RunArguments().output
    write_whole(
        folder / "best.yaml",
        f"# The best of {len(trials)} trials, score {best['score']:.4f}: sparsegrad train --config {folder}/best.yaml\n"
        + yaml.safe_dump(settings, sort_keys=False),
    )
    result = {"best": best, "trials": trials, "settings": study.user_attrs["settings"]}
    write_whole(folder / "search.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "search.png", search_picture(trials, f"{arguments.task}, {arguments.method}"))
    return result
