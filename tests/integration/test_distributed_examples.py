"""The scripts in examples/distributed, as their users start them, with two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from peft import PeftModel

from commands import Command
from groups_of_processes import free_port, launcher_environment
from helpers import tiny_model
from sparsegrad_peft import SparseGradConfig

EXAMPLES = Path(__file__).parents[2] / "examples" / "distributed"
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
    "--mixed_precision=no", "--dynamo_backend=no",
]  # fmt: skip


def launch(script: str, *words: str, folder: Path) -> str:
    """Start a script with `accelerate launch`, and return what it prints."""
    command = [*ACCELERATE, f"--main_process_port={free_port()}", str(EXAMPLES / script), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(script: str, *words: str, folder: Path) -> str:
    """Start two processes of a script, as `torchrun` does, and return what they print."""
    port = free_port()
    both = [
        Command([str(EXAMPLES / script), *words], folder / f"printed-{rank}", launcher_environment(rank, 2, port))
        for rank in range(2)
    ]
    ended = [command.wait() for command in both]
    assert [code for code, _, _ in ended] == [0, 0], ended
    return "".join(out for _, out, _ in ended)


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """Command line of the training scripts, with a tiny model, a tokenizer and texts."""
    from tiny_runs import save_tokenizer

    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("the film was warm\na long dull film\n" * 8, encoding="utf-8")
    return ["--model", "model", "--texts", "texts.txt", "--output", "adapter", "--steps", "2", "--cpu"]


@pytest.mark.slow
def test_fully_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("fully_shard.py", folder=tmp_path).startswith("loss ")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("script", "start"), [("train.py", run), ("sft.py", launch)])
def test_training_scripts(
    script: str, start: Callable[..., str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert start(script, *words, folder=tmp_path).count("adapter: adapter") == 1
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert isinstance(loaded.peft_config["default"], SparseGradConfig)
    assert any(bool(value.any()) for name, value in loaded.state_dict().items() if "sparsegrad_S" in name)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_configurations_are_accelerates(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(EXAMPLES / f"{name}.yaml"))
    assert config.num_processes == 2
    assert yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())["distributed_type"] == config.distributed_type.value
