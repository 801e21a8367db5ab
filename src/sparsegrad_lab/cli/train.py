"""`sparsegrad train`."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from ..methods.registry import find_method
from ..run.parsing import run_arguments, run_parser
from ..run.settings import RunArguments

EXAMPLE = (
    "sparsegrad train --task glue/rte --method lora --training.epochs 3 --output runs/rte-lora; prints a line for each "
    "evaluation, then the best score, times, memory, and the next command. The same command again goes on where it was "
    "interrupted. --config FILE reads all of this from YAML, and words on the command line come first."
)


def parse(argv: list[str]) -> RunArguments:
    """Words -> arguments: preset, then config file, then the command line, the later one first."""
    parser = run_parser("train", RunArguments.__doc__ or "", EXAMPLE, argv)
    return run_arguments(vars(parser.instantiate(parser.parse_args(argv))))


def main(argv: list[str]) -> None:
    """Train, then say what came out and what to do next."""
    arguments = parse(argv)
    arguments.check()
    from ..run.train import output_folder, train  # PyTorch and transformers: not for --help

    results = train(arguments)
    report(results, str(output_folder(arguments)))


def report(results: list[dict[str, Any]], output: str) -> None:
    """What a user wants to know of a run."""
    from ..tasks.metrics import spread

    console = Console(highlight=False, soft_wrap=True)
    first = results[0]
    for result in results:
        metric = result["metric"].replace("_", " ")
        calibration = result["calibration"]
        console.print(
            f"\n{result['task']}, {result['method']}, seed {result['seed']}: {metric} {result['score']:.4f} "
            f"(step {result['best_step']} of {result['steps']})"
        )
        console.print(
            f"  trained entries: {result['trained_entries']['adapter']:,} in the "
            f"{'adapter' if find_method(result['method']).leaves == 'adapter' else 'adapted layers'}, "
            f"{result['trained_entries']['all']:,} in all; saved: {result['weights_bytes'] / 1e6:.1f} MB"
        )
        if calibration is not None:
            console.print(f"  calibration: {_took(calibration)}")
        console.print(f"  training: {_took(result['training'])}")
    if len(results) > 1:
        mean, deviation = spread([result["score"] for result in results])
        console.print(f"\nover {len(results)} seeds: {mean:.4f} ± {deviation:.4f}")
    folder = output if len(results) == 1 else f"{output}/seed-{first['seed']}"
    console.print(f"\nfolder: {output}\nnext:   sparsegrad evaluate {folder}")


def _took(phase: dict[str, Any]) -> str:
    return f"{phase['seconds']:.0f} s, {phase['extra_memory_bytes'] / 1e6:,.0f} MB at most above its start"
