"""`sparsegrad evaluate`."""

from __future__ import annotations

import json
import re

from ..run.folder import RunFolder
from ..run.parsing import arguments_of, make_parser
from ..run.settings import refuse

EXAMPLE = 'sparsegrad evaluate runs/glue-rte/sparsegrad; prints JSON, such as {"validation": {"accuracy": 0.5632}}.'


def main(argv: list[str]) -> None:
    """Print the scores of a finished run as JSON."""
    parser = make_parser(
        "evaluate",
        "Print the scores of a finished run on its task, as JSON. A task with classes has precision, recall and F1 of "
        "each class too, and the confusion matrix: a row for each true class, a column for each predicted one.",
        EXAMPLE,
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--split", type=str, default=None, help="train, validation, ...; default: all but train")
    options = parser.parse_args(argv)
    folder = RunFolder(options.run)
    folder.check_finished()
    arguments = arguments_of(folder)
    refuse("this run cannot be evaluated", arguments.data.file_problems(arguments.task))
    from ..run.finished_run import evaluate

    text = json.dumps(evaluate(options.run, options.split), indent=2)
    print(re.sub(r"\[[\d\s,]+\]", lambda row: " ".join(row[0].split()), text))  # a row of the confusion matrix a line
