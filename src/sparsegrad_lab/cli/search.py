"""`sparsegrad search`."""

from __future__ import annotations

from rich.console import Console

from ..run.parsing import run_arguments, run_parser
from ..run.settings import SearchArguments

EXAMPLE = (
    "sparsegrad search --task glue/rte --method lora --search.trials 12 --output runs/search-rte-lora; prints a line "
    "for each trial, then the best settings and the command that trains with them. The same command again goes on "
    "where it was interrupted; several at once share the trials."
)


def main(argv: list[str]) -> None:
    """Search, then say what came out and what to do next."""
    parser = run_parser("search", SearchArguments.__doc__ or "", EXAMPLE, argv)
    parser.add_class_arguments(SearchArguments, "search")
    found = vars(parser.instantiate(parser.parse_args(argv)))
    what = found.pop("search")
    arguments = run_arguments(found)
    if arguments.output == type(arguments)().output:
        arguments.output = "runs/search/{task}/{method}"
    arguments.check()
    what.check()
    from ..run.search import search
    from ..run.train import output_folder

    console = Console(highlight=False, soft_wrap=True)
    result = search(arguments, what, console.print)
    best, folder = result["best"], output_folder(arguments)
    console.print(
        f"\nbest of {len(result['trials'])} trials: learning rate {best['learning_rate']:g}, batch size "
        f"{best['batch_size']}, score {best['score']:.4f}\nfolder: {folder} (search.json, search.png)\n"
        f"next:   sparsegrad train --config {folder}/best.yaml"
    )
