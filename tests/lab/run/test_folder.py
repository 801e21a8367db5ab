"""Drafts of a killed process do not count as content; changed settings or rows are another run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.search import search
from sparsegrad_lab.run.settings import RunArguments, SearchArguments
from sparsegrad_lab.run.train import train
from sparsegrad_lab.run.whole_files import content_of

Arguments = Callable[..., RunArguments]
DRAFT = ".config.yaml.0123456789ab.draft"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A folder in the state that a kill during the first write leaves."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / DRAFT).write_text("model: min", encoding="utf-8")
    return folder


def test_train_uses_a_folder_with_a_draft(killed: Path, arguments: Arguments) -> None:
    assert content_of(killed) == []
    train(arguments(killed, "--method", "lora", "--training.epochs", "1"), progress=False)
    assert RunFolder(killed).finished
    assert not (killed / DRAFT).exists()


def test_search_uses_a_folder_with_a_draft(killed: Path, arguments: Arguments) -> None:
    settings = arguments(killed, "--method", "lora", "--training.epochs", "1")
    result = search(settings, SearchArguments(trials=1, lowest=1e-3), lambda line: None)
    assert len(result["trials"]) == 1


def test_other_hidden_files_are_content(killed: Path, arguments: Arguments) -> None:
    (killed / ".notes").write_text("mine", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"is not empty and holds no run"):
        RunFolder(killed).check(arguments(killed))


def test_changed_rows_are_another_run(tmp_path: Path) -> None:
    """Also where only their content has changed; a folder of an earlier version does not tell."""
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\na,0\nb,1\n", encoding="utf-8")
    found = parse(["--task", "files", "--text", "text", "--train_file", str(rows), "--val_size", "0.5"])
    folder = RunFolder(tmp_path / "run")
    folder.start(found)
    folder.check(found)
    rows.write_text("text,label\na,1\nb,0\n", encoding="utf-8")
    with pytest.raises(FileExistsError, match=r"differs in data.train_file \(.*rows.csv with SHA-256 [0-9a-f]{12}"):
        folder.check(found)
    (folder.path / "data.json").unlink()
    folder.check(found)


def test_a_kill_before_the_settings_are_written(killed: Path, arguments: Arguments) -> None:
    (killed / "data.json").write_text("{}", encoding="utf-8")
    RunFolder(killed).check(arguments(killed))


def test_one_process_trains_into_a_folder(arguments: Arguments, tmp_path: Path) -> None:
    """A second one would remove the checkpoints of the first. Its lock goes with it."""
    asked = arguments(tmp_path / "run", "--method", "lora", "--training.epochs", "1")
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"):
        for use in (RunFolder(tmp_path / "run").check, RunFolder(tmp_path / "run").start):
            with pytest.raises(FileExistsError, match=r"run: another process trains into this folder; wait for it"):
                use(asked)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    train(asked, progress=False)
    assert not (tmp_path / "run" / ".lock").exists()
