"""Lists on the command line, as people type them."""

from __future__ import annotations

import pytest

from sparsegrad_lab.cli.train import parse


@pytest.mark.parametrize("form", [("--seeds", "3,4"), ("--seeds=3,4",), ("--seeds", "[3,4]")])
def test_numbers(form: tuple[str, ...]) -> None:
    assert parse(list(form)).seeds == [3, 4]
    assert parse(["--adapter.layers", "1", *form]).adapter.layers == [1]


def test_words() -> None:
    found = parse(["--data.text", "sentence", "--data.labels", "0,1", "--data.metrics=accuracy", "--seeds", "7"])
    assert (found.data.text, found.data.labels, found.data.metrics) == (["sentence"], ["0", "1"], ["accuracy"])
    assert parse(["--data.text+", "a", "--data.text+", "b"]).data.text == ["a", "b"]
    assert parse(["--data.labels", "null"]).data.labels is None


@pytest.mark.parametrize(
    ("word", "targets"),
    [
        ("query", ["query"]),
        ("mlp.fc1,mlp.fc2", ["mlp.fc1", "mlp.fc2"]),
        (".*attention.*", ".*attention.*"),
        ("(fc1|fc2)", "(fc1|fc2)"),
        ("all-linear", "all-linear"),
    ],
)
def test_names_of_layers_or_a_regular_expression(word: str, targets: object) -> None:
    assert parse(["--adapter.target_modules", word]).adapter.target_modules == targets
