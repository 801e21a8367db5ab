"""Upload to the hub: the real client, over HTTP, to a hub on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hub_server import hub
from sparsegrad_lab.cli.main import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Folder of the hub that the client is connected to, with a login."""
    (tmp_path / "hub").mkdir()
    with hub(tmp_path / "hub") as (address, _):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "writer")
        yield tmp_path / "hub"


def test_push_a_finished_run(finished_run: Path, words: Any, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The repository holds the adapter's folder, and the run is not repeated."""
    assert main([*words(finished_run), "--push_to_hub", "someone/adapter"]) == 0
    found = capsys.readouterr()
    assert "this run is finished; nothing to do" in found.err
    assert found.out.endswith("uploaded to the hub: someone/adapter\n")
    repository = root / "models" / "someone" / "adapter"
    here = {path.name: path.read_bytes() for path in (finished_run / "adapter").iterdir()}
    assert {path.name: path.read_bytes() for path in repository.iterdir()} == here


def test_no_right_to_write(words: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    """Found before the training."""
    monkeypatch.setenv("HF_TOKEN", "reader")
    assert main([*words(tmp_path / "run"), "--hub_model_id", "someone/adapter"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("sparsegrad train: push_to_hub (--hub_model_id): someone/adapter cannot be created (")
    assert "log in with: hf auth login" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (["--push_to_hub", "a b"], "push_to_hub: expected a repository, such as me/my-adapter; found 'a b'"),
        (["--push_to_hub", "me/a", "--seeds", "1,2"], "push_to_hub: a repository holds the adapter of one seed"),
    ],
)
def test_refused(more: list[str], problem: str, words: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words(tmp_path / "run"), *more]) == 2
    assert problem in capsys.readouterr().err
