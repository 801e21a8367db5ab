"""Search the learning rate and the batch size with Optuna. Every trial is a run in a folder of its own.

Of several processes (`torchrun`), rank 0 asks Optuna and tells the others what to train; all train each trial together.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.exceptions import UpdateFinishedTrialError
from optuna.samplers import TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState
from transformers import TrainerCallback

from ..tasks.registry import kind_of
from ..tasks.task import LANGUAGE, display_name
from .checkpoints import writing
from .exit_codes import ExitCode, exit_code_of
from .folder import files_of_rows, output_folder
from .machine import slow_precision_warning
from .plots import plot_search
from .process_identity import is_alive, is_on_this_host, process_identity
from .processes import from_rank0, is_rank0, joined
from .settings import WITHOUT_EFFECT, RunArguments, SearchArguments, flat
from .train import train
from .whole_files import check_writable, content_of, write_whole

_SEARCHED = (*WITHOUT_EFFECT, "training.learning_rate", "training.batch_size")
"Settings that differ between the trials."
_SEARCH_FILES = ("trials.journal", "search.json", "trial-*")
"The folder of a search holds at least one of these."
_FAILED_TRIAL = (ExitCode.DIVERGED, ExitCode.OUT_OF_MEMORY)
"Ends of a run that count as a trial."
_STATES = {"COMPLETE": "complete", "PRUNED": "cut short", "RUNNING": "under way"}


def search(
    arguments: RunArguments, what: SearchArguments, say: Callable[[str], None] = print, *, progress: bool = False
) -> dict[str, Any]:
    """Run trials until there are as many as asked for. Trials of an earlier call in the same folder count.

    Writes `best.yaml` (for `sparsegrad train --config`), `search.json` with every trial, and `search.png` into the
    output folder. An interrupted search continues: an interrupted trial is resumed.

    Args:
        arguments: settings of all trials. Learning rate and batch size are chosen by the search.
        what: the search's settings.
        say: prints a line per trial.
        progress: show each trial's progress bar.

    Returns:
        The content of `search.json`: "best", "trials" and "settings".

    Raises:
        RefusedError: the settings are not valid.
        ValueError: no trial finished.
        FileExistsError: the folder or the storage holds another search.
    """
    what.check()
    arguments.check()
    with joined():
        if not is_rank0():
            return _follow()
        try:
            result = _search(arguments, what, say, progress)
        except Exception as error:
            from_rank0(_Message(error=error))
            raise
        from_rank0(_Message(result=result))
        return result


@dataclass(frozen=True)
class _Message:
    """From rank 0 to the other processes: what to train, or how the search ended."""

    arguments: RunArguments | None = None
    pruned: bool = False
    result: dict[str, Any] | None = None
    error: Exception | None = None


def _follow() -> dict[str, Any]:
    """Train what rank 0 says, until the search has ended."""
    while True:
        message: _Message = from_rank0(None)
        if message.error is not None:
            vars(message.error)["of_all"] = True
            raise message.error
        if message.result is not None:
            return message.result
        assert message.arguments is not None
        try:
            train(message.arguments, progress=False, callbacks=[_ReportToOptuna(None, message)])
        except Exception as error:
            if exit_code_of(error) not in _FAILED_TRIAL:
                raise


def _search(
    arguments: RunArguments, what: SearchArguments, say: Callable[[str], None], progress: bool
) -> dict[str, Any]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if warning := slow_precision_warning(arguments.training.precision):
        say(warning)
    higher = kind_of(arguments.task) != LANGUAGE
    folder = output_folder(arguments)
    check_writable(folder)
    if content_of(folder) and not any(any(folder.glob(name)) for name in _SEARCH_FILES):
        raise FileExistsError(f"{folder} is not empty and holds no search; choose another output folder")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        study = optuna.create_study(
            study_name=f"{arguments.task}, {arguments.method}, {arguments.model}",
            storage=what.storage or journal(folder / "trials.journal"),
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5) if what.prune else optuna.pruners.NopPruner(),
            direction="maximize" if higher else "minimize",
            load_if_exists=True,
        )
        _check_same(study, arguments, what)
        _requeue_interrupted(study)
        while len(_counted(study)) < what.trials:
            _run_trial(study, _ask(study, what), arguments, folder, say, progress)
        return _write_results(study, arguments, folder, higher)


def journal(path: Path) -> JournalStorage:
    """Optuna storage in a file that several processes can share."""
    return JournalStorage(JournalFileBackend(str(path), lock_obj=JournalFileOpenLock(str(path))))


def _check_same(study: optuna.Study, arguments: RunArguments, what: SearchArguments) -> None:
    """Raise FileExistsError if the study was started with other settings."""
    settings = {**flat(arguments.as_dict()), **{f"search.{name}": value for name, value in asdict(what).items()}}
    for name in (*_SEARCHED, "search.trials", "search.storage"):
        settings.pop(name)
    settings |= {f"rows of {name}": f"SHA-256 {sha[:12]}..." for name, sha in files_of_rows(arguments).items()}
    there = study.user_attrs.get("settings")
    if there is None:
        study.set_user_attr("settings", settings)
        return
    # A search of an earlier version does not name its rows.
    differing = [name for name in settings if there.get(name, settings[name]) != settings[name]]
    if differing:
        found = ", ".join(f"{name} ({there.get(name)} there, {settings[name]} here)" for name in differing)
        raise FileExistsError(
            f"{arguments.output} holds another search, which differs in {found}; choose another output folder"
        )


def _requeue_interrupted(study: optuna.Study) -> None:
    """Queue the trials of dead processes again. Their folders have checkpoints to resume from."""
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get("process")
        if process is None or not is_on_this_host(process):
            continue
        if process == process_identity() or not is_alive(process):
            try:
                study._storage.set_trial_user_attr(trial._trial_id, "error", "interrupted")
                study.tell(trial.number, state=TrialState.FAIL)
            except (UpdateFinishedTrialError, ValueError):
                continue  # another process has queued it
            if trial.params:
                kept = {name: value for name, value in trial.user_attrs.items() if name in ("folder", "pruned")}
                study.enqueue_trial(trial.params, user_attrs=kept)


def _counted(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that have ended or are running. An interrupted trial is not counted; it runs again as another one."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state != TrialState.WAITING and trial.user_attrs.get("error") != "interrupted"
    ]


def _ask(study: optuna.Study, what: SearchArguments) -> Trial:
    """The next trial, with its parameters drawn."""
    trial = study.ask()
    trial.set_user_attr("process", process_identity())
    # Each trial has a sampler of its own: processes that share a search would otherwise draw the same values.
    study.sampler = TPESampler(seed=what.sampler_seed + trial.number)
    trial.suggest_float("learning_rate", what.lowest, what.highest, log=True)
    trial.suggest_categorical("batch_size", what.batch_sizes)
    trial.set_user_attr("folder", trial.user_attrs.get("folder") or f"trial-{trial.number:03d}")
    return trial


def _run_trial(
    study: optuna.Study, trial: Trial, arguments: RunArguments, folder: Path, say: Callable[[str], None], progress: bool
) -> None:
    """Train with a trial's parameters, and tell Optuna the result."""
    single = copy.deepcopy(arguments)
    single.training.learning_rate = _rounded(trial.params["learning_rate"])
    single.training.batch_size = trial.params["batch_size"]
    single.output = str(folder / trial.user_attrs["folder"])
    single.push_to_hub = None
    name = f"trial {trial.number}: learning rate {single.training.learning_rate:g}, batch {single.training.batch_size}"
    # Optuna sees the evaluations of the first seed. The other seeds count only in the final score.
    message = _Message(arguments=single, pruned=trial.user_attrs.get("pruned", False))
    report = _ReportToOptuna(trial, message)
    from_rank0(message)
    try:
        results = train(single, progress=progress, callbacks=[report])
    except Exception as error:
        code = exit_code_of(error)
        if code not in _FAILED_TRIAL:
            raise
        trial.set_user_attr("error", code.status)
        study.tell(trial, state=TrialState.FAIL)
        shutil.rmtree(single.output, ignore_errors=True)
        say(f"{name}: {code.status}")
        return
    score = sum(result["selection_score"] for result in results) / len(results)
    trial.set_user_attr("score", score)
    trial.set_user_attr("metric", results[0]["metric"])
    trial.set_user_attr("seconds", sum(result["training"]["seconds"] for result in results))
    for weights in (*Path(single.output).rglob("adapter"), *Path(single.output).rglob("model")):
        shutil.rmtree(weights, ignore_errors=True)  # only the scores are needed
    if report.pruned:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, score)
    say(f"{name}: {display_name(results[0]['metric'])} {score:.4f}{', stopped early' if report.pruned else ''}")


class _ReportToOptuna(TrainerCallback):
    """Reports the scores of a trial to Optuna, and stops the run if Optuna prunes it.

    Args:
        trial: None on the processes that follow rank 0.
        message: what is trained. The scores of its first seed are reported.
    """

    def __init__(self, trial: Trial | None, message: _Message) -> None:
        assert message.arguments is not None
        self.trial, self.seed = trial, message.arguments.seeds[0]
        self.pruned = message.pruned
        self._reported_steps: set[int] = set()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the score under the number of the evaluation: trials with small batches have more steps an epoch."""
        if self.pruned:  # a run with another seed
            control.should_training_stop = True
            return
        name = f"eval_{args.metric_for_best_model}"
        score = kwargs["metrics"].get(name)
        if score is None or args.seed != self.seed or state.global_step in self._reported_steps:
            return
        scores = {entry["step"]: entry[name] for entry in state.log_history if name in entry}  # those before a kill too
        scores[state.global_step] = score
        prune = False
        if self.trial is not None:
            for number, (step, value) in enumerate(sorted(scores.items()), 1):
                if step not in self._reported_steps:
                    self.trial.report(value, number)
            prune = state.global_step < state.max_steps and self.trial.should_prune()
            if prune:
                self.trial.set_user_attr("pruned", True)  # a resumed trial stays pruned
        self._reported_steps.update(scores)
        if from_rank0(prune):
            self.pruned = control.should_training_stop = True


def _write_results(study: optuna.Study, arguments: RunArguments, folder: Path, higher: bool) -> dict[str, Any]:
    """Write best.yaml, search.json and search.png."""
    trials = [_describe(trial) for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.WAITING]
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        raise ValueError(f"{folder}: none of the {len(trials)} trials finished; lower search.highest")
    best = max(complete, key=lambda trial: trial["score"] if higher else -trial["score"])
    settings = arguments.as_dict()
    settings["training"] |= {name: best[name] for name in ("learning_rate", "batch_size")}
    settings["output"] = str(folder / "best")
    write_whole(
        folder / "best.yaml",
        f"# The best of {len(_counted(study))} trials, score {best['score']:.4f}: sparsegrad train --config best.yaml\n"
        + yaml.safe_dump(settings, sort_keys=False),
    )
    result = {"best": best, "trials": trials, "settings": study.user_attrs["settings"]}
    write_whole(folder / "search.json", json.dumps(result, indent=2) + "\n")
    write_whole(folder / "search.png", plot_search(trials, f"{arguments.task}, {arguments.method}"))
    return result


def _describe(trial: FrozenTrial) -> dict[str, Any]:
    """A trial's entry in search.json."""
    return {
        "number": trial.number,
        "learning_rate": _rounded(trial.params["learning_rate"]) if trial.params else None,
        "batch_size": trial.params.get("batch_size"),
        "state": trial.user_attrs.get("error") or _STATES.get(trial.state.name, "failed"),
        "score": trial.user_attrs.get("score"),
        "metric": trial.user_attrs.get("metric"),
        "seconds": trial.user_attrs.get("seconds"),
    }


def _rounded(learning_rate: float) -> float:
    return float(f"{learning_rate:.3g}")
