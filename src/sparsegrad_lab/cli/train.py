"""`sparsegrad train`."""

from __future__ import annotations

from argparse import ArgumentError
from argparse import ArgumentParser as PlainParser
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from ..run.presets import preset
from ..run.settings import WHOLE, RunArguments, flat
from .parsing import VerbParser, make_parser

EXAMPLE = (
    "sparsegrad train --task glue/rte --method lora --training.epochs 3 --output runs/rte-lora; prints a line for each "
    "evaluation, then the best score, times, memory, and the next command. The same command again goes on where it was "
    "interrupted. --config FILE reads all of this from YAML, and words on the command line come first."
)


def parse(argv: list[str]) -> RunArguments:
    """Words -> arguments: preset, then config file, then the command line, the later one first."""
    parser = run_parser("train", RunArguments.__doc__ or "", EXAMPLE, argv)
    return run_arguments(vars(parser.instantiate(parser.parse_args(argv))))


def run_parser(verb: str, description: str, example: str, argv: list[str]) -> VerbParser:
    """A parser of everything that a run has, with the preset that `argv` names as its defaults."""
    parser = make_parser(verb, description, example)
    parser.usage = "%(prog)s [--OPTION VALUE ...]"  # spelt out, it would hide an error's one line
    parser.add_argument("--config", action="config", help="YAML file with any of these")
    parser.add_argument("--preset", type=str, default=None, help="settings to start from, see: sparsegrad presets")
    parser.add_class_arguments(RunArguments)
    name = _preset_name(argv)
    if name is not None:
        parser.set_defaults(flat(preset(name)))
    return parser


def run_arguments(found: dict[str, Any]) -> RunArguments:
    """What a parser of `run_parser` found."""
    return RunArguments(**{key: value for key, value in found.items() if key not in ("config", "preset")})


def as_arguments(settings: dict[str, Any]) -> RunArguments:
    """Nested settings, as a file for `--config` has them.

    Raises:
        ValueError: there is no such setting, or it has another type.
    """
    parser = _settings_parser()
    try:
        return run_arguments(vars(parser.instantiate(parser.parse_object(settings))))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


@cache  # a study reads hundreds of settings, and a parser takes longer to make than they take to read
def _settings_parser() -> VerbParser:
    parser = run_parser("train", "", "", [])
    parser.exit_on_error = False
    return parser


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
            f"{'adapted layers' if result['method'] in WHOLE else 'adapter'}, "
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


def _preset_name(argv: list[str]) -> str | None:
    plain = PlainParser(add_help=False, allow_abbrev=False)
    plain.add_argument("--preset")
    plain.add_argument("--config")
    known, _ = plain.parse_known_args(argv)
    name: str | None = known.preset
    if name is None and known.config is not None and Path(known.config).is_file():
        try:
            found = yaml.safe_load(Path(known.config).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{known.config}: expected YAML ({error})") from error
        name = found.get("preset") if isinstance(found, dict) else None
    return name if isinstance(name, str) else None  # the parser refuses what is no name
