"""Two tables about a study as a whole: what each experiment has found, and how large the parts of the models are."""

from __future__ import annotations

from collections.abc import Sequence

from ..inspection.inspect import inspect
from ..inspection.shipped_models import FOLDER, PUBLISHED, model_names
from ..run.settings import RunArguments
from .experiment_files import experiment_names, load_experiment
from .sections import Section
from .statistics import by_unit, compare
from .table import Table
from .verdict import verdict

_PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def overview(sections: Sequence[Section]) -> Table | None:
    """A row for each shipped experiment, run or not; None unless several have runs."""
    by_experiment: dict[str, list[Section]] = {}
    for section in sections:
        if section.experiment in experiment_names():
            by_experiment.setdefault(section.experiment, []).append(section)
    if len(by_experiment) < 2:
        return None
    scale = next(found.scale for own in by_experiment.values() for section in own
                 for found in (*section.runs, *section.trials, *section.failures))  # fmt: skip
    rows = []
    for name in experiment_names():
        at_scale = name in experiment_names(scale=scale)
        experiment = load_experiment(name, scale if at_scale else None)
        planned = sum(cell.trial is None for cell in experiment.cells())
        if name in by_experiment:
            own = by_experiment[name]
            outcome = " ".join(_outcome(section, alone=len(own) == 1) for section in own)
            done = [run.seed in section.seeds.get(run.method_name, ()) for section in own for run in section.runs]
            count = f"{sum(done)} of {planned}"
        elif at_scale:
            outcome, count = "not run", f"0 of {planned}"
        else:
            outcome, count = f"not run: its sizes are for scale {experiment.scale}", ""
        rows.append([experiment.title, experiment.question, outcome, count])
    note = "Runs: finished of planned, without learning rate searches. The sections below have the details."
    return Table("Questions and answers", note, ["experiment", "question", "outcome", "runs"], rows)


def _outcome(section: Section, alone: bool) -> str:
    """The ranking of the methods, and the package's default method against the baseline."""
    default = RunArguments().method
    name = [] if alone else [f"{section.title.rpartition(', ')[2]}:"]
    comparisons = []
    if section.scored and section.baseline != default:
        found = [compare(part.runs, default, section.baseline) for part in by_unit(section).values()]
        comparisons = [str(comparison) for comparison in found if comparison.pairs]
    return " ".join([*name, verdict(section)[0], *comparisons])


def parameters() -> Table:
    """Size of each part of the paper's models (Table 1): a row for each model, published numbers in brackets."""
    rows = []
    for name in model_names():
        parts, published = inspect(str(FOLDER / name)).parts, PUBLISHED.get(name, {})
        row = [name, f"{parts.total / 1e6:,.1f}{_brackets(published.get('total'))}"]
        for part in _PARTS:
            count = f"{getattr(parts, part) / 1e6:,.1f} M, {100 * parts.share(part):.1f} %"
            row.append(f"{count}{_brackets(published.get(part))}")
        rows.append(row)
    note = (
        "Parameters in millions and their share of the model, with biases, without a task's head. In brackets: the "
        "paper's numbers (EMNLP 2024, Table 1). `sparsegrad inspect MODEL` has more, for any model."
    )
    header = ["model", "total, M", *(part if part != "mlp" else "MLP" for part in _PARTS)]
    return Table("Parameters by part", note, header, rows)


def _brackets(count: float | None) -> str:
    return "" if count is None else f" ({count / 1e6:,.0f})"
