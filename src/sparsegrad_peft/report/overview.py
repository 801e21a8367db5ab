"""All experiments of a study and what came out, a row each: also those that were not run."""

from __future__ import annotations

from collections.abc import Sequence

from ..study.experiment import experiment_names, load_experiment
from .results import Section
from .tables import Table
from .verdict import verdict


def overview(sections: Sequence[Section]) -> Table | None:
    """Experiments down; None unless several of the shipped ones have runs."""
    of = {section.name: section for section in sections if section.name in experiment_names()}
    if len(of) < 2:
        return None
    found = next(iter(of.values()))
    scale = next(one.result["scale"] for some in (found.runs, found.trials, found.failures) for one in some)
    rows = []
    for name in experiment_names():
        here = name in experiment_names(scale=scale)
        experiment = load_experiment(name, scale if here else "paper")
        planned = sum(cell.trial is None for cell in experiment.cells())
        if name in of:
            outcome, count = verdict(of[name])[0], f"{len(of[name].runs)} of {planned}"
        elif here:
            outcome, count = "not run", f"0 of {planned}"
        else:
            outcome, count = f"not run: its sizes are those of scale {experiment.scale}", ""
        rows.append([experiment.title, experiment.question, outcome, count])
    note = "Runs: those whose scores count, without the search's. The sections below say more of each that was run."
    return Table("Questions and answers", note, ["experiment", "question", "outcome", "runs"], rows, {})
