"""`sparsegrad search`."""

from __future__ import annotations

import shlex

from rich.console import Console

from ..run.parsing import run_arguments, run_parser
from ..run.settings import RunArguments, SearchArguments

EXAMPLE = (
    "sparsegrad search --task glue/rte --method lora --search.trials 12 --output runs/search-rte-lora; prints a line "
    "per trial, then the best settings and the command that trains with them. The same command resumes an interrupted "
    "search; run it several times at once to share the trials."
)

_DRAWN = {
    "training.learning_rate": "--search.lowest and --search.highest",
    "training.batch_size": "--search.batch_sizes",
}


def main(argv: list[str]) -> None:
    """Search, then print the best settings and the next command."""
    parser = run_parser("search", SearchArguments.__doc__ or "", EXAMPLE, argv)
    parser.add_class_arguments(SearchArguments, "search")
    options = vars(parser.instantiate(parser.parse_args(argv)))
    for name, instead in _DRAWN.items():
        if name in parser.given:
            parser.error(f"--{name}: a search draws it; set {instead}")
    settings: SearchArguments = options.pop("search")
    arguments = run_arguments(options)
    if arguments.output == RunArguments().output:
        arguments.output = "runs/search/{task}/{method}"
    arguments.check(parser.given)
    settings.check()
    from ..run.folder import output_folder
    from ..run.search import search

    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    result = search(arguments, settings, (lambda line: None) if options["quiet"] else console.print)
    best, folder = result["best"], output_folder(arguments)
    count = sum(trial["state"] != "interrupted" for trial in result["trials"])
    console.print(
        f"\nbest of {count} trials: learning rate {best['learning_rate']:g}, batch size "
        f"{best['batch_size']}, score {best['score']:.4f}\nfolder: {folder} (search.json, search.png)\n"
        f"next:   sparsegrad train --config {shlex.quote(str(folder / 'best.yaml'))}"
    )
