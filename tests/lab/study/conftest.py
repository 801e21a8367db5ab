"""Result files with scores of our own, and what is read from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.sections import Section, read_sections

SCORES = {  # task -> method -> score of each seed
    "glue/rte": {"sparsegrad": [0.60, 0.64], "lora": [0.58, 0.60], "full": [0.66]},
    "glue/mrpc": {"lora": [0.80, 0.82], "sparsegrad": [0.81, 0.83]},
}


@pytest.fixture
def real() -> dict[str, Any]:
    """Content of a result file, as a run has written it."""
    file = Path(__file__).parents[2] / "samples" / "finished_run" / "result.json"
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


@pytest.fixture
def folder(tmp_path: Path, real: dict[str, Any]) -> Path:
    """Result files as runs write them, with scores of our own."""
    for task, methods in SCORES.items():
        for method, found in methods.items():
            for seed, score in enumerate(found):
                path = tmp_path / "results" / task / f"{method}-{seed}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                result = {**real, "task": task, "method": method, "seed": seed, "score": score}
                path.write_text(json.dumps(result), encoding="utf-8")
    return tmp_path / "results"


@pytest.fixture
def runs(folder: Path) -> list[Run]:
    [found] = read_sections([folder])
    return list(found.runs)


@pytest.fixture
def section(folder: Path) -> Section:
    [found] = read_sections([folder])
    return found


@pytest.fixture
def study(tmp_path: Path, real: dict[str, Any]) -> Section:
    """Of the shipped comparison: a few runs, two trials, one that ran out of memory, the rest not run."""

    def write(name: str, **what: Any) -> None:
        base = {**real, "experiment": "comparison", "scale": "cpu", "trial": False, "status": "finished", "seed": 0,
                "model": "minilm"}  # fmt: skip
        path = tmp_path / "study" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**base, **what}), encoding="utf-8")

    write("a", task="glue/rte", variant="sparsegrad", score=0.6, learning_rate=1e-2)
    write("b", task="glue/rte", variant="lora", score=0.5)
    for rate, score in ((1e-2, 0.55), (1e-3, 0.45)):
        write(f"t{rate}", task="glue/rte", variant="sparsegrad", score=score, learning_rate=rate, trial=True, seed=100)
    failed = {"task": "glue/rte", "variant": "full", "seed": 1, "status": "out of memory", "error": "too <large>",
              "config": {}, "experiment": "comparison", "scale": "cpu", "trial": False}  # fmt: skip
    (tmp_path / "study" / "c.json").write_text(json.dumps(failed), encoding="utf-8")
    [found] = read_sections([tmp_path / "study"])
    return found
