"""Print an inspection as tables on the terminal."""

from __future__ import annotations

from dataclasses import fields

from rich.console import Console
from rich.table import Table

from .inspect import Inspection
from .parts import ModelParts


def render(inspection: Inspection, console: Console) -> None:
    """Print the tables, within 80 columns."""

    def line(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    share, unit = 100 * inspection.adapted_mlp_share, _unit(inspection.calibration_copy_bytes)
    calibration, copy = _in(inspection.calibration_bytes, unit), _in(inspection.calibration_copy_bytes, unit)
    line(f"{inspection.model}: {inspection.model_class}, {inspection.parts.total:,} parameters")
    console.print(_parts_table(inspection.parts))
    console.print(_groups_table(inspection))
    for number, group in enumerate(inspection.groups, 1):
        line(f"{number:>3} {group.name}")
    line(f"\nThese layers hold {share:.3g} % of the MLP's weights.")
    line(f"Calibration needs {calibration} {unit} more at its peak, for sums of gradients and one gradient.")
    line(f"It also keeps a copy of these weights on the CPU, {copy} {unit} (none with --calibration.walk null).")
    console.print(_methods_table(inspection))
    line("")
    for note in inspection.notes:
        line(f"- {note}")


def _table(title: str, *headings: str) -> Table:
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", box=None, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", overflow="fold")
    return table


def _parts_table(parts: ModelParts) -> Table:
    table = _table("Parameters by part", "part", "parameters", "share, %")
    for field in fields(parts):
        name = "MLP" if field.name == "mlp" else field.name
        table.add_row(name, f"{getattr(parts, field.name):,}", f"{100 * parts.share(field.name):.1f}")
    table.add_row("all", f"{parts.total:,}", "100.0", style="bold")
    return table


def _groups_table(i: Inspection) -> Table:
    table = _table(
        f"Layers to adapt: {i.sizes}, k at density {i.density:.4g}",
        "no.", "layers", "out x in", "core r x c", "entries\na layer", "entries", "k a\nlayer", "bases,\nMB",
    )  # fmt: skip
    for number, g in enumerate(i.groups, 1):
        table.add_row(f"{number:>3}", str(g.layers), f"{g.out}x{g.in_}", f"{g.r}x{g.c}", f"{g.entries_per_layer:,}",
                      f"{g.entries:,}", f"{g.k_per_layer:,}", _in(g.bases_bytes, "MB"))  # fmt: skip
    bases = _in(sum(g.bases_bytes for g in i.groups), "MB")
    table.add_row("all", str(i.layers), "", "", "", f"{i.entries:,}", "", bases, style="bold")
    return table


def _methods_table(i: Inspection) -> Table:
    unit = _unit(max(method.total_bytes_high for method in i.methods))
    with_activations = any(method.activations_bytes is not None for method in i.methods)
    table = _table(
        f"Memory of each method, in {unit} ({'1e9' if unit == 'GB' else '1e6'} bytes)",
        "what trains", "trained,\nmillion", "weights", "bases", "gradi-\nents", "optimizer",
        *(["acti-\nvations"] if with_activations else []), "total,\nat most",
    )  # fmt: skip
    for m in i.methods:
        low, high = _in(m.optimizer_bytes_low, unit), _in(m.optimizer_bytes_high, unit)
        known = m.activations_bytes is not None
        activations = [_in(m.activations_bytes or 0, unit) if known else "-"] if with_activations else []
        total = _in(m.total_bytes_high, unit) if known or not with_activations else "-"
        table.add_row(m.name, _number(m.trained / 1e6), _in(m.weights_bytes, unit), _in(m.bases_bytes, unit),
                      _in(m.gradients_bytes, unit), low if low == high else f"{low}-{high}", *activations,
                      total)  # fmt: skip
    return table


def _unit(largest: int) -> str:
    return "GB" if largest >= 10**10 else "MB"


def _in(count: int, unit: str) -> str:
    """Format bytes in MB or GB (decimal)."""
    return _number(count / (1e9 if unit == "GB" else 1e6))


def _number(value: float) -> str:
    """Format with about three digits, without exponents."""
    if value == 0:
        return "0"
    return f"{value:,.3f}" if value < 1 else f"{value:,.2f}" if value < 100 else f"{value:,.1f}"
