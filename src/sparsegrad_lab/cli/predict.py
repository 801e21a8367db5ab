"""`sparsegrad predict`."""

from __future__ import annotations

import json
from pathlib import Path

from ..run.folder import RunFolder
from ..run.parsing import make_parser
from ..run.whole_files import check_file
from ..tasks.read import check_rows_file

EXAMPLE = (
    "sparsegrad predict runs/acceptability/sparsegrad --text 'The keys are here.' 'The keys is here.'; prints a line "
    "per text with its class and the probability of each class. --file rows.csv --output predictions.csv predicts the "
    "rows of a file."
)


def main(argv: list[str]) -> None:
    """Print predictions as JSON lines, or write them as CSV."""
    parser = make_parser(
        "predict",
        "Predict with a finished run: classes with their probabilities, numbers, or a language model's answers.",
        EXAMPLE,
    )
    parser.add_argument("run", type=str, help="folder of a finished run")
    parser.add_argument("--text", type=str, nargs="+", default=[],
                        help="rows: one text each, two for a task with text pairs, or an image file")  # fmt: skip
    parser.add_argument("--file", type=str | None, default=None, help="CSV, TSV, JSON or JSON lines file with rows")
    parser.add_argument("--max_new_tokens", type=int | None, default=None,
                        help="maximum length of a language model's answer; default: 128")  # fmt: skip
    parser.add_argument("--output", type=str | None, default=None, help="CSV file to write; default: print JSON lines")
    options = parser.parse_args(argv)
    RunFolder(options.run).check_finished()
    if options.file is not None:
        check_rows_file(Path(options.file))
    if options.output is not None:
        output = Path(options.output)
        check_file(output)
        if output.suffix.lower() != ".csv":
            parser.error(f"--output: expected a .csv file, found {output}; without --output, JSON lines are printed")
        if options.file is not None and output.resolve() == Path(options.file).resolve():
            parser.error(f"--output: {output} is the file with the rows, which would be replaced; name another")
    from ..run.finished_run import predict, write_csv

    rows = predict(options.run, options.file, options.text, max_new_tokens=options.max_new_tokens)
    if options.output is not None:
        write_csv(Path(options.output), rows)
        print(f"written: {options.output} ({len(rows)} rows)")
    else:
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
