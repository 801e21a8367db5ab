"""Text from files in Markdown."""

from __future__ import annotations


def as_cell(text: str) -> str:
    """Return a text as one line that is no HTML and fits into a cell of a table."""
    return " ".join(text.replace("|", "\\|").replace("<", "&lt;").split())
