"""Writes a report: a page, Markdown, and a CSV file for each table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from pathlib import Path

from ..run.whole_files import write_whole
from .contents import Chapter, contents_of
from .page import render_page
from .sections import Report, Section, safe_name

_SEE = "[How to read this table](#how-to-read-the-tables)"
_TABLES = ".tables"
"Names the CSV files of a report, without their suffix, for the next report in the same folder."


def markdown(report: Report, title: str) -> str:
    """Verdict and tables of each section, and where the numbers come from."""
    contents, parts = contents_of(report), [f"# {title}"]
    if contents.overview is not None:
        parts.append(f"## {contents.overview.title}\n\n{contents.overview.markdown()}")
    notes = _common_notes(contents.chapters)
    if notes:
        lines = "\n".join(f"- **{title}.** {note}" for note, title in notes.items())
        parts.append(f"## How to read the tables\n\n{lines}")
    for chapter in contents.chapters:
        section = chapter.section
        parts += [f"## {section.title}", section.question, bullets(chapter.verdict), section.setting]
        parts.append("\n".join(f"- `{method}`: {words}" for method, words in section.methods.items() if words))
        parts += [
            f"### {table.title}\n\n{table.markdown(_SEE if table.note in notes else None)}"
            for table in chapter.tables.values()
        ]
    if contents.parameters is not None:
        parts.append(f"## {contents.parameters.title}\n\n{contents.parameters.markdown()}")
    if report.unfinished:
        parts += ["## Not finished", bullets([str(folder) for folder in report.unfinished])]
    if report.rejected:
        parts += ["## Left out", bullets(report.rejected)]
    parts.append(origin(report.sections))
    text = "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"
    return text.replace("<", "&lt;")  # names from files are no HTML


def _common_notes(chapters: Sequence[Chapter]) -> dict[str, str]:
    """A note that stands below several tables, and their title; no other note does so for this title."""
    counts = Counter((table.note, table.title) for chapter in chapters for table in chapter.tables.values())
    common = [pair for pair, count in counts.items() if count > 1]
    titles = Counter(title for _, title in common)
    return {note: title for note, title in common if titles[title] == 1}


def bullets(sentences: Sequence[str]) -> str:
    """A Markdown list; a single sentence stays a paragraph."""
    return sentences[0] if len(sentences) == 1 else "\n".join(f"- {sentence}" for sentence in sentences)


def origin(sections: Sequence[Section]) -> str:
    """Machines, versions and commits of all runs, in a sentence."""
    environments = [run.environment for section in sections for run in (*section.runs, *section.trials)]
    machines, commits = set(), set()
    for found in environments:
        versions = ", ".join(f"{name} {found.packages.get(name)}" for name in ("torch", "transformers", "peft"))
        threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
        machines.add(f"{found.device} ({threads}), Python {found.python}, {versions}")
        if found.commit:
            commits.add(f"{found.commit[:10]}{' with changes' if found.dirty else ''}")
    words = f". Commits: {', '.join(sorted(commits))}" if commits else ""
    return f"Runs on {'; '.join(sorted(machines))}{words}." if machines else ""


def write_report(report: Report, folder: Path, title: str) -> None:
    """Write `index.html`, `results.md` and the CSV files. Each file is written completely or not at all.

    CSV files of tables that an earlier report had are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / "index.html", render_page(report, title))
    _write(folder / "results.md", markdown(report, title))
    tables = {(c.section.name, name): table for c in contents_of(report).chapters for name, table in c.tables.items()}
    files = {"runs": contents_of(report).every_run}
    for (section, name), table in tables.items():
        files[_free_name(safe_name(f"{section}-{name}"), files)] = table
    for name, table in files.items():
        _write(folder / f"{name}.csv", table.csv())
    _remove_earlier_tables(folder, files)


def _remove_earlier_tables(folder: Path, written: Collection[str]) -> None:
    """Remove the CSV files that an earlier report has written and this one has not. Other files may lie there too."""
    names = folder / _TABLES
    earlier = names.read_text(encoding="utf-8").splitlines() if names.is_file() else []
    for name in {Path(line).name for line in earlier}.difference(written):
        (folder / f"{name}.csv").unlink(missing_ok=True)
    _write(names, "".join(f"{name}\n" for name in sorted(written)))


def _free_name(name: str, others: Iterable[str]) -> str:
    """Return the name, with a number if one of the others differs from it in capitals only or not at all."""
    taken = {other.casefold() for other in others}
    numbered = (f"{name}-{number}" if number > 1 else name for number in count(1))
    return next(candidate for candidate in numbered if candidate.casefold() not in taken)


def _write(path: Path, text: str) -> None:
    write_whole(path, text.encode("utf-8", "backslashreplace"))  # a JSON file may hold half of a surrogate pair
