"""`sparsegrad reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad reproduce comparison --tasks glue/rte --methods sparsegrad,lora; prints a line for each run and writes "
    "results/, which sparsegrad report takes. The same command again goes on where it was interrupted, and several at "
    "once, on one machine or with --storage on several, share the runs."
)


def main(argv: list[str]) -> None:
    """List the experiments, or run some."""
    parser = make_parser(
        "reproduce",
        "Run experiments: each compares methods on tasks, over seeds, after a search of the same size for each method. "
        "Without a name: list them.",
        EXAMPLE,
    )
    parser.add_argument("experiments", type=str, nargs="*", help='names, or "all"')
    parser.add_argument("--scale", type=str, default="cpu", help="cpu: a small model; paper: the paper's own, on a GPU")
    parser.add_argument("--results", type=str, default="results", help="folder of the result files")
    parser.add_argument("--runs", type=str, default="runs/study", help="folder of the runs")
    parser.add_argument("--storage", type=str, default=None,
                        help="postgresql://..., for several machines; default: a file in --runs")  # fmt: skip
    parser.add_argument("--methods", type=str, default=None, help="only these, by comma")
    parser.add_argument("--tasks", type=str, default=None, help="only these, by comma")
    parser.add_argument("--seeds", type=str, default=None, help="only these, by comma; the search's runs aside")
    parser.add_argument("--threads", type=int, default=None, help="of each run; default: PyTorch's choice")
    parser.add_argument(
        "--retry", action="store_true", help="run again what has failed before, or was run with other settings"
    )
    parser.add_argument("--folder", type=str, default=None, help="experiments of your own, with a default.yaml")
    found = parser.parse_args(argv)
    from ..study.experiment import SHIPPED, experiment_names, load_experiment

    folder = SHIPPED if found.folder is None else Path(found.folder)
    names = experiment_names(folder, found.scale)
    chosen = names if found.experiments == ["all"] else found.experiments
    experiments = [load_experiment(name, found.scale, folder) for name in chosen]
    console = Console(highlight=False, soft_wrap=True)
    if not experiments:
        table = Table(box=None)
        for column in ("experiment", "runs", "what it asks"):
            table.add_column(column)
        for name in names:
            experiment = load_experiment(name, found.scale, folder)
            table.add_row(name, str(len(list(experiment.cells()))), experiment.question)
        console.print(table)
        own = "" if found.folder is None else f" --folder {found.folder}"
        console.print(f"\nnext:   sparsegrad reproduce {names[0]} --scale {found.scale}{own}")
        return
    from ..run.machine import slow_precision_warning
    from ..study.grid import Places, reproduce
    from ..study.progress import GridProgress

    keep = _filter(found, experiments)
    cells = [cell for experiment in experiments for cell in experiment.cells() if keep(cell)]
    for precision in {cell.settings(cell.trial).get("training", {}).get("precision", "fp32") for cell in cells}:
        if warning := slow_precision_warning(precision):
            console.print(f"{warning}. It is a setting of the experiments; --folder takes some of your own")
    places = Places(Path(found.results), Path(found.runs), found.storage)
    with GridProgress(console) as reporter:
        results = reproduce(experiments, places, keep=keep, threads=found.threads, retry=found.retry, reporter=reporter)
    failed = [name for name, result in results.items() if result["status"] != "finished"]
    console.print(
        f"\n{len(results)} runs, {len(failed)} of them failed{': ' if failed else ''}{', '.join(failed)}\n"
        f"results: {places.results}\nnext:   sparsegrad report {places.results}"
    )


def _filter(found: Any, experiments: Any) -> Any:
    """Which runs are wanted; a word that names none of them is refused.

    Raises:
        ValueError: see above.
    """
    there = {
        "methods": {method for experiment in experiments for method in experiment.methods},
        "tasks": {task for experiment in experiments for task in experiment.tasks},
        "seeds": {str(seed) for experiment in experiments for seed in experiment.seeds},
    }
    wanted: dict[str, set[str]] = {}
    for name, known in there.items():
        given = getattr(found, name)
        wanted[name] = known if given is None else {word.strip() for word in given.split(",")}
        if unknown := wanted[name] - known:
            raise ValueError(
                f"--{name}: expected some of {', '.join(sorted(known))}; found {', '.join(sorted(unknown))}"
            )
    return lambda cell: (
        cell.method in wanted["methods"]
        and cell.task in wanted["tasks"]
        and (cell.trial is not None or str(cell.seed) in wanted["seeds"])
    )
