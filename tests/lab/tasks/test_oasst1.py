"""OpenAssistant: the conversation of a tree, and the trees that are held out."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from real_models import data_folder
from sparsegrad_lab.tasks.conversations import turns
from sparsegrad_lab.tasks.load import load_task
from sparsegrad_lab.tasks.oasst1 import best_path, count_messages, from_messages, load_oasst1
from sparsegrad_lab.tasks.settings import DataArguments


def message(name: str, parent: Any, role: str, **more: Any) -> dict[str, Any]:
    """Return a message whose text is its name."""
    there = {"message_id": name, "parent_id": parent, "role": role, "text": name, "message_tree_id": name[0]}
    return {**there, "lang": "en", "rank": None, "deleted": False, **more}


def tree(letter: str, **more: Any) -> list[dict[str, Any]]:
    """Return a prompt with two answers; the second has the better rank, and two follow-ups."""
    return [
        message(letter, None, "prompter", **more),
        message(f"{letter}1", letter, "assistant", rank=1),
        message(f"{letter}2", letter, "assistant", rank=0),
        message(f"{letter}21", f"{letter}2", "prompter"),
        message(f"{letter}22", f"{letter}2", "prompter"),
        message(f"{letter}221", f"{letter}22", "assistant"),
    ]


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return folder


def nested(messages: list[dict[str, Any]], name: str) -> dict[str, Any]:
    (root,) = [m for m in messages if m["message_id"] == name]
    replies = [nested(messages, m["message_id"]) for m in messages if m["parent_id"] == name]
    return {**{key: root[key] for key in root if key not in ("parent_id", "message_tree_id")}, "replies": replies}


def test_the_best_answer_and_the_first_follow_up_that_has_one() -> None:
    assert best_path(tree("a")) == ["a", "a2", "a22", "a221"]
    later = [message("a20", "a2", "prompter"), message("a201", "a20", "assistant")]
    assert best_path([*tree("a"), *later]) == ["a", "a2", "a22", "a221"]
    assert best_path([*later, *tree("a")]) == ["a", "a2", "a20", "a201"]  # the order of the file


def test_a_message_that_is_its_own_ancestor(tmp_path: Path) -> None:
    loop = [*tree("a"), *tree("b"), message("a", "a221", "prompter")]
    splits = load_oasst1(write(tmp_path, "x.jsonl", loop)).splits.values()
    assert sorted(len(row["conversation"]) for split in splits for row in split) == [4, 4]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"a221": {"deleted": True}}, ["a", "a2"]),
        ({"a2": {"deleted": True}}, ["a", "a1"]),
        ({"a2": {"lang": "de"}}, ["a", "a1"]),
        ({"a": {"deleted": True}}, []),
        ({"a": {"lang": "de"}}, []),
        ({"a22": {"parent_id": "gone"}}, ["a", "a2"]),
        ({"a": {"parent_id": "gone"}}, []),
        ({"a2": {"rank": None}}, ["a", "a1"]),
        ({"a2": {"rank": float("nan")}}, ["a", "a1"]),
        ({"a2": {"role": "prompter"}}, ["a", "a1"]),
    ],
)
def test_what_is_left_out(change: dict[str, dict[str, Any]], expected: list[str]) -> None:
    messages = [{**m, **change.get(m["message_id"], {})} for m in tree("a")]
    assert best_path(messages, "en") == expected


def test_two_files_of_two_forms(tmp_path: Path) -> None:
    """A tree in both files is not trained on."""
    write(tmp_path, "some_validation.jsonl", [*tree("a"), *tree("b")])
    trees = [{"message_tree_id": letter, "prompt": nested(tree(letter), letter)} for letter in "bcd"]
    write(tmp_path, "other.jsonl", trees)
    task = load_oasst1(tmp_path)
    assert task.splits["train"]["conversation"][:] == [turns([c, f"{c}2", f"{c}22", f"{c}221"]) for c in "cd"]
    assert [row[0]["content"] for row in task.splits["validation"]["conversation"]] == ["a", "b"]
    assert (task.main_metric, task.labels, task.source) == ("loss", None, str(tmp_path))


@pytest.mark.parametrize("name", ["validation.jsonl", "train.jsonl"])
def test_one_file_is_split_by_trees(name: str, tmp_path: Path) -> None:
    letters = [chr(ord("A") + number) for number in range(40)]
    messages = [m for letter in letters for m in tree(letter)]
    first = load_oasst1(write(tmp_path / "x", name, messages))
    found = {split: {row[0]["content"] for row in rows["conversation"]} for split, rows in first.splits.items()}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 36, "validation": 4}
    assert found["train"] | found["validation"] == set(letters)
    # In another order, and twice the same file: the same trees.
    write(tmp_path / "y", name, messages[::-1])
    write(tmp_path / "y", f"copy-of-{name}", messages)
    second = load_oasst1(tmp_path / "y").splits
    assert {row[0]["content"] for row in second["validation"]["conversation"]} == found["validation"]
    assert len(second["train"]) == 36


def test_val_size_pools_the_files(tmp_path: Path) -> None:
    letters = [chr(ord("A") + number) for number in range(40)]
    write(tmp_path, "validation.jsonl", [m for letter in letters[:10] for m in tree(letter)])
    write(tmp_path, "other.jsonl", [m for letter in letters[10:] for m in tree(letter)])
    splits = load_oasst1(tmp_path, val_size=0.25).splits
    found = {split: {row[0]["content"] for row in rows["conversation"]} for split, rows in splits.items()}
    assert {split: len(rows) for split, rows in found.items()} == {"train": 30, "validation": 10}
    assert found["train"] | found["validation"] == set(letters)


def test_messages_of_the_hub() -> None:
    found = from_messages([*tree("a"), *tree("b")])
    assert {name: best_path(messages)[0] for name, messages in found.items()} == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"message_id": "a", "role": "prompter"}], r"x.jsonl, line 1: expected a message with .*found no text, mess"),
        ([*tree("a"), {**tree("b")[0], "text": None}], r"x.jsonl, line 7: .*found no text"),
        ([{"message_tree_id": "a", "prompt": {"message_id": "a", "text": "a"}}], r"line 1: .*found no role"),
        (["a"], r"x.jsonl, line 1: expected an object, found str"),
        ([message("a", ["x"], "prompter")], r"x.jsonl, line 1: expected a text as parent_id, found \['x'\]"),
        ([message("a", None, "prompter", rank="x")], r"x.jsonl, line 1: expected a number as rank, found 'x'"),
        ([{"prompt": {**tree("a")[0], "replies": ["x"]}}], r"x.jsonl, line 1: .*found no message_id, text, role"),
        ([message("a", None, "prompter")], r"expected conversations with an answer .* found none in 0 trees"),
    ],
)
def test_bad_files(rows: list[Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        load_oasst1(write(tmp_path, "x.jsonl", rows))


def test_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path}: expected .jsonl files of OpenAssistant")):
        load_oasst1(tmp_path)
    monkeypatch.delenv("SPARSEGRAD_DATA", raising=False)
    # What the variable says was read when the libraries were imported; without it they try for a while.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"could not be loaded from the hub .* name a folder with .jsonl files"):
        load_oasst1()


def test_the_real_files() -> None:
    folder = data_folder("oasst1")
    task = load_task("oasst1", DataArguments(folder=str(folder), language="en"))
    assert {split: len(rows) for split, rows in task.splits.items()} == {"train": 94, "validation": 188}
    assert all(len(row) % 2 == 0 for rows in task.splits.values() for row in rows["conversation"])


COUNTS = (
    "oasst1, validation: kept 554 of 2022 messages, in conversations from 188 of 191 trees; left out: 1425 beside the "
    "best conversation, 40 deleted, 3 without a usable parent"
)


def test_what_becomes_of_the_messages_of_the_real_file(caplog: pytest.LogCaptureFixture) -> None:
    """Every message of the validation file is counted once, and the log has the counts."""
    with caplog.at_level(logging.WARNING):
        load_oasst1(data_folder("oasst1"))
    assert COUNTS in caplog.messages
    assert "oasst1: 6 trees of the training files are validation trees too, and are not trained on" in caplog.messages


def test_a_cycle_and_an_orphan_are_counted() -> None:
    messages = [
        *tree("a"),
        message("x", "y", "prompter"),
        message("y", "x", "assistant"),
        message("z", "gone", "prompter"),
    ]
    assert count_messages(messages) == {
        "kept": 4, "beside the best conversation": 2, "without a usable parent": 3,
    }  # fmt: skip
