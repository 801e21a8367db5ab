"""The sentence that a report begins with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsegrad_lab.study.answer import answer
from sparsegrad_lab.study.runs import Run
from sparsegrad_lab.study.sections import Section


def with_scores(section: Section, metric: str, ours: list[float], theirs: list[float]) -> Section:
    """A section of one task with these scores of sparsegrad and of lora."""
    first = section.runs[0]
    runs: list[Run] = [
        first.model_copy(update={"method": method, "task": "t", "seed": seed, "score": score, "metric": metric})
        for method, scores in (("sparsegrad", ours), ("lora", theirs))
        for seed, score in enumerate(scores)
    ]
    return replace(section, runs=tuple(runs), tasks=("t",), methods={"sparsegrad": "", "lora": ""})


LORA = [0.60, 0.61, 0.59, 0.62, 0.60, 0.61]


@pytest.mark.parametrize(
    ("metric", "ours", "expected"),
    [
        ("accuracy", [s + d for s, d in zip(LORA, [0.05, 0.06, 0.05, 0.06, 0.05, 0.06], strict=True)],
         "sparsegrad is better than lora: +5.50 points over 6 pairs of runs, ahead in 6 (95 % interval +4.93 to "
         "+6.07)."),
        ("accuracy", LORA[::-1], "sparsegrad against lora: no significant difference. +0.00 points over 6 pairs"),
        ("accuracy", [0.7, 0.72], "sparsegrad against lora: too few runs to tell. +10.50 points over 2 pairs of runs"),
        ("accuracy", [0.7], "sparsegrad against lora: too few runs to tell. +10.00 points over 1 pair of runs"),
        ("loss", [s + d for s, d in zip(LORA, [0.05, 0.06, 0.05, 0.06, 0.05, 0.06], strict=True)],
         "sparsegrad is worse than lora: +0.0550 in loss (lower is better) over 6 pairs"),
    ],
)  # fmt: skip
def test_sentence(metric: str, ours: list[float], expected: str, section: Section) -> None:
    found = answer([with_scores(section, metric, ours, LORA)])
    assert found is not None
    assert found.sentence.startswith(expected)


def test_the_first_section_that_can_tell(section: Section, study: Section) -> None:
    """One with enough pairs goes before one with more pairs that comes later; without any, the first verdict."""
    enough = with_scores(section, "accuracy", LORA[::-1], LORA)
    found = answer([study, section, enough])
    assert found is not None
    assert found.section is enough
    found = answer([study, section])
    assert found is not None
    assert found.section is section  # of two with too few pairs, the one with more
    alone = replace(section, methods={"sparsegrad": ""}, runs=tuple(section.runs_of(method="sparsegrad")))
    found = answer([alone])
    assert found is not None
    assert found.sentence == "4 runs of sparsegrad; no comparison with lora is possible."
    assert answer([]) is None
