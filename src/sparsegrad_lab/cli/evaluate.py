"""`sparsegrad evaluate`."""

from __future__ import annotations

import json

from ..run.folder import RunFolder
from ..run.parsing import make_parser

EXAMPLE = "sparsegrad evaluate runs/glue-rte/sparsegrad; prints {'validation': {'accuracy': 0.5632}}, as JSON."


def main(argv: list[str]) -> None:
    """Print the scores of a finished run as JSON."""
    parser = make_parser("evaluate", "Print the scores of a finished run on its task, as JSON.", EXAMPLE)
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--split", type=str, default=None, help="train, validation, ...; default: all but train")
    options = parser.parse_args(argv)
    RunFolder(options.run).check_finished()
    from ..run.finished_run import evaluate

    print(json.dumps(evaluate(options.run, options.split), indent=2))
