"""Weights are on the disk before `result.json`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sparsegrad_lab.run import whole_files as module
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.whole_files import save_whole


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
