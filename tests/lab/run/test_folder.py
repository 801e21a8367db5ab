"""Drafts of a killed process do not count as content, and weights are on the disk before `result.json`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run import folder as module
from sparsegrad_lab.run.folder import RunFolder, content_of, save_whole
from sparsegrad_lab.run.search import search
from sparsegrad_lab.run.settings import RunArguments, SearchArguments
from sparsegrad_lab.run.train import train

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


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of open files: Linux's")
def test_files_are_synced_before_the_folder_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`result.json` is written after the weights' folder. A power cut between the two must not leave empty weights."""
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        real_sync(descriptor)

    def replace(source: Path, target: Path) -> None:
        events.append(f"rename to {target.name}")
        real_replace(source, target)

    monkeypatch.setattr(module.os, "fsync", sync)
    monkeypatch.setattr(module.os, "replace", replace)

    def save(draft: Path) -> None:
        draft.mkdir()
        (draft / "weights").write_bytes(b"1")
        (draft / "config").write_bytes(b"2")

    save_whole(tmp_path / "adapter", save)
    RunFolder(tmp_path).write_json("result.json", {})
    assert sorted(events[:3]) == [".adapter.draft", "config", "weights"]
    assert events[3:5] == ["rename to adapter", tmp_path.name]
    assert events[5].startswith(".result.json.")
    assert events[6:] == ["rename to result.json", tmp_path.name]


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
        with pytest.raises(FileExistsError, match=r"run: another process trains into this folder; wait for it"):
            train(asked, progress=False)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    train(asked, progress=False)
    assert not (tmp_path / "run" / ".lock").exists()
