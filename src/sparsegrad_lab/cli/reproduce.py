"""`sparsegrad reproduce`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..run.parsing import add_quiet, make_parser
from ..run.processes import work_alone

if TYPE_CHECKING:
    from ..study.experiment import Cell, Experiment

EXAMPLE = (
    "sparsegrad reproduce comparison --tasks glue/rte --methods sparsegrad,lora; prints a line per run and writes "
    "results/, which sparsegrad report reads. The same command resumes an interrupted study. Run it several times at "
    "once to share the runs: on one machine, also with torchrun, or with --storage on several."
)


def main(argv: list[str]) -> None:
    """List the experiments, or run some of them."""
    parser = make_parser(
        "reproduce",
        "Run experiments. Each compares methods on tasks, over several seeds, after a learning rate search of the same "
        "size for every method. Without a name: list the experiments.",
        EXAMPLE,
    )
    parser.add_argument("experiments", type=str, nargs="*", help='names of experiments, or "all"')
    parser.add_argument("--scale", type=str, default="cpu",
                        help="cpu: a small model; paper: the models of the paper, on a GPU")  # fmt: skip
    parser.add_argument("--results", type=str, default="results", help="folder for the result files")
    parser.add_argument("--runs", type=str, default="runs/study", help="folder for the runs")
    parser.add_argument("--storage", type=str, default=None,
                        help="database for several machines, postgresql://...; default: files in --runs")  # fmt: skip
    for name in ("methods", "tasks", "seeds"):
        parser.add_argument(f"--{name}", type=str, default=None, help=f"run these {name} only, separated by commas")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per run; default: PyTorch's choice")
    parser.add_argument("--retry", action="store_true", help="repeat failed runs, and runs whose settings have changed")
    parser.add_argument("--folder", type=str, default=None,
                        help="folder with your own experiments and a default.yaml")  # fmt: skip
    add_quiet(parser)
    options = parser.parse_args(argv)
    work_alone()
    from ..study.experiment import SHIPPED, experiment_names, load_experiment

    folder = SHIPPED if options.folder is None else Path(options.folder)
    names = experiment_names(folder, options.scale)
    chosen = names if options.experiments == ["all"] else options.experiments
    experiments = [load_experiment(name, options.scale, folder) for name in chosen]
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if not experiments:
        console.print(_overview([load_experiment(name, options.scale, folder) for name in names]))
        own = "" if options.folder is None else f" --folder {shlex.quote(options.folder)}"
        console.print(f"\nnext:   sparsegrad reproduce {names[0]} --scale {options.scale}{own}")
        return
    keep = _selection(options, experiments)
    from ..run.machine import slow_precision_warning
    from ..study.grid import Places, reproduce
    from ..study.progress import GridProgress

    cells = [cell for experiment in experiments for cell in experiment.cells() if keep(cell)]
    for precision in {cell.settings(cell.trial).get("training", {}).get("precision", "fp32") for cell in cells}:
        if warning := slow_precision_warning(precision):
            console.print(f"{warning}. The experiments set this precision; --folder runs experiments of your own")
    places = Places(Path(options.results), Path(options.runs), options.storage)
    with GridProgress(None if options.quiet else console) as progress:
        results = reproduce(
            experiments, places, keep=keep, threads=options.threads, retry=options.retry, progress=progress
        )
    failed = [name for name, result in results.items() if result["status"] != "finished"]
    console.print(f"\n{len(results)} runs, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    console.print(f"results: {places.results}\nnext:   sparsegrad report {shlex.quote(str(places.results))}")


def _overview(experiments: Sequence[Experiment]) -> Table:
    table = Table("experiment", "runs", "question", box=None)
    for experiment in experiments:
        table.add_row(experiment.name, str(len(list(experiment.cells()))), experiment.question)
    return table


def _selection(options: Any, experiments: Sequence[Experiment]) -> Callable[[Cell], bool]:
    """Return a function that tells whether a run is selected by --methods, --tasks and --seeds.

    Raises:
        ValueError: an option names something that no experiment has.
    """
    known = {
        "methods": {method for experiment in experiments for method in experiment.methods},
        "tasks": {task for experiment in experiments for task in experiment.tasks},
        "seeds": {str(seed) for experiment in experiments for seed in experiment.seeds},
    }
    selected: dict[str, set[str]] = {}
    for name, names in known.items():
        given = getattr(options, name)
        selected[name] = names if given is None else {word.strip() for word in given.split(",")}
        if unknown := selected[name] - names:
            raise ValueError(
                f"--{name}: expected some of {', '.join(sorted(names))}; found {', '.join(sorted(unknown))}"
            )
    return lambda cell: (
        cell.method in selected["methods"]
        and cell.task in selected["tasks"]
        # The trials of a search have a seed of their own.
        and (cell.trial is not None or str(cell.seed) in selected["seeds"])
    )
