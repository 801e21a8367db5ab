"""All experiments of a study and what came out, a row each: also those that were not run."""

from __future__ import annotations

from collections.abc import Sequence

from .experiment import experiment_names, load_experiment
from .results import Section
from .tables import Table
from .verdict import verdict


def overview(sections: Sequence[Section]) -> Table | None:
    """Experiments down; None unless several of the shipped ones have runs."""
    of: dict[str, list[Section]] = {}
    for section in sections:
        if section.experiment in experiment_names():
            of.setdefault(section.experiment, []).append(section)
    if len(of) < 2:
        return None
    found = next(one for some in of.values() for one in some if one.runs or one.trials or one.failures)
    scale = next(one.result["scale"] for some in (found.runs, found.trials, found.failures) for one in some)
    rows = []
    for name in experiment_names():
        here = name in experiment_names(scale=scale)
        experiment = load_experiment(name, scale if here else "paper")
        planned = sum(cell.trial is None for cell in experiment.cells())
        if name in of:
            outcome = " ".join(_outcome(section, alone=len(of[name]) == 1) for section in of[name])
            count = f"{sum(len(section.runs) for section in of[name])} of {planned}"
        elif here:
            outcome, count = "not run", f"0 of {planned}"
        else:
            outcome, count = f"not run: its sizes are those of scale {experiment.scale}", ""
        rows.append([experiment.title, experiment.question, outcome, count])
    note = "Runs: those whose scores count, without the search's. The sections below say more of each that was run."
    return Table("Questions and answers", note, ["experiment", "question", "outcome", "runs"], rows, {})


def _outcome(section: Section, alone: bool) -> str:
    """The order of the methods, and how sure SparseGrad's place in it is."""
    said = verdict(section)
    sure = [words for words in said[1:] if words.startswith("sparsegrad against ")]
    return " ".join([*([] if alone else [f"{section.title.rpartition(', ')[2]}:"]), said[0], *sure])
