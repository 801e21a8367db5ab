"""Lists on the command line, as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsegrad_lab.cli import search
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.exit_codes import RefusedError


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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora_r", "16"], "--rank is for lora, galore, and method sparsegrad does not read it"),
        (["--method", "full", "--adapter.rank=16"], "and method full does not read it"),
        (["--text", "a,a"], "expected columns that differ from each other"),
        (["--task", "files", "--text", "label"], "and from the label column 'label'"),
    ],
)
def test_settings_that_have_no_effect(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, RefusedError)) as caught:
        parse(words).check()
    assert message in f"{capsys.readouterr().err}{caught.value}"


def test_a_file_may_hold_settings_of_other_methods(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("adapter: {rank: 16, narrow: 32}\n", encoding="utf-8")
    assert parse(["--config", str(tmp_path / "all.yaml")]).adapter.rank == 16


@pytest.mark.parametrize("words", [["--learning_rate", "1e-3"], ["--batch_size", "8"]])
def test_a_search_draws_what_it_searches(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        search.main(words)
    assert "a search draws it; set --search." in capsys.readouterr().err
