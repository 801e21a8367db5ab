"""`sparsegrad report`."""

from __future__ import annotations

from pathlib import Path

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad report runs --output report; prints the verdict, and writes report/index.html (a page for the browser, "
    "without network), report/results.md and a CSV file per table."
)


def main(argv: list[str]) -> None:
    """Read the runs, print the verdict, write the page and the tables."""
    parser = make_parser(
        "report",
        "Compare finished runs. Writes a page with the verdict, sortable tables, plots and details of each run, and "
        "the same tables as Markdown and CSV.",
        EXAMPLE,
    )
    parser.add_argument("runs", type=str, nargs="+", help="run folders, folders that contain some, or result files")
    parser.add_argument("--markdown", type=str, default=None,
                        help="write only the tables, as this Markdown file")  # fmt: skip
    parser.add_argument("--output", type=str, default="report", help="folder to write")
    parser.add_argument("--baseline", type=str, default=None,
                        help="method to compare the others with; default: the experiment's, or lora")  # fmt: skip
    parser.add_argument("--folder", type=str, default=None,
                        help="folder with your own experiments; the report then names their missing runs")  # fmt: skip
    parser.add_argument("--title", type=str, default="SparseGrad and its peers", help="title of the page")
    options = parser.parse_args(argv)
    if options.markdown is not None and "output" in parser.given:
        parser.error("--markdown writes only the Markdown file, and --output has no effect; leave one of the two out")
    from ..run.whole_files import check_file, check_writable, write_whole
    from ..study.sections import read_report

    if options.markdown is not None:
        check_file(Path(options.markdown))
    else:
        check_writable(Path(options.output))
    if options.folder is not None and not Path(options.folder).is_dir():
        raise FileNotFoundError(f"--folder: there is no folder {options.folder}")
    report = read_report(options.runs, options.baseline, None if options.folder is None else Path(options.folder))
    from ..study.contents import contents_of  # imports torch

    for chapter in contents_of(report).chapters:
        section = chapter.section
        start = f"{section.title}, " if section.name else ""
        count = len(section.runs)
        print("\n  ".join([f"{start}{count} run{'' if count == 1 else 's'}", *chapter.verdict]))
    for run_folder in report.unfinished:
        print(f"not finished: {run_folder}")
    for reason in report.rejected:
        print(f"left out: {reason}")
    from ..study.report import markdown, write_report

    if options.markdown is not None:
        write_whole(Path(options.markdown), markdown(report, options.title))
        print(f"written: {options.markdown}")
        return
    write_report(report, Path(options.output), options.title)
    print(f"written: {options.output}/index.html, results.md, *.csv")
