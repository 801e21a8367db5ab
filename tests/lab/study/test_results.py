"""Which files count as results."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import pytest

from helpers import write_json
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.study.results import read_results
from sparsegrad_lab.study.sections import read_report


def test_trials_and_runs_of_a_study_are_no_seeds(folder: Path, real: dict[str, Any]) -> None:
    """What `sparsegrad search` and `reproduce` leave below `runs` has its own summary and result files."""
    before = len(read_report([folder]).sections[0].runs)
    found = {**real, "task": "glue/rte", "method": "sparsegrad", "seed": 7, "score": 0.1}
    for inner, mark in (("search-rte/trial-000", "../search.json"), ("study/deep/run", "../../claims.journal")):
        write_json(folder / inner / "result.json", found)
        (folder / inner / mark).write_text("{}", encoding="utf-8")
    assert len(read_report([folder]).sections[0].runs) == before
    [asked_for] = read_report([folder / "search-rte"]).sections
    assert len(asked_for.runs) == 1
    write_json(folder / "search-rte" / "by-itself" / "result.json", found)  # not one of the trials
    assert len(read_report([folder]).sections[0].runs) == before + 1


def test_only_result_files_are_opened(folder: Path, real: dict[str, Any]) -> None:
    """A run folder's other JSON files are not read: a checkpoint's, which come and go, or a broken one."""
    write_json(folder / "run" / "config.yaml", {})
    write_json(folder / "run" / "result.json", {**real, "task": "glue/rte", "method": "full", "seed": 7})
    for name in ("checkpoints/checkpoint-3/trainer_state.json", "metrics.json", ".result.json.0a.draft"):
        (folder / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "run" / name).write_text("{", encoding="utf-8")
    files = read_results([folder])
    assert len(files.runs) == 10
    assert (files.unfinished, files.rejected) == ((), ())


def test_a_report_while_a_run_is_being_written(folder: Path, real: dict[str, Any]) -> None:
    """Another process writes and removes checkpoints, and finishes runs, between the listing and the reading."""
    done = threading.Event()

    def write_runs() -> None:
        number = 0
        while not done.is_set():
            number += 1
            run = RunFolder(folder / f"run-{number % 3}")
            run.write_json("method.json", {})
            run.write_yaml("config.yaml", {})
            write_json(run.checkpoints / "checkpoint-1" / "trainer_state.json", {})
            run.write_json("result.json", {**real, "seed": number})
            shutil.rmtree(run.path)

    writer = threading.Thread(target=write_runs)
    writer.start()
    try:
        for _ in range(100):
            files = read_results([folder])
            assert len(files.runs) >= 9
            assert files.rejected == ()
    finally:
        done.set()
        writer.join()


def test_unfinished_runs_are_named(folder: Path) -> None:
    write_json(folder / "interrupted" / "config.yaml", {})
    assert read_results([folder]).unfinished == (folder / "interrupted",)
    write_json(folder / "config.yaml", {})  # a config of one's own beside the runs, and not a run
    assert read_results([folder]).unfinished == (folder / "interrupted",)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "perplexity": (
        {"unrelated_perplexity": {"before": 0, "after": 2.0}},
        "unrelated_perplexity.before: Input should be",
    ),
    "experiment with a path": ({"experiment": "../../escaped"}, "experiment: String should match pattern"),
    "experiment with an absolute path": ({"experiment": "/tmp/escaped"}, "experiment: String should match pattern"),
    "experiment with a backslash": ({"experiment": "a\\b"}, "experiment: String should match pattern"),
    "variant with a path": ({"variant": "../lora"}, "variant: String should match pattern"),
    "seed as text": ({"seed": "0"}, "seed: Input should be a valid integer"),
    "seed as truth": ({"seed": True}, "seed: Input should be a valid integer"),
    "seed below 0": ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
    "score as text": ({"score": "<script>"}, "score: Input should be a valid number"),
    "score not finite": ({"score": float("nan")}, "score: Input should be a finite number"),
    "score above its metric": ({"score": 5.0}, "score: expected accuracy from -1 to 1, found 5"),
    "loss below 0": ({"metric": "loss", "score": -1.0}, "score: expected loss from 0 to inf, found -1"),
    "no score": ({"score": None}, "score: Input should be a valid number"),
    "no time": (
        {"training": {"seconds": 0, "peak_memory_bytes": 1}},
        "training.seconds: Input should be greater than or equal to 0.000001",
    ),
    "two lines": ({"method": "lora\n\n# heading"}, "method: String should match pattern"),
    "a list": ({"task": ["glue/rte"]}, "task: Input should be a valid string"),
    "steps as text": ({"steps": "ten"}, "steps: Input should be a valid integer"),
    "rows as a list": ({"rows": [1, 2]}, "rows: Input should be a valid dictionary or instance of Rows"),
    "rows as text": ({"rows": {"train": 3, "validation": "all"}}, "rows.validation: Input should be a valid integer"),
    "no train rows": ({"rows": {"validation": 3}}, "rows.train: Field required"),
    "half a character": ({"model": "\ud800"}, "model: Input should be a valid string"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_malformed_result_is_named_and_left_out(name: str, folder: Path, real: dict[str, Any]) -> None:
    change, reason = WRONG[name]
    write_json(folder / "wrong.json", {**real, **change})
    files = read_results([folder])
    assert len(files.runs) == 9
    [rejected] = files.rejected
    assert rejected.startswith(f"{folder / 'wrong.json'}: {reason}")


@pytest.mark.parametrize("content", ["{", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\xff"])
def test_what_is_no_json_is_named_and_left_out(content: str, folder: Path) -> None:
    (folder / "wrong.json").write_bytes(content.encode("latin-1"))
    [rejected] = read_results([folder]).rejected
    assert rejected.startswith(f"{folder / 'wrong.json'}: expected JSON")


def test_missing_fields_are_named(folder: Path, real: dict[str, Any]) -> None:
    write_json(folder / "wrong.json", {name: real[name] for name in ("task", "method", "seed", "score")})
    [rejected] = read_results([folder]).rejected
    assert "metric: Field required; steps: Field required; rows: Field required; and 5 more problems" in rejected


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("wrong.json", {"status": "finished"}),
        ("wrong.json", {"task": "glue/rte", "seed": 0}),
        ("glue/minilm/rte/lora-0.json", {}),
        ("glue/minilm/rte/lora-0.json", []),
        ("glue/search/minilm/rte/lora-lr0.001-101.json", {}),
        ("mine/minilm/rte/lora-0.json", {}),
    ],
)
def test_what_is_meant_as_a_result_is_named(name: str, content: Any, folder: Path, real: dict[str, Any]) -> None:
    write_json(folder / "mine" / "a.json", {**real, "experiment": "mine", "variant": "lora"})
    write_json(folder / name, content)
    files = read_results([folder])
    assert len(files.runs) == 10
    assert files.rejected == (f"{folder / name}: expected the result of a run, as sparsegrad train writes it",)


def test_other_json_is_no_result(folder: Path) -> None:
    for name in ("notes.json", "part-0.json", "glue/minilm/rte/notes.json"):
        write_json(folder / name, {"task": "glue/rte"})
    assert read_results([folder]).rejected == ()


def test_a_link_that_leads_to_itself_is_named(folder: Path) -> None:
    (folder / "loop.json").symlink_to("loop.json")
    assert read_results([folder]).rejected == (f"{folder / 'loop.json'}: Too many levels of symbolic links",)


def test_the_same_run_counts_once(folder: Path) -> None:
    """Given twice, given with its folder, or copied."""
    expected = read_results([folder]).runs
    again = read_results([folder, folder, folder / "glue", folder / "glue" / "rte" / "lora-0.json"])
    assert [run.path for run in again.runs] == [run.path for run in expected]
    assert again.rejected == ()
    shutil.copytree(folder / "glue" / "rte", folder / "old")
    copied = read_results([folder])
    assert len(copied.runs) == len(expected)
    assert len(copied.rejected) == 5
    assert all(": the same run as " in why for why in copied.rejected)


def test_a_second_result_of_a_run_of_an_experiment(folder: Path, real: dict[str, Any]) -> None:
    for name, score in (("a", 0.5), ("b", 0.75)):
        write_json(folder / f"{name}.json", {**real, "experiment": "mine", "variant": "lora", "score": score})
    files = read_results([folder / "a.json", folder / "b.json"])
    assert [run.score for run in files.runs] == [0.5]
    first, second = folder / "a.json", folder / "b.json"
    assert files.rejected == (f"{second}: the same run as {first}, or another result in its place",)
