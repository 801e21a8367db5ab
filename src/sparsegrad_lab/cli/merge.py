"""`sparsegrad merge`."""

from __future__ import annotations

from ..run.folder import RunFolder
from ..run.parsing import make_parser

EXAMPLE = "sparsegrad merge runs/glue-rte/sparsegrad; prints: merged: runs/glue-rte/sparsegrad/merged"


def main(argv: list[str]) -> None:
    """Merge the adapter of a finished run."""
    parser = make_parser(
        "merge",
        "Merge the adapter of a finished run into the model's weights. Writes a plain transformers folder.",
        EXAMPLE,
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    options = parser.parse_args(argv)
    RunFolder(options.run).check_finished()
    from ..run.finished_run import merge

    folder, written = merge(options.run)
    print(f"merged: {folder}" if written else f"already merged: {folder}")
