"""Configs of the paper's models that ship with the package, so that their sizes need no download."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

FOLDER = Path(str(files(__package__))) / "models"

PUBLISHED = {
    "bert-base": {"total": 109e6, "mlp": 57e6, "embeddings": 24e6, "attention": 28e6},
    "roberta-base": {"total": 125e6, "mlp": 57e6, "embeddings": 40e6, "attention": 28e6},
    "llama-2-7b": {"total": 6.7e9, "mlp": 4.3e9, "embeddings": 0.1e9, "attention": 2.1e9},
}
"""Published parameter counts by part (EMNLP 2024, Table 1)."""


def model_names() -> list[str]:
    """Names of the shipped configs."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.json"))


def shipped_model(name: str) -> Path | None:
    """Folder of a shipped config, or None if no config has this name."""
    return FOLDER / name if name in model_names() else None
