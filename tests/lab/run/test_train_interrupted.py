"""After kills, full disks and damaged checkpoints, the same command gives the result of an uninterrupted run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import TrainerCallback

from commands import Command
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.train import parse
from sparsegrad_lab.run.checkpoints import is_complete
from sparsegrad_lab.run.finished_run import open_run
from sparsegrad_lab.run.folder import RunFolder
from sparsegrad_lab.run.settings import RunArguments
from sparsegrad_lab.run.train import train

Words = Callable[..., list[str]]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in the tests: equal to the bit


def check_same(found: Path, expected: Path) -> None:
    """Check that two runs have equal files, weights, scores and logs."""
    assert {file.name for file in found.iterdir()} == {file.name for file in expected.iterdir()}
    weights, expected_weights = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (found, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    results = [RunFolder(run).read_result() for run in (found, expected)]
    for name in ("score", "scores", "steps", "best_step", "trained_entries", "training_loss_last_sixth"):
        assert results[0][name] == results[1][name], name
    timed = ("runtime", "per_second", "flos", "train_loss")  # `train_loss` is that of the steps since resuming
    logs = [
        [{k: v for k, v in entry.items() if not any(part in k for part in timed)} for entry in log]
        for log in (json.loads((run / "metrics.json").read_text(encoding="utf-8")) for run in (found, expected))
    ]
    assert logs[0] == logs[1]


# By length: an order of the library's own, which a resumed run has to find again.
LONG = ("--training.epochs", "12", "--training.learning_rate", "0.003", "--training.batches", "by_length")


@pytest.fixture(scope="module")
def long_run(words: Words, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is not interrupted."""
    folder = tmp_path_factory.mktemp("long") / "run"
    assert main(words(folder, *LONG)) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_run_resumes(
    number: signal.Signals, long_run: Path, words: Words, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = tmp_path / "run"
    # With low priority: on a busy machine, it could finish before this process sees its checkpoint.
    command = Command(words(run, *LONG), tmp_path / "printed", niceness=10)
    until = time.monotonic() + 240
    while not any(map(is_complete, (run / "checkpoints").glob("checkpoint-*"))) and command.running:
        assert time.monotonic() < until
        time.sleep(0.01)
    command.send(number)
    code, _, err = command.wait(60)
    if number is signal.SIGKILL:
        assert code == -number
    else:
        assert code == 130
        assert err.endswith(
            "sparsegrad train: interrupted; run the same command to go on, from the last checkpoint if there is one\n"
        )
        assert "Traceback" not in err
    assert not RunFolder(run).finished
    assert not (run / "adapter").exists()
    with pytest.raises(FileNotFoundError, match=r"a run that is not finished; resume it: sparsegrad train"):
        open_run(run)
    capsys.readouterr()

    assert main(words(run, *LONG)) == 0
    step = re.search(r"Resuming from step (\d+)", capsys.readouterr().err)
    assert step is not None
    assert 6 <= int(step[1]) < 72
    assert RunFolder(run).read_result()["resumed"] is True
    assert RunFolder(run).read_result()["calibration"]["seconds"] > 0  # of the process that is gone
    check_same(run, long_run)


FULL = """
import resource, sys
import sparsegrad_lab.run.train  # imports, which look for a folder to write to
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.cli.train import parse
words = sys.argv[2:]
for limit in sys.argv[1].split(","):  # SIGXFSZ is ignored by Python: writes fail
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
    status = main([*words[:-1], words[-1] + limit])
    print(f"status {status} at {limit}", file=sys.stderr)
"""
LIMITS = {
    0: "data.json",
    1000: "metrics.json|config.yaml",  # paths are part of the config
    1600: "checkpoints|metrics.json",  # adapter_config.json, by Python
    9000: "checkpoints",  # the weights, by safetensors
    12000: "checkpoints",  # the optimizer's state, by PyTorch
    16000: "curves.png",
}
"""Largest size of a file in bytes -> pattern of the file that exceeds it."""


@pytest.fixture(scope="module")
def full_disks(words: Words, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run for each limit, all in one process, because importing takes most of the time."""
    folder = tmp_path_factory.mktemp("full")
    limits = ",".join(map(str, LIMITS))
    command = [sys.executable, "-c", FULL, limits, *words(folder / "run-")]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240, check=True)
    return folder, done.stderr


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk(
    limit: int, full_disks: tuple[Path, str], words: Words, finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, err = full_disks
    run = folder / f"run-{limit}"
    assert f"status 1 at {limit}\n" in err
    line = next(line for line in err.splitlines() if line.startswith(f"sparsegrad train: {run}/"))
    assert re.match(rf"sparsegrad train: {run}/({LIMITS[limit]}): no space left \(", line)
    assert line.endswith("free some space, then run the same command to continue")
    assert "Traceback" not in err

    # No truncated file is left.
    assert not list(run.rglob(".*"))
    for file in run.glob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    for file in run.glob("*.yaml"):
        yaml.safe_load(file.read_text(encoding="utf-8"))
    assert not RunFolder(run).finished
    assert all(map(is_complete, (run / "checkpoints").glob("*")))
    assert not (run / "curves.png").exists()

    capsys.readouterr()
    assert main(words(run)) == 0
    assert ("Resuming from step 12" in capsys.readouterr().err) == (limit == 16000)
    check_same(run, finished_run)


@pytest.fixture
def stopped_run(arguments: Callable[..., RunArguments], words: Words, tmp_path: Path) -> Path:
    """A run that failed after its last step. It has checkpoints of steps 6 (the best) and 12."""
    folder = tmp_path / "run"
    RunFolder(folder).start(arguments(folder))
    (folder / "curves.png").mkdir()  # where a file is to be written
    assert main(words(folder)) == 1
    (folder / "curves.png").rmdir()
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    return folder


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


def garbled(content: bytes) -> bytes:
    """The same length with zeros in the middle, as after a power cut."""
    third = len(content) // 3
    return content[:third] + bytes(third) + content[2 * third :]


def blank(content: bytes) -> bytes:
    return bytes(len(content))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("adapter_model.safetensors", truncated),
        ("adapter_model.safetensors", blank),
        ("adapter_config.json", truncated),
        ("optimizer.pt", truncated),
        ("optimizer.pt", garbled),
        ("rng_state.pth", garbled),
        ("trainer_state.json", truncated),
        ("scheduler.pt", None),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_checkpoint_is_skipped(
    name: str,
    damage: Callable[[bytes], bytes] | None,
    stopped_run: Path,
    words: Words,
    finished_run: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    file = stopped_run / "checkpoints" / "checkpoint-12" / name
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    capsys.readouterr()
    assert main(words(stopped_run)) == 0
    err = capsys.readouterr().err
    assert "Skipped damaged checkpoints: checkpoint-12\n" in err
    assert "Resuming from step 6\n" in err
    check_same(stopped_run, finished_run)


def test_a_run_without_its_best_checkpoint_starts_again(
    stopped_run: Path, words: Words, finished_run: Path, capsys: pytest.CaptureFixture
) -> None:
    """The weights of the last step exist, but not the best ones, which the result needs."""
    (stopped_run / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors").write_bytes(b"")
    capsys.readouterr()
    assert main(words(stopped_run)) == 0
    err = capsys.readouterr().err
    assert "Skipped damaged checkpoints: checkpoint-6, checkpoint-12\n" in err
    assert "Resuming" not in err
    assert RunFolder(stopped_run).read_result()["resumed"] is False
    check_same(stopped_run, finished_run)


@pytest.mark.parametrize("moved", [False, True])
def test_a_copied_run_resumes(moved: bool, stopped_run: Path, words: Words, finished_run: Path, tmp_path: Path) -> None:
    """It reads nothing from the original folder, such as the weights of the best checkpoint, and does not miss it."""
    copy = tmp_path / "copy"
    shutil.copytree(stopped_run, copy)
    if moved:
        shutil.rmtree(stopped_run)
    for file in stopped_run.rglob("adapter_model.safetensors"):
        file.write_bytes(b"")
    assert main(words(copy)) == 0
    check_same(copy, finished_run)


def test_the_config_of_a_run_resumes_it(stopped_run: Path, finished_run: Path, capsys: pytest.CaptureFixture) -> None:
    """`evaluate` names this command for an unfinished run, also for one that was moved."""
    moved = stopped_run.rename(stopped_run.with_name("moved run"))
    for folder in (shutil.copytree(moved, stopped_run), moved):
        assert main(["evaluate", str(folder)]) == 1
        command = shlex.split(capsys.readouterr().err.rpartition("resume it: sparsegrad ")[2])
        assert ("--output" in command) is (folder == moved)
        assert main(command) == 0
        assert "Resuming from step 12\n" in capsys.readouterr().err
        check_same(folder, finished_run)


def test_a_language_model_resumes(language_words: Words, tmp_path: Path) -> None:
    """It resumes from a step in the middle, and keeps the evaluation with the lowest loss."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(language_words(whole)) == 0
    RunFolder(run).start(parse(language_words(run)[1:]))
    (run / "curves.png").mkdir()
    assert main(language_words(run)) == 1
    (run / "curves.png").rmdir()
    shutil.rmtree(run / "checkpoints" / "checkpoint-12")
    assert main(language_words(run)) == 0
    assert RunFolder(run).read_result()["resumed"] is True
    check_same(run, whole)


class KilledAtTheEnd(TrainerCallback):
    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt


def test_a_run_that_has_stopped_early_stays_so(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    """Killed before its result was written, it trains one step more, which the best weights replace."""
    more = ["--training.patience", "2", "--training.epochs", "9", "--training.learning_rate", "1e-12"]
    whole, run = (arguments(tmp_path / name, *more) for name in ("whole", "run"))
    (expected,) = train(whole, progress=False)
    with pytest.raises(KeyboardInterrupt):
        train(run, progress=False, callbacks=[KilledAtTheEnd()])
    (found,) = train(run, progress=False)
    assert found["resumed"]
    assert found["steps"] == expected["steps"] + 1
    for name in ("score", "best_step"):
        assert found[name] == expected[name]
    assert [entry["step"] for entry in found["evaluations"]] == [entry["step"] for entry in expected["evaluations"]]
