"""`sparsegrad train`."""

from __future__ import annotations

import shlex
from statistics import fmean, stdev
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from ..methods.registry import find_method
from ..run.folder import RunFolder, output_folder
from ..run.parsing import VerbParser, run_arguments, run_parser
from ..run.processes import is_rank0
from ..run.settings import RunArguments
from ..tasks.task import display_name

EXAMPLE = (
    "sparsegrad train --task glue/rte --method lora --training.epochs 3 --output runs/rte-lora; prints a line per "
    "evaluation, then the best score, times, memory and the next command. The same command resumes an interrupted run. "
    "--config FILE reads these settings from YAML; command-line values override the file."
)

_SHOWN_CLASSES = 20


def parse(argv: list[str]) -> RunArguments:
    """Return the settings: the preset's, overridden by the config file's, overridden by the command line's."""
    return run_arguments(_options(_parser(argv), argv))


def _parser(argv: list[str]) -> VerbParser:
    return run_parser("train", RunArguments.__doc__ or "", EXAMPLE, argv)


def _options(parser: VerbParser, argv: list[str]) -> dict[str, Any]:
    return vars(parser.instantiate(parser.parse_args(argv)))


def main(argv: list[str]) -> None:
    """Train, then print the result and the next command."""
    parser = _parser(argv)
    options = _options(parser, argv)
    arguments = run_arguments(options)
    arguments.check(parser.given)
    output = output_folder(arguments)
    if is_rank0() and len(arguments.seeds) == 1:
        RunFolder(output).check(arguments)
    from ..run.train import train

    print_results(train(arguments, progress=not options["quiet"]), str(output))
    if arguments.push_to_hub is not None:
        print(f"uploaded to the hub: {arguments.push_to_hub}")


def print_results(results: list[dict[str, Any]], output: str) -> None:
    """Print scores, trained entries, times and memory of one run per seed."""
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    for result in results:
        entries = result["trained_entries"]
        where = "adapter" if find_method(result["method"]).leaves == "adapter" else "adapted layers"
        console.print(
            f"\n{result['task']}, {result['method']}, seed {result['seed']}: {display_name(result['metric'])} "
            f"{result['score']:.4f} (step {result['best_step']} of {result['steps']})\n"
            f"  trained entries: {entries['adapter']:,} in the {where}, {entries['all']:,} in all; saved: "
            f"{result['weights_bytes'] / 1e6:.1f} MB"
        )
        if by_class := result.get("by_class"):
            console.print(class_table(by_class["classes"]))
        for doubt in result.get("doubts", ()):
            console.print(f"  check this run: {doubt}")
        if result["calibration"] is not None:
            console.print(f"  calibration: {_cost(result['calibration'])}")
        console.print(f"  training: {_cost(result['training'])}")
    folder = output
    if len(results) > 1:
        scores = [result["score"] for result in results]
        console.print(f"\nover {len(scores)} seeds: {fmean(scores):.4f} ± {stdev(scores):.4f}")
        folder = f"{output}/seed-{results[0]['seed']}"
    console.print(f"\nfolder: {output}\nnext:   sparsegrad evaluate {shlex.quote(folder)}")


def class_table(classes: dict[str, dict[str, float]]) -> Table:
    """Return precision, recall and F1 of each class, the worst F1 first, of at most twenty classes."""
    table = Table("class", *(Column(name, justify="right") for name in ("precision", "recall", "F1", "rows")), box=None)
    for name, scores in sorted(classes.items(), key=lambda item: item[1]["f1"])[:_SHOWN_CLASSES]:
        table.add_row(name, *(f"{scores[key]:.4f}" for key in ("precision", "recall", "f1")), f"{scores['rows']:,}")
    if len(classes) > _SHOWN_CLASSES:
        table.add_row(f"... and {len(classes) - _SHOWN_CLASSES} more in result.json")
    return table


def _cost(phase: dict[str, Any]) -> str:
    return f"{phase['seconds']:.0f} s, peak memory {phase['extra_memory_bytes'] / 1e6:,.0f} MB above its start"
