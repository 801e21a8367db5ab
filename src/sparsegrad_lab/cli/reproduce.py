"""`sparsegrad reproduce`."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ..run.parsing import VerbParser, add_quiet, make_parser
from ..run.processes import work_alone
from .judge import main as grade

if TYPE_CHECKING:
    from ..study.answers import AnswerFiles
    from ..study.experiment import Cell, Experiment

EXAMPLE = (
    "sparsegrad reproduce glue --tasks glue/rte --methods sparsegrad,lora; prints a line per run and writes "
    "results/, which sparsegrad report reads. The same command resumes an interrupted study. Run it several times at "
    "once to share the runs: on one machine, also with torchrun, or with --storage on several."
)


def main(argv: list[str]) -> None:
    """List the experiments, or run some of them."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected at least 1, found {options.threads}")
    work_alone()
    from ..study.experiment_files import SHIPPED, check_scale, experiment_names, load_experiment

    folder = SHIPPED if options.folder is None else Path(options.folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--folder: there is no folder {folder}")
    check_scale(options.scale, folder)
    names = experiment_names(folder, options.scale)
    if not names:
        raise ValueError(f"{folder} has no experiment for scale {options.scale!r}; expected NAME/experiment.yaml in it")
    chosen = names if options.experiments == ["all"] else options.experiments
    experiments = [load_experiment(name, options.scale, folder) for name in chosen]
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    own = "" if options.folder is None else f" --folder {shlex.quote(options.folder)}"
    if not experiments:
        console.print(_overview([load_experiment(name, options.scale, folder) for name in names]))
        console.print(f"\nnext:   sparsegrad reproduce {names[0]} --scale {options.scale}{own}")
        return
    keep = _selection(options, experiments)
    cells = [cell for experiment in experiments for cell in experiment.cells() if keep(cell)]
    if not cells:
        raise ValueError("--methods, --tasks and --seeds select no run: no experiment has them together")
    answers = _answers(options, experiments)
    from ..run.machine import slow_precision_warning
    from ..study.grid import Places, reproduce
    from ..study.progress import GridProgress

    for precision in {cell.settings(cell.trial).get("training", {}).get("precision", "fp32") for cell in cells}:
        if warning := slow_precision_warning(precision):
            console.print(f"{warning}. The experiments set this precision; --folder runs experiments of your own")
    places = Places(Path(options.results), Path(options.runs), options.storage)
    with GridProgress(None if options.quiet else console) as progress:
        results = reproduce(
            experiments, places, keep=keep, threads=options.threads, retry=options.retry, answers=answers,
            progress=progress,
        )  # fmt: skip
    failed = [name for name, result in results.items() if result["status"] != "finished"]
    console.print(f"\n{len(results)} runs, {len(failed)} failed{': ' if failed else ''}{', '.join(failed)}")
    if answers is not None:
        asked = [cell for experiment in experiments for cell in experiment.cells() if cell.answers]
        _finish_answers(answers, asked, [cell for cell in cells if cell.answers], options.judge, console)
    elif any(cell.answers for cell in cells):
        console.print("answers: not run; name a file with --questions")
    console.print(f"results: {places.results}\nnext:   sparsegrad report {shlex.quote(str(places.results))}{own}")


def _parser() -> VerbParser:
    parser = make_parser(
        "reproduce",
        "Run experiments. Each compares methods on tasks, over several seeds. First it searches each method's learning "
        "rate, with equally many rates at the start. Then it runs the seeds.",
        EXAMPLE,
    )
    parser.add_argument("experiments", type=str, nargs="*", help='names of experiments, or "all"; default: list them')
    parser.add_argument("--scale", type=str, default="cpu",
                        help="cpu: a small model; paper: the models of the paper, on a GPU")  # fmt: skip
    parser.add_argument("--results", type=str, default="results", help="folder for the result files")
    parser.add_argument("--runs", type=str, default="runs/study", help="folder for the runs")
    parser.add_argument("--storage", type=str, default=None,
                        help="database for several machines, postgresql+psycopg://user:password@host/name; default: "
                        "files in --runs")  # fmt: skip
    for name in ("methods", "tasks", "seeds"):
        parser.add_argument(f"--{name}", type=str, default=None, help=f"run these {name} only, separated by commas")
    parser.add_argument("--questions", type=str | None, default=None,
                        help="conversations: questions in the form of MT-Bench, which the models of one seed answer; "
                        "default: mt_bench/mt_bench_inf.jsonl in $SPARSEGRAD_DATA, if it is there")  # fmt: skip
    parser.add_argument("--question_count", type=int | None, default=None,
                        help="answer this many of the questions, evenly spaced; default: all")  # fmt: skip
    parser.add_argument("--judge", type=str | None, default=None,
                        help="model that grades the answers, see sparsegrad judge; default: no grades")  # fmt: skip
    parser.add_argument("--threads", type=int, default=None, help="CPU threads per run; default: PyTorch's choice")
    parser.add_argument("--retry", action="store_true", help="repeat failed runs, and runs whose settings have changed")
    parser.add_argument("--folder", type=str, default=None,
                        help="folder with your own experiments and a default.yaml")  # fmt: skip
    add_quiet(parser)
    return parser


def _answers(options: Any, experiments: Sequence[Experiment]) -> AnswerFiles | None:
    """Return the questions that models answer; None if there are none.

    Raises:
        ValueError: an option has no use, or the judge has no key.
    """
    asked = [experiment for experiment in experiments if experiment.answers is not None]
    given = [name for name in ("questions", "question_count", "judge") if getattr(options, name) is not None]
    if given and not asked:
        raise ValueError(f"--{given[0]} is for experiments whose models answer questions, such as conversations")
    source = Path(options.questions or _default_questions())
    if options.questions is None and not (asked and source.is_file()):
        if given:
            raise ValueError(f"--{given[0]} needs --questions")
        return None
    from ..chat.endpoint import Endpoint
    from ..study.answers import AnswerFiles

    if options.judge is not None:
        Endpoint(options.judge)  # a missing key is found before hours of training
    answers = AnswerFiles(Path(options.results), source, options.question_count)
    for experiment in asked:
        answers.write_questions(experiment)
    return answers


def _default_questions() -> Path:
    """Return the file of MT-Bench-Inf in $SPARSEGRAD_DATA, which may not exist."""
    return Path(os.environ.get("SPARSEGRAD_DATA", "")) / "mt_bench" / "mt_bench_inf.jsonl"


def _finish_answers(
    answers: AnswerFiles, asked: Sequence[Cell], cells: Sequence[Cell], judge: str | None, console: Console
) -> None:
    """Grade the answers, write the page, and name the runs without answers.

    Args:
        answers: the files of answers.
        asked: every run of the experiments whose model is to answer; the page has all answers that exist.
        cells: the runs among them that this call was asked for; those without answers are named.
        judge: model that grades; None: no grades.
        console: gets the messages.
    """
    for together in answers.sets(asked):
        if judge is None:
            page = answers.write_page(together, "Not graded: name a judge with --judge, or run sparsegrad judge.")
            console.print(f"answers: {page}; not graded, since no --judge was named")
            continue
        files = [str(answers.file(cell)) for cell in together]
        questions = str(answers.questions_file(together[0].experiment))
        page = answers.page(together[0])
        grade([*files, "--questions", questions, "--model", judge, "--page", str(page)])
    if lacking := [cell.name for cell in cells if answers.lacks(cell)]:
        console.print(f"no answers of {', '.join(lacking)}; --retry runs them again")


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
        "seeds": {
            str(seed) for experiment in experiments for own in experiment.seeds_by_method.values() for seed in own
        },
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
