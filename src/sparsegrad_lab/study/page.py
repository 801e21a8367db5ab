"""One self-contained HTML page: verdict, tables that sort and filter, pictures, and the JSON of every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from .figures import pareto
from .overview import overview
from .parameters import parameters
from .results import Section
from .tables import Table, every_run, tables_of
from .verdict import verdict


def page(sections: Sequence[Section], title: str) -> str:
    """The page's text.

    Args:
        sections: at least one.
        title: its heading.
    """
    runs = [run for section in sections for run in section.runs]
    known = [run for section in sections for run in (*section.runs, *section.trials)]
    number = {id(run): position for position, run in enumerate(known)}
    parts = [f"<h1>{escape(title)}</h1>"]
    if len(sections) > 1:
        links = "".join(f"<li><a href='#of-{escape(s.name)}'>{escape(s.title)}</a></li>" for s in sections)
        parts.append(f"<nav><ul>{links}</ul></nav>")
    if (summary := overview(sections)) is not None:
        parts.append(_table(summary, "overview", number))
    for section in sections:
        parts += _section(section, number, alone=len(sections) == 1)
    if any(section.name for section in sections):
        parts.append(_table(parameters(), "parameters", number))
    parts.append(_table(every_run(runs), "every-run", number, filtered=True))
    parts += [
        f"<details id='run-{position}'><summary>{escape(run.task)}, {escape(run.method)}, seed {run.result['seed']}: "
        f"{escape(run.path.as_posix())}</summary>"
        f"<pre>{escape(json.dumps(run.result, indent=1, ensure_ascii=False))}</pre></details>"
        for position, run in enumerate(known)
    ]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>\n"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<style>{_file('page.css')}</style></head>\n"
        f"<body>\n{body}\n<script>{_file('page.js')}</script></body></html>\n"
    )


def _section(section: Section, number: dict[int, int], alone: bool) -> list[str]:
    """Heading, verdict, tables and pictures of an experiment."""
    prefix = f"{section.name}-" if section.name else ""
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict(section))
    parts = [f"<ul class='verdict'>{lines}</ul>"]
    if section.name or not alone:
        parts = [
            f"<h2 id='of-{escape(section.name)}'>{escape(section.title)}</h2>",
            f"<p>{escape(section.question)}</p>",
            *parts,
        ]
    said = [f"<dt>{escape(method)}</dt><dd>{escape(words)}</dd>" for method, words in section.methods.items() if words]
    parts += [f"<dl>{''.join(said)}</dl>"] if said else []
    parts += [f"<p>{escape(section.setting)}</p>"] if section.setting else []
    parts += [_table(table, f"{prefix}{name}", number) for name, table in tables_of(section).items()]
    if section.failures:
        lines = "".join(f"<li>{escape(failure.words)}</li>" for failure in section.failures)
        parts.append(f"<h3>Runs without a score</h3><ul>{lines}</ul>")
    for picture in pareto(section) if section.runs and section.scored else ():
        parts.append(
            f"<h3>{escape(picture.title)}</h3>\n<figure role='img' "
            f"aria-label='{escape(picture.alt, quote=True)}'>{picture.svg}"
            f"<figcaption>{escape(picture.alt)}</figcaption></figure>"
        )
    return parts


def _table(table: Table, name: str, number: dict[int, int], filtered: bool = False) -> str:
    head = "".join(f"<th scope='col'><button type='button'>{escape(cell)}</button></th>" for cell in table.header)
    rows = []
    for line, row in enumerate(table.rows):
        cells = []
        for column, cell in enumerate(row):
            behind = table.runs.get((line, column), ())
            if len(behind) == 1:
                text = f"<a href='#run-{number[id(behind[0])]}'>{escape(cell)}</a>"
            elif behind:  # the number, then its runs
                links = " ".join(
                    f"<a href='#run-{number[id(run)]}' title='seed {run.result['seed']}, {run.shown(run.score, 2)}'>"
                    f"{index}</a>" for index, run in enumerate(behind, 1)
                )  # fmt: skip
                text = f"{escape(cell)} <small>{links}</small>"
            else:
                text = escape(cell)
            cells.append(f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    box = (
        f"<input data-filters='{name}' type='search' placeholder='filter, such as: rte lora' aria-label='filter'>"
        if filtered
        else ""
    )
    body = "\n".join(rows)
    return (
        f"<h3>{escape(table.title)}</h3>\n{box}<div class='wide'><table id='{name}'><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n<p class='note'>{escape(table.note)}</p>"
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
