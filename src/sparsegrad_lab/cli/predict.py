"""`sparsegrad predict`."""

from __future__ import annotations

import json
from pathlib import Path

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad predict runs/acceptability/sparsegrad --text 'The keys are here.'; prints the sentence with its class "
    "and the probability of each; a language model goes on with the text. "
    "--file rows.csv --output predictions.csv does it for a file."
)


def main(argv: list[str]) -> None:
    """Print predictions as JSON lines, or write them as CSV."""
    parser = make_parser("predict", "What a finished run says of new rows.", EXAMPLE)
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--text", type=str, nargs="+", default=[], help="a row: one text, or two, or an image's file")
    parser.add_argument("--file", type=str | None, default=None, help="CSV, TSV, JSON or JSON lines")
    parser.add_argument("--max_new_tokens", type=int, default=128, help="of a language model's answer, at most")
    parser.add_argument("--output", type=str | None, default=None, help="CSV file to write; default: print JSON lines")
    found = parser.parse_args(argv)
    from ..run.finished_run import predict, write_csv
    from ..run.folder import check_file

    if found.output is not None:
        check_file(Path(found.output))
    rows = predict(found.run, found.file, found.text, max_new_tokens=found.max_new_tokens)
    if found.output is not None:
        write_csv(Path(found.output), rows)
        print(f"written: {found.output} ({len(rows)} rows)")
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
