"""What is refused before a task is loaded."""

from __future__ import annotations

import sys
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from sparsegrad_lab.tasks.settings import DataArguments

FILES = {"validation_file": __file__, "text": ["a"]}


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("glue/ax", {}, r"unknown task 'glue/ax'; expected one of acceptability, files, glue/cola"),
        ("files", {}, r"task files needs data.validation_file \(or data.train_file and data.val_size\), data.text"),
        ("images", {}, r"task images needs data.folder"),
        ("glue/rte", {"train_file": "x.csv"}, r"data.train_file is for files, text; task glue/rte does not read it"),
        ("acceptability", {"folder": "x"}, r"data.folder is for glue/\*, quora, paraphrases, oasst1, images; task"),
        ("text", {**FILES, "labels": ["a", "b"]}, r"data.labels is for files; task text does not read it"),
        (
            "glue/rte",
            {"template": "plain"},
            r"data.template is for paraphrases, oasst1, text; task glue/rte does not read it",
        ),
        (
            "files",
            {**FILES, "packing": True},
            r"data.packing is for paraphrases, oasst1, text; task files does not read it",
        ),
        ("acceptability", {"train_rows": 0}, r"data.train_rows must be at least 1, found 0"),
        ("acceptability", {"metrics": ["f2"]}, r"expected some of accuracy, .*; found f2"),
        ("files", {"validation_file": "none.csv", "text": ["a"]}, r"none.csv: no such file"),
        ("files", FILES, r"test_settings.py: expected a file that ends in .csv"),
        ("files", {**FILES, "text": ["a", "b", "c"]}, r"data.text: expected one or two columns, found 3"),
        ("files", {**FILES, "labels": ["0", "0", "1"]}, r"data.labels: expected different classes, found '0' twice"),
        ("files", {**FILES, "val_size": 0.1}, r"data.validation_file and data.val_size exclude each other; give one"),
        (
            "acceptability",
            {"val_size": 0.1},
            r"data.val_size is for files, glue/\*, quora, paraphrases, oasst1, text; task acceptability",
        ),
        ("text", {"train_file": "a.csv", "text": ["a"], "val_size": 1.5}, r"data.val_size must be between 0 and 1"),
        (
            "files",
            {**FILES, "labels": ["0", "1"], "regression": True},
            r"data.labels: a task with data.regression has no classes; give one of the two",
        ),
        ("files", {**FILES, "labels": ["0"]}, r"data.labels: expected at least two classes, found 1"),
        ("glue/rte", {"folder": "nowhere"}, r"nowhere: expected train.tsv and dev.tsv of RTE"),
        ("oasst1", {"folder": "nowhere"}, r"nowhere: expected .jsonl files"),
        ("images", {"folder": "nowhere"}, r"there is no folder nowhere"),
    ],
)
def test_problems(name: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        raise ValueError("\n".join(DataArguments(**data).problems(name)))


def test_no_problems(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,label\nwarm,1\n", encoding="utf-8")
    assert DataArguments().problems("acceptability") == []
    assert DataArguments(validation_file=str(file), text=["a"], labels=["-1", "1"]).problems("files") == []


def test_settings_are_light() -> None:
    code = "import sys, sparsegrad_lab.tasks.settings as s; s.DataArguments().problems('x'); print(*sys.modules)"
    loaded = run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "datasets", "numpy", "scipy", "sklearn"} & set(loaded)
