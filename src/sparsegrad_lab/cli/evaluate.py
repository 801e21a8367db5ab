"""`sparsegrad evaluate`."""

from __future__ import annotations

import json

from ..run.parsing import make_parser

EXAMPLE = "sparsegrad evaluate runs/glue-rte/sparsegrad; prints {'validation': {'accuracy': 0.5632}}, as JSON."


def main(argv: list[str]) -> None:
    """Print the scores as JSON."""
    parser = make_parser("evaluate", "Scores of a finished run on its task's evaluation rows, as JSON.", EXAMPLE)
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--split", type=str, default=None, help="train, validation, ...; default: all but train")
    found = parser.parse_args(argv)
    from ..run.finished_run import evaluate

    print(json.dumps(evaluate(found.run, found.split), indent=2))
