"""A report's files."""

from __future__ import annotations

from pathlib import Path

from ..run.folder import write_whole
from .compare import methods_of
from .page import page, verdict
from .results import Run
from .tables import Table, comparisons, costs, every_run, scores


def tables_of(runs: list[Run], baseline: str) -> dict[str, Table]:
    """File name -> table."""
    found = {"scores": scores(runs)}
    if baseline in methods_of(runs):
        found["comparison"] = comparisons(runs, baseline)
    return {**found, "costs": costs(runs), "runs": every_run(runs)}


def markdown(runs: list[Run], title: str, baseline: str = "lora") -> str:
    """Verdict and tables."""
    parts = [f"# {title}", verdict(runs, baseline)]
    parts += [f"## {table.title}\n\n{table.markdown()}" for table in tables_of(runs, baseline).values()]
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def write_report(runs: list[Run], folder: Path, title: str, baseline: str = "lora") -> None:
    """`index.html`, `results.md`, and a CSV for each table; each written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "index.html", page(runs, title, baseline))
    write_whole(folder / "results.md", markdown(runs, title, baseline))
    for name, table in tables_of(runs, baseline).items():
        write_whole(folder / f"{name}.csv", table.csv())
