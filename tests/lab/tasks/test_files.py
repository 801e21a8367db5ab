"""Tasks of your own files: labels, values, texts, conversations."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.tasks.conversations import turns
from sparsegrad_lab.tasks.files import load_files, load_texts
from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.settings import DataArguments


def written(folder: Path, name: str, content: str) -> Path:
    path = folder / name
    path.write_text(content, encoding="utf-8")
    return path


def json_lines(folder: Path, *rows: dict[str, Any]) -> Path:
    return written(folder, "rows.jsonl", "\n".join(map(json.dumps, rows)))


def test_labels_given_and_found(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,label\na,no\nb,yes\nc,maybe\n")
    assert load_files(path, path, text=["text"]).labels == ("maybe", "no", "yes")
    task = load_files(path, path, text=["text"], labels=["yes", "no", "maybe"])
    assert task.splits["validation"]["label"][:] == [1, 0, 2]


def test_labels_of_json_that_are_numbers(tmp_path: Path) -> None:
    path = json_lines(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1.0})
    task = load_files(path, path, text=["text"])
    assert (task.labels, task.splits["train"]["label"][:]) == (("0", "1"), [1, 0, 1])


def test_regression(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,score\na,1.5\nb,-2\n")
    task = load_files(path, path, text=["text"], label="score", regression=True)
    assert task.labels is None
    assert task.metrics == ("pearson", "spearmanr")
    assert task.main_metric == "combined_score"
    assert task.splits["train"]["label"][:] == [1.5, -2.0]


def test_evaluation_rows_that_are_trained_on_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = written(tmp_path, "train.csv", "text,label\na,no\nb,yes\nc,no\n")
    validation = written(tmp_path, "validation.csv", "text,label\nd,no\ne,yes\n")
    load_files(train, validation, text=["text"])
    load_files(None, validation, text=["text"])
    load_texts(train, validation, text=["text"])
    assert not caplog.messages
    said = "evaluation rows are also training rows in"
    load_files(train, train, text=["text"])
    assert caplog.messages.pop().startswith(f"{train}: 3 of 3 {said} {train}; their score says little")
    chat = [{"messages": turns([text, "An answer"])} for text in ("a", "b", "c", "c")]
    repeated = json_lines(tmp_path, *chat)
    load_texts(repeated, None, text=["messages"], val_size=0.75)
    assert f"{repeated}: 1 of 3 {said}" in caplog.messages.pop()


def test_samples_are_random_and_the_same_each_time(tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(50)))
    data = DataArguments(
        train_file=str(path), validation_file=str(path), text=["text"], train_rows=10, validation_rows=7
    )
    first, second = load_task("files", data), load_task("files", data)
    assert first.splits["train"]["text"][:] == second.splits["train"]["text"][:]
    assert first.splits["train"]["text"][:] != [f"t{i}" for i in range(10)]
    assert {split: len(rows) for split, rows in first.splits.items()} == {"train": 10, "validation": 7}


def test_classes_in_another_order(tmp_path: Path) -> None:
    """As a model's head has them; upper and lower case may differ."""
    path = written(tmp_path, "rows.csv", "text,label\na,no\nb,yes\nc,maybe\n")
    task = load_files(path, path, text=["text"])
    other = task.with_label_order(["YES", "NO", "MAYBE"])
    assert other.labels == ("yes", "no", "maybe")
    assert other.splits["train"]["label"][:] == [1, 0, 2]
    assert task.with_label_order(["LABEL_0", "LABEL_1", "LABEL_2"]) is task
    assert task.with_label_order(["yes", "no"]) is task


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("a,b,label\nx,y,1\nx,y,1\n", {}, r"two different labels in 'label', found 1; to predict a number set"),
        ("a,label\nx,1\n", {}, r"expected a column 'b', found 'a', 'label'"),
        ("a,b,class\nx,y,1\n", {}, r"expected a column 'label', found 'a', 'b', 'class'"),
        ("a,b,label\nx,y,1\nx,y,2\n", {"labels": ["0", "1"]}, r"line 3: expected one of '0', '1' as 'label'"),
        ("a,b,label\nx,y,1\nx,y,\n", {}, r"line 3: expected a class as 'label', found ''"),
        ("a,b,label\nx,y,1\n", {"text": []}, r"expected one or two text columns, found 0"),
    ],
)
def test_bad_files(content: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    path = written(tmp_path, "rows.csv", content)
    with pytest.raises(ValueError, match=words):
        load_files(path, path, **{"text": ["a", "b"], **options})


def test_a_label_that_only_evaluation_rows_have(tmp_path: Path) -> None:
    train = written(tmp_path, "train.csv", "a,label\nx,0\ny,1\n")
    other = written(tmp_path, "dev.csv", "a,label\nx,2\n")
    with pytest.raises(ValueError, match=r"dev.csv, line 2: expected one of '0', '1' as 'label', found '2'"):
        load_files(train, other, text=["a"])


def test_metrics_that_do_not_fit_the_labels(tmp_path: Path) -> None:
    path = str(written(tmp_path, "rows.csv", "a,label\nx,0\ny,1\nz,2\n"))
    files: dict[str, Any] = {"train_file": path, "validation_file": path, "text": ["a"]}
    with pytest.raises(ValueError, match=r"f1 is for two classes, found 3; use macro_f1"):
        load_task("files", DataArguments(**files, metrics=["f1"]))
    with pytest.raises(ValueError, match=r"expected for regression pearson, spearmanr; found accuracy"):
        load_task("files", DataArguments(**files, metrics=["accuracy"], regression=True))
    assert load_task("files", DataArguments(**files, metrics=["macro_f1"])).metrics == ("macro_f1",)


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (["messages"], {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}),
        (["conversations"], {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}),
        (
            ["prompt", "completion"],
            {"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello."}]},
        ),
    ],
)
def test_conversations(text: list[str], row: dict[str, Any], tmp_path: Path) -> None:
    path = json_lines(tmp_path, row, row)
    task = load_texts(path, path, text=text)
    assert task.text == tuple(text)
    assert [found[text[0]] for found in task.splits["train"]] == [turns(["Hi", "Hello."])] * 2


def test_the_formats_of_the_data_page(tmp_path: Path) -> None:
    """Each row of the table in docs/data.md can be loaded with the columns beside it."""
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `([\w,]+)` \| `(\{.*\})` \|", page, re.M)
    assert len(table) == 5
    for number, (columns, row) in enumerate(table):
        path = written(tmp_path, f"{number}.jsonl", row)
        task = load_texts(path, path, text=columns.split(","))
        assert len(task.splits["train"]) == 1


def test_prompt_and_completion_as_texts(tmp_path: Path) -> None:
    row = {"prompt": "Hi", "completion": "Hello."}
    path = json_lines(tmp_path, row)
    assert load_texts(None, path, text=["prompt", "completion"]).splits["validation"][:] == {
        "prompt": ["Hi"], "completion": ["Hello."],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "row", "words"),
    [
        (["chat"], {"chat": [{"role": "user", "content": "Hi"}]}, r"line 1: expected a text as 'chat', found a list"),
        (["text"], {"text": {"a": 1}}, r"line 1: expected a text as 'text', found an object"),
        (["messages"], {"messages": "Hi"}, r"line 1, messages: expected a list of messages .*found a text"),
        (["conversation"], {"conversation": "Hi"}, r"must not be named messages, conversations or conversation"),
        (["messages"], {"text": "Hi"}, r"line 1, messages: expected a list of messages .*found None"),
        (["prompt", "completion"], {"prompt": [], "completion": "x"}, r"line 1, prompt: expected a list of messages"),
        (["prompt", "completion"], {"prompt": "x", "completion": {}}, r"expected a text as 'completion', found an obj"),
    ],
)
def test_nested_values_that_are_no_conversations(
    text: list[str], row: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = json_lines(tmp_path, row)
    with pytest.raises(ValueError, match=words):
        load_texts(path, path, text=text)


def test_nested_values_in_other_columns_are_not_read(tmp_path: Path) -> None:
    row = {"text": "Hi", "meta": {"source": "x"}, "empty": None}
    path = json_lines(tmp_path, row)
    assert load_texts(None, path, text=["text"]).splits["validation"][0] == {"text": "Hi"}
