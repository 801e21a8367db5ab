"""The simulated scale: its formulas beside two real processes, and its tables in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

import scale

SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.mark.slow
def test_counted_bytes_are_those_of_two_processes() -> None:
    """Calibration also sends sums of the weights' bits, which show whether they are equal."""
    found = scale.check()
    assert list(found) == ["calibration, DDP", "step, DDP", "step, FSDP2"]
    for name, numbers in found.items():
        extra = numbers["measured"] - numbers["counted"]
        assert extra == 0 if name.startswith("step") else 0 < extra < 4096, name


def test_the_documentation_has_the_tables() -> None:
    assert scale.tables() in SCALING.read_text(encoding="utf-8")


def test_what_does_not_fit_is_said() -> None:
    largest = scale.MODELS[-1]
    assert scale.best(largest, "full", 8) is None
    step = scale.best(scale.MODELS[0], "sparsegrad", 64)
    assert step is not None
    assert step.engine == "DDP"
