"""Your own files: four formats, labels given or found, and what a broken file is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.tasks.files import load_files
from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.read import read_rows
from sparsegrad_lab.tasks.settings import DataArguments

ROWS = [
    {"a": 'first, with "marks"', "b": "one\nline break", "label": "10"},
    {"a": "second", "b": "déjà vu", "label": "9"},
    {"a": "third\twith a tab", "b": "", "label": "9"},
]
CSV = 'a,b,label\n"first, with ""marks""","one\nline break",10\nsecond,déjà vu,9\nthird\twith a tab,,9\n'
TSV = 'a\tb\tlabel\n"first, with ""marks"""\t"one\nline break"\t10\nsecond\tdéjà vu\t9\n"third\twith a tab"\t\t9\n'
CONTENT = {
    ".csv": CSV,
    ".tsv": TSV,
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    ".jsonl": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("kind", list(CONTENT))
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_same_rows_in_four_formats(kind: str, mark: str, tmp_path: Path) -> None:
    path = written(tmp_path, f"rows{kind}", mark + CONTENT[kind])
    assert read_rows(path) == ROWS
    task = load_files(path, path, text=["a", "b"])
    assert task.splits["train"]["a"][:] == [row["a"] for row in ROWS]
    assert task.labels == ("9", "10")  # as numbers: as words, "10" would come first
    assert task.splits["train"]["label"][:] == [1, 0, 0]


def test_windows_line_ends_and_capital_endings(tmp_path: Path) -> None:
    assert read_rows(written(tmp_path, "rows.CSV", "a,label\r\nx,1\r\ny,0\r\n")) == [
        {"a": "x", "label": "1"},
        {"a": "y", "label": "0"},
    ]


def test_labels_given_and_found(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,label\na,no\nb,yes\nc,maybe\n")
    assert load_files(path, path, text=["text"]).labels == ("maybe", "no", "yes")
    task = load_files(path, path, text=["text"], labels=["yes", "no", "maybe"])
    assert task.splits["validation"]["label"][:] == [1, 0, 2]


def test_labels_of_json_that_are_no_strings(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    task = load_files(path, path, text=["text"])
    assert (task.labels, task.splits["train"]["label"][:]) == (("0", "1"), [1, 0])


def test_regression(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,score\na,1.5\nb,-2\n")
    task = load_files(path, path, text=["text"], label="score", regression=True)
    assert task.labels is None
    assert task.metrics == ("pearson", "spearmanr")
    assert task.main_metric == "combined_score"
    assert task.splits["train"]["label"][:] == [1.5, -2.0]


def test_samples_are_random_and_the_same_each_time(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50)))
    data = DataArguments(
        train_file=str(path), validation_file=str(path), text=["text"], train_rows=10, validation_rows=7
    )
    first, second = load_task("files", data), load_task("files", data)
    assert first.splits["train"]["text"][:] == second.splits["train"]["text"][:]
    assert first.splits["train"]["text"][:] != [f"t{i}" for i in range(10)]
    assert {split: len(rows) for split, rows in first.splits.items()} == {"train": 10, "validation": 7}


def refused(path: Path, words: str, **options: Any) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        load_files(path, path, **{"text": ["a", "b"], **options})
    assert str(path) in str(caught.value)


# Cut in the middle of the second row. A cut within a last field that is free text cannot be seen.
@pytest.mark.parametrize(
    ("kind", "cut_at", "words"),
    [
        (".csv", "second,dé", r"line 4: expected 3 fields \(a, b, label\), found 2; the file may be cut off here"),
        (".csv", '"one\nli', r"line 3: unexpected end of data; the file may be cut off here"),
        (".tsv", "second", r"line 4: expected 3 fields \(a, b, label\), found 1; the file may be cut off here"),
        (".json", '"b": "dé', r"line \d+: Unterminated string.*; the file may be cut off here"),
        (".json", '"9"\n', r"line \d+: Expecting ',' delimiter; the file may be cut off here"),
        (".jsonl", '"second", "b"', r"line 2: Expecting ':' delimiter; the file may be cut off here"),
    ],
)
def test_truncated_files(kind: str, cut_at: str, words: str, tmp_path: Path) -> None:
    content = CONTENT[kind]
    cut = content[: content.index(cut_at) + len(cut_at)]
    refused(written(tmp_path, f"rows{kind}", cut), words)


@pytest.mark.parametrize("kind", list(CONTENT))
def test_broken_utf8_with_its_line(kind: str, tmp_path: Path) -> None:
    content = CONTENT[kind].encode()
    at = content.index("é".encode()) + 1  # the second byte of a letter
    line = content[:at].count(b"\n") + 1
    broken = written(tmp_path, f"rows{kind}", content[:at] + content[at + 1 :])
    refused(broken, rf"line {line}: expected UTF-8, found the byte 0xc3; convert the file")


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.csv", ""), ("b.csv", "a,b,label\n"), ("c.tsv", ""), ("d.json", "[]"), ("e.jsonl", "\n")],
)
def test_empty_files(name: str, content: str, tmp_path: Path) -> None:
    refused(written(tmp_path, name, content), "expected rows, found none")


@pytest.mark.parametrize(
    ("name", "content", "options", "words"),
    [
        ("a.csv", "a,b,label\nx,y,1\nx,y,1\n", {}, r"two different labels in 'label', found 1; for a number"),
        ("b.csv", "a,label\nx,1\n", {}, r"expected a column 'b', found 'a', 'label'"),
        ("c.csv", "a,b,class\nx,y,1\n", {}, r"expected a column 'label', found 'a', 'b', 'class'"),
        ("d.csv", "a,b,label\nx,y,1\nx,y,2\n", {"labels": ["0", "1"]}, r"line 3: expected one of '0', '1' as 'label'"),
        ("e.csv", "a,b,label\nx,y,1\nx,y,many\n", {"regression": True}, r"line 3: expected a number as 'label', fou"),
        ("f.csv", "a,b,label\nx,y,nan\n", {"regression": True}, r"line 2: expected a number as 'label', found 'nan'"),
        ("g.json", '{"rows": []}', {}, r"expected a list of objects, found dict"),
        ("h.json", '["x"]', {}, r"line 1: expected an object, found str"),
        ("i.jsonl", '{"a": "x", "b": "y", "label": 1}\n{"a": "x", "b": null}', {}, "line 2: no value for b"),
        ("j.jsonl", '{"a": "x", "b": "y", "label": 1}\n{"a": "x", "label": 0}\n', {}, r"line 2: expected a column 'b'"),
        ("k.jsonl", '{"a": "x", "b": "y", "label": 1}\n{"a": "x", "b": "y"}', {}, r"line 2: expected a column 'label'"),
        ("l.txt", "x", {}, r"expected a file that ends in .csv, .tsv, .json, .jsonl"),
    ],
)  # fmt: skip
def test_bad_files(name: str, content: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    refused(written(tmp_path, name, content), words, **options)


def test_label_that_only_the_rows_to_evaluate_on_have(tmp_path: Path) -> None:
    train = written(tmp_path, "train.csv", "a,label\nx,0\ny,1\n")
    other = written(tmp_path, "dev.csv", "a,label\nx,2\n")
    with pytest.raises(ValueError, match=r"dev.csv, line 2: expected one of '0', '1' as 'label', found '2'"):
        load_files(train, other, text=["a"])


def test_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "none.csv"
    with pytest.raises(FileNotFoundError, match=f"{re.escape(str(path))}: no such file"):
        load_files(path, path, text=["a"])


@pytest.mark.parametrize("text", [[], ["a", "b", "c"]])
def test_number_of_text_columns(text: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"expected one or two text columns, found {len(text)}"):
        load_files(None, tmp_path / "x.csv", text=text)


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("glue/ax", {}, r"unknown task 'glue/ax'; expected one of acceptability, files, glue/cola"),
        ("files", {}, r"expected data.train_file, data.validation_file and data.text .* found None, None and \[\]"),
        ("glue/rte", {"train_file": "x.csv"}, r"are for task files or text, found task 'glue/rte'"),
        ("acceptability", {"train_rows": 0}, r"data.train_rows must be at least 1, found 0"),
        ("acceptability", {"metrics": ["f2"]}, r"expected metrics among accuracy, .*; found f2"),
        ("acceptability", {"metrics": ["pearson"]}, r"classes take accuracy, .*; found pearson"),
    ],
)
def test_bad_requests(name: str, data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load_task(name, DataArguments(**data))


def test_metrics_that_do_not_fit_the_labels(tmp_path: Path) -> None:
    path = str(written(tmp_path, "rows.csv", "a,label\nx,0\ny,1\nz,2\n"))
    files = {"train_file": path, "validation_file": path, "text": ["a"]}
    with pytest.raises(ValueError, match=r"f1 is that of class 1 of two, found 3 classes; use macro_f1"):
        load_task("files", DataArguments(**files, metrics=["f1"]))
    with pytest.raises(ValueError, match=r"a number to predict takes pearson, spearmanr; found accuracy"):
        load_task("files", DataArguments(**files, metrics=["accuracy"], regression=True))
    assert load_task("files", DataArguments(**files, metrics=["macro_f1"])).metrics == ("macro_f1",)
