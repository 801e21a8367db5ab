"""A report's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..run.folder import write_whole
from .overview import overview
from .page import page
from .parameters import parameters
from .results import Section
from .tables import every_run, tables_of
from .verdict import verdict


def markdown(sections: Sequence[Section], title: str) -> str:
    """Verdict and tables of each experiment; where the numbers come from."""
    parts = [f"# {title}"]
    if (summary := overview(sections)) is not None:
        parts.append(f"## {summary.title}\n\n{summary.markdown()}")
    for section in sections:
        parts += [f"## {section.title}", section.question, bullets(verdict(section)), section.setting]
        words = [f"- `{method}`: {said}" for method, said in section.methods.items() if said]
        parts.append("\n".join(words))
        parts += [f"### {table.title}\n\n{table.markdown()}" for table in tables_of(section).values()]
    if any(section.name for section in sections):
        table = parameters()
        parts.append(f"## {table.title}\n\n{table.markdown()}")
    parts.append(origin(sections))
    return "\n\n".join(part.rstrip("\n") for part in parts if part) + "\n"


def bullets(sentences: Sequence[str]) -> str:
    """As a Markdown list; one alone stays a paragraph."""
    return sentences[0] if len(sentences) == 1 else "\n".join(f"- {sentence}" for sentence in sentences)


def origin(sections: Sequence[Section]) -> str:
    """Machines, versions and commits of all runs, in one sentence."""
    found = [run.result["environment"] for section in sections for run in (*section.runs, *section.trials)]
    machines = sorted({
        f"{e['device']} ({e['threads']} thread{'s' if e['threads'] > 1 else ''}), Python {e['python']}, "
        f"torch {e['packages']['torch']}, transformers {e['packages']['transformers']}, peft {e['packages']['peft']}"
        for e in found
    })  # fmt: skip
    commits = sorted({f"{e['commit'][:10]}{' with changes' if e['dirty'] else ''}" for e in found if e["commit"]})
    words = ", ".join(commits)
    return f"Runs on {'; '.join(machines)}{f'. Commits: {words}' if words else ''}."


def write_report(sections: Sequence[Section], folder: Path, title: str) -> None:
    """`index.html`, `results.md`, and a CSV for each table; each written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "index.html", page(sections, title))
    write_whole(folder / "results.md", markdown(sections, title))
    for section in sections:
        for name, table in tables_of(section).items():
            write_whole(folder / f"{section.name}{'-' if section.name else ''}{name}.csv", table.csv())
    write_whole(folder / "runs.csv", every_run(run for section in sections for run in section.runs).csv())
