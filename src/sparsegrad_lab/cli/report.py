"""`sparsegrad report`."""

from __future__ import annotations

from pathlib import Path

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad report runs --output report; prints the verdict, and writes report/index.html (open it in a browser, "
    "it needs no network), report/results.md and a CSV for each table."
)


def main(argv: list[str]) -> None:
    """Read the runs, write page and tables, say the verdict."""
    parser = make_parser(
        "report",
        "Compare finished runs: one page with the verdict, tables that sort and filter, pictures, and all that is "
        "known of each run; the same tables as Markdown and CSV.",
        EXAMPLE,
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folders, folders that hold some, or result files")
    parser.add_argument("--markdown", type=str, default=None,
                        help="write the tables as this one Markdown file, and no page")  # fmt: skip
    parser.add_argument("--output", type=str, default="report", help="folder to write")
    parser.add_argument("--baseline", type=str, default=None,
                        help="what the others are compared with; default: the experiment's, or lora")  # fmt: skip
    parser.add_argument("--title", type=str, default="SparseGrad and its peers", help="heading of the page")
    found = parser.parse_args(argv)
    from ..run.folder import RunFolder, check_file, write_whole
    from ..study.report import markdown, write_report
    from ..study.sections import read_report
    from ..study.verdict import verdict

    if found.markdown is not None:
        check_file(Path(found.markdown))
    else:
        RunFolder(found.output).check_writable()
    report = read_report(found.runs, found.baseline)
    for section in report.sections:
        start = f"{section.title}, " if section.name else ""
        print("\n  ".join([f"{start}{len(section.runs)} runs", *verdict(section)]))
    for run_folder in report.unfinished:
        print(f"not finished: {run_folder}")
    for reason in report.rejected:
        print(f"left out: {reason}")
    if found.markdown is not None:
        write_whole(Path(found.markdown), markdown(report, found.title))
        print(f"written: {found.markdown}")
        return
    write_report(report, Path(found.output), found.title)
    print(f"written: {found.output}/index.html, results.md, *.csv")
