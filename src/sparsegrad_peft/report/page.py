"""One self-contained HTML page: verdict, tables that sort and filter, pictures, and the JSON of every run."""

from __future__ import annotations

import json
from html import escape
from importlib.resources import files

from .compare import by_unit, compare, methods_of
from .figures import pareto
from .results import Run
from .tables import Table, comparisons, costs, every_run, scores


def page(runs: list[Run], title: str, baseline: str = "lora") -> str:
    """The page's text.

    Args:
        runs: at least one.
        title: its heading.
        baseline: the method that the others are compared with, if it is among the runs.
    """
    number = {id(run): position for position, run in enumerate(runs)}
    has_baseline = baseline in methods_of(runs)
    tables = [scores(runs), *([comparisons(runs, baseline)] if has_baseline else []), costs(runs)]
    parts = [f"<h1>{escape(title)}</h1>", f'<p class="verdict">{escape(verdict(runs, baseline))}</p>']
    parts += [_table(table, number) for table in tables]
    for picture in pareto(runs):
        parts.append(
            f"<h2>{escape(picture.title)}</h2>\n<figure role='img' aria-label='{escape(picture.alt, quote=True)}'>"
            f"{picture.svg}<figcaption>{escape(picture.alt)}</figcaption></figure>"
        )
    parts.append(_table(every_run(runs), number, filtered=True))
    parts += [
        f"<details id='run-{position}'><summary>{escape(run.task)}, {escape(run.method)}, seed {run.result['seed']}: "
        f"{escape(run.path.as_posix())}</summary>"
        f"<pre>{escape(json.dumps(run.result, indent=1, ensure_ascii=False))}</pre></details>"
        for position, run in enumerate(runs)
    ]
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>\n"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<style>{_file('page.css')}</style></head>\n"
        f"<body>\n{body}\n<script>{_file('page.js')}</script></body></html>\n"
    )


def verdict(runs: list[Run], baseline: str = "lora") -> str:
    """What the runs say, in a sentence for each method that is compared."""
    methods = methods_of(runs)
    others = [method for method in methods if method != baseline]
    if baseline not in methods or not others:
        return f"{len(runs)} runs of {', '.join(methods)}; there is nothing to compare with {baseline}."
    return " ".join(compare(some, method, baseline).words for some in by_unit(runs).values() for method in others)


def _table(table: Table, number: dict[int, int], filtered: bool = False) -> str:
    name = table.title.lower().replace(" ", "-")
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
        f"<h2>{escape(table.title)}</h2>\n{box}<div class='wide'><table id='{name}'><thead><tr>{head}</tr></thead>\n"
        f"<tbody>{body}</tbody></table></div>\n<p class='note'>{escape(table.note)}</p>"
    )


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
