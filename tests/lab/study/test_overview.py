"""Tables about a study as a whole."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sparsegrad_lab.inspection.inspect import inspect
from sparsegrad_lab.inspection.shipped_models import FOLDER, PUBLISHED
from sparsegrad_lab.study.experiment_files import experiment_names
from sparsegrad_lab.study.overview import overview, parameters
from sparsegrad_lab.study.page import render_page
from sparsegrad_lab.study.report import markdown
from sparsegrad_lab.study.sections import Report, Section


def test_all_experiments_are_in_the_overview(study: Section, section: Section) -> None:
    """Also those that were not run; where there is no study, there is none."""
    assert overview([section]) is None
    assert overview([study]) is None  # a section alone says all of it itself
    digits = replace(study, name="digits", experiment="digits", tasks=("rte",))
    table = overview([study, digits])
    assert table is not None
    assert len(table.rows) == len(experiment_names())
    by = {row[0]: row[2:] for row in table.rows}
    said = "sparsegrad against lora: too few runs to tell. +10.00 points over 1 pair of runs, ahead in 1."
    one = "rte, 1 of 5 tasks, one seed: sparsegrad 60.0, lora 50.0."
    assert by["The paper's comparison"] == [f"{one} {said}", "2 of 75"]
    assert by["A vision transformer"] == [f"rte, one seed: sparsegrad 60.0, lora 50.0. {said}", "2 of 68"]
    assert by["Attention layers"] == ["not run", "0 of 12"]
    assert by["An encoder-decoder"] == ["not run: its sizes are for scale paper", ""]
    page = render_page(Report([study, digits]), "t")
    assert "<li>Attention layers: " in page.partition("Experiments without a run")[2]
    assert "<li>An encoder-decoder: Does the method work on T5? (not run: its sizes are for scale paper)</li>" in page
    failed = [replace(section, runs=(), trials=()) for section in (study, digits)]
    table = overview(failed)
    assert table is not None
    assert [row[2:] for row in table.rows if row[0] == "A vision transformer"] == [
        ["No run has a score yet.", "0 of 68"]
    ]
    assert "## Questions and answers" in markdown(Report([study, digits]), "t")


def test_parameters_by_part() -> None:
    """Counted from the configs; the paper's own numbers are these, rounded."""
    table = parameters()
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(rows) == ["bert-base", "llama-2-7b", "roberta-base", "roberta-large"]
    assert rows["bert-base"]["MLP"] == "56.7 M, 51.8 % (57)"
    assert rows["llama-2-7b"]["total, M"] == "6,738.4 (6,700)"
    assert rows["roberta-base"]["embeddings"] == "39.0 M, 31.3 % (40)"
    for model, said in PUBLISHED.items():
        parts = inspect(str(FOLDER / model)).parts
        for part, count in said.items():
            found = parts.total if part == "total" else getattr(parts, part)
            assert found == pytest.approx(count, abs=0.06e9 if count >= 1e8 and model == "llama-2-7b" else 1.1e6)
