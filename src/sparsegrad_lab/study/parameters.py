"""Table 1 of the paper: which part of a model its MLP layers are, computed from the models' configs."""

from __future__ import annotations

from ..inspection.shipped_models import FOLDER, PUBLISHED, model_names
from .tables import Table

_PARTS = ("embeddings", "attention", "mlp", "norms", "head")


def parameters() -> Table:
    """Models down, parts across, the published numbers in brackets."""
    from ..inspection.inspect import inspect

    rows = []
    for name in model_names():
        parts, said = inspect(str(FOLDER / name)).parts, PUBLISHED.get(name, {})
        row = [name, f"{_millions(parts.total)}{_brackets(said.get('total'))}"]
        for part in _PARTS:
            count = f"{_millions(getattr(parts, part))} M, {100 * parts.share(part):.1f} %"
            row.append(f"{count}{_brackets(said.get(part))}")
        rows.append(row)
    note = (
        "Parameters in millions and their share of the model, with biases, without a task's head; in brackets the "
        "paper's numbers (EMNLP 2024, Table 1). `sparsegrad inspect bert-base` says more, also of any other model."
    )
    header = ["model", "in all, M", *(part if part != "mlp" else "MLP" for part in _PARTS)]
    return Table("Parameters by part", note, header, rows, {})


def _millions(count: float) -> str:
    return f"{count / 1e6:,.1f}"


def _brackets(count: float | None) -> str:
    return "" if count is None else f" ({count / 1e6:,.0f})"
