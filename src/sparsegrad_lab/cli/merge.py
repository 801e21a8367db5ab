"""`sparsegrad merge`."""

from __future__ import annotations

from ..run.parsing import make_parser

EXAMPLE = "sparsegrad merge runs/glue-rte/sparsegrad; prints: merged: runs/glue-rte/sparsegrad/merged"


def main(argv: list[str]) -> None:
    """Merge, once."""
    parser = make_parser(
        "merge", "Write the model with what was learnt in its weights, as a plain transformers folder.", EXAMPLE
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    found = parser.parse_args(argv)
    from ..run.finished_run import merge

    folder, made = merge(found.run)
    print(f"merged: {folder}" if made else f"already merged: {folder}")
