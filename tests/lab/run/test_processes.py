"""The command in two processes, under `torchrun` or as it starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from commands import Command
from groups_of_processes import free_port, launcher_environment
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.processes import process_count, rank, work_alone

Words = Callable[..., list[str]]
MODULE = ["-m", "sparsegrad_lab.cli.main"]


def torchrun(n: int = 2) -> list[str]:
    return [
        sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={n}", f"--master-port={free_port()}", *MODULE,
    ]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run_both(words: list[str], folder: Path) -> tuple[str, str]:
    """Run a command in two processes of one group. Returns what rank 0 prints; the other one prints nothing."""
    port = free_port()
    both = [Command(words, folder / f"printed-{rank}", launcher_environment(rank, 2, port)) for rank in range(2)]
    (code, output, errors), (other, silent, _) = (command.wait() for command in both)
    assert (code, other) == (0, 0), errors
    assert silent == ""
    return output, errors


@pytest.fixture
def no_dropout(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT without dropout, whose random numbers differ between the processes."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    config = json.loads((folder / "config.json").read_text())
    changed = {**config, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def kill_rank(launcher: subprocess.Popen[str], number: int) -> None:
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if process.environ().get("RANK") == str(number):
            process.send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(900)  # six processes import the training stack: minutes on a busy machine
def test_two_processes_train_as_one_also_after_a_kill(words: Words, no_dropout: Path, tmp_path: Path) -> None:
    """Rank 1 is killed under torchrun, and two processes resume. One process takes the rows of both in each step."""
    settings = ["--model", str(no_dropout), "--training.epochs", "12", "--training.batches", "by_length"]
    run = tmp_path / "run"
    launcher = start([*torchrun(), *words(run, *settings)])
    deadline = time.monotonic() + 200
    while not list((run / "checkpoints").glob("checkpoint-*/trainer_state.json")):
        assert launcher.poll() is None, launcher.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    kill_rank(launcher, 1)
    _, errors = launcher.communicate(timeout=120)
    assert launcher.returncode != 0, errors
    assert not (run / "result.json").exists()

    assert main(words(run, *settings)) == 1  # one process would take half of the rows in each step
    output, errors = run_both(words(run, *settings), tmp_path)
    assert output.count("folder: ") == 1
    assert "Resuming from step" in errors
    result = json.loads((run / "result.json").read_text())
    assert result["resumed"]
    assert (result["environment"]["processes"], result["environment"]["engine"]) == (2, "DDP")
    assert result["steps"] == 12 * 3

    alone = tmp_path / "alone"
    assert main(words(alone, *settings, "--training.batch_size", "16")) == 0
    expected = json.loads((alone / "result.json").read_text())
    assert (expected["environment"]["processes"], expected["environment"]["engine"]) == (1, "one process")
    assert result["steps"] == expected["steps"]
    found, right = (scores(one) for one in (result, expected))
    assert found == pytest.approx(right, abs=1e-3)
    adapters = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (run, alone)]
    assert adapters[0].keys() == adapters[1].keys()


@pytest.mark.slow
def test_two_processes_search_together(search_words: Words, tmp_path: Path) -> None:
    """Rank 0 chooses the settings of each trial, and both processes train it."""
    folder = tmp_path / "search"
    searched = [*search_words(folder), "--search.trials", "2", "--search.batch_sizes", "[4]"]
    output, _ = run_both(searched, tmp_path)
    assert [line.partition(":")[0] for line in output.splitlines() if line.startswith("trial ")] == [
        "trial 0",
        "trial 1",
    ]
    assert output.count("best of 2 trials") == 1
    found = json.loads((folder / "search.json").read_text())
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    results = [json.loads((folder / f"trial-{number:03d}" / "result.json").read_text()) for number in range(2)]
    assert [result["environment"]["processes"] for result in results] == [2, 2]
    assert [result["steps"] for result in results] == [2 * 48 // 8] * 2


@pytest.mark.parametrize("verb", ["evaluate", "demo", "bench"])
def test_other_verbs_are_refused(verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, said in (
        (0, f"sparsegrad {verb}: runs in one process, found 2; start it without torchrun or accelerate launch\n"),
        (1, ""),
    ):
        monkeypatch.setenv("RANK", str(number))
        assert main([verb, "somewhere"]) == 2
        assert capsys.readouterr() == ("", said)


def test_engines_other_than_ddp_are_refused(
    words: Words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert main(words(tmp_path / "run")) == 2
    assert "train with DDP, found FSDP (ACCELERATE_USE_FSDP=true)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def scores(result: dict[str, Any]) -> list[float]:
    return [evaluation["loss"] for evaluation in result["evaluations"]]


def test_a_process_that_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As each one of `sparsegrad reproduce`: it has its own GPU, and its children start without a group."""
    for name, value in {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "CUDA_VISIBLE_DEVICES": "4,6"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert (process_count(), rank()) == (4, 3)
    work_alone()
    assert (process_count(), rank()) == (1, 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"
    assert "MASTER_ADDR" not in os.environ
