"""Which run of an experiment is repeated."""

from __future__ import annotations

import json

import pytest

import repeat

REPEATABLE = sorted(folder.name for folder in repeat.STUDY.iterdir())


@pytest.mark.parametrize("experiment", REPEATABLE)
def test_a_whole_run_is_repeated(experiment: str) -> None:
    """A resumed run has the time since it was resumed, and would be taken for a short one."""
    file = repeat.shortest_run(experiment)
    result = json.loads(file.read_text(encoding="utf-8"))
    assert "search" not in file.relative_to(repeat.STUDY).parts
    assert result["status"] == "finished"
    assert not result.get("resumed")


def test_an_experiment_without_runs_is_named() -> None:
    with pytest.raises(ValueError, match="no-experiment: expected a finished run that was not resumed, found none"):
        repeat.shortest_run("no-experiment")
