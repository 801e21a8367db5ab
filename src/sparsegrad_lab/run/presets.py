"""Settings that come with the package: `--preset paper/bert-base/rte`."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import yaml


@cache
def _paper() -> dict[str, Any]:
    text = files(__package__).joinpath("paper.yaml").read_text(encoding="utf-8")
    content: dict[str, Any] = yaml.safe_load(text)
    return content


def preset_names() -> list[str]:
    """Names of all presets."""
    glue = [f"paper/{model}/{task}" for model, entry in _paper()["models"].items() for task in entry["tasks"]]
    return [*glue, *_paper()["others"]]


def preset(name: str) -> dict[str, Any]:
    """Settings of a preset, in the layout of `RunArguments`.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in preset_names():
        near = [known for known in preset_names() if set(known.split("/")) & set(name.split("/")[1:])]
        raise ValueError(f"no preset {name!r}; expected one of {', '.join(near or preset_names())}")
    if name in _paper()["others"]:
        settings: dict[str, Any] = _paper()["others"][name]
        return settings
    _, model, task = name.split("/")
    entry = _paper()["models"][model]
    batch_size, learning_rate = entry["tasks"][task]
    common = _paper()["common"]
    return {
        **common,
        "model": entry["model"],
        "task": f"glue/{task}",
        "training": {**common["training"], "batch_size": batch_size, "learning_rate": learning_rate},
    }
