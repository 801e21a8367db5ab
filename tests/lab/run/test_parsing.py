"""Lists on the command line, as people type them."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsegrad_lab.cli import search
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.exit_codes import RefusedError
from sparsegrad_lab.run.folder import output_folder


@pytest.mark.parametrize("form", [("--seeds", "3,4"), ("--seeds=3,4",), ("--seeds", "[3,4]")])
def test_numbers(form: tuple[str, ...]) -> None:
    assert parse(list(form)).seeds == [3, 4]
    assert parse(["--adapter.layers", "1", *form]).adapter.layers == [1]


@pytest.mark.parametrize("config", [["--config", "{file}"], ["--config={file}"]])
def test_the_command_line_overrides_the_file_in_any_order(config: list[str], tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("training: {epochs: 2}\noutput: ~/there\n", encoding="utf-8")
    named = [word.format(file=file) for word in config]
    for words in ([*named, "--epochs", "1"], ["--epochs", "1", *named]):
        found = parse(words)
        assert found.training.epochs == 1
        assert output_folder(found) == Path.home() / "there"


def test_files_that_would_be_read_in_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("training: 3\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(["--config", str(file)])
    assert "training: expected settings, found 3" in capsys.readouterr().err
    file.write_text("training:\n  epochs: 1\nseeds: [1]\ntraining:\n  batch_size: 4\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"own.yaml: .*found the key 'training' twice, again in line 4"):
        parse(["--config", str(file)])


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


def test_two_names_of_one_setting_in_any_of_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a file read last overrides one read first."""
    first, last = tmp_path / "first.yaml", tmp_path / "last.yaml"
    first.write_text("{preset: paper/bert-base/rte, epochs: 2}\n", encoding="utf-8")
    last.write_text("training: {epochs: 3}\n", encoding="utf-8")
    words = ["--config", str(first), "--config", str(last)]
    found = parse(words)
    assert (found.task, found.training.epochs) == ("glue/rte", 3)
    first.write_text("{lr: 1, training: {learning_rate: 1}}\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        parse(words)
    assert "lr and training.learning_rate are two names of one setting" in capsys.readouterr().err
