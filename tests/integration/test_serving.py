"""What users serve gives the answers of the trained model, in processes that cannot import this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from chat_models import free_port, save_model
from sparsegrad_lab.chat.model import open_model
from sparsegrad_lab.cli.main import main

PROMPTS = ["what is warm", "a film", "the one", "warm", "is the film bright", "what", "dull and bright", "and a one",
           "the warm film", "one"]  # fmt: skip
ALONE = "import sys; sys.modules.update(sparsegrad_peft=None, sparsegrad_lab=None)\n"
"First line of a script that cannot import this package."
PEFT_SCRIPT = """
import json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, prompts = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
for prompt in prompts:
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    print(json.dumps(tokenizer.decode(made, skip_special_tokens=True).strip()))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serving")
    save_model(folder / "base")
    turns = [("what is warm", "bright one"), ("a film", "dull and warm"), ("the one", "is what")]
    rows = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in turns
    ]
    (folder / "rows.jsonl").write_text(8 * "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    file = str(folder / "rows.jsonl")
    words = [
        "train", "--model", str(folder / "base"), "--task", "text", "--data.train_file", file,
        "--data.validation_file", file, "--data.text", "messages", "--training.epochs", "10",
        "--training.batch_size", "8", "--training.learning_rate", "0.1", "--calibration.n_steps", "3",
        "--adapter.narrow", "16", "--adapter.wide", "16", "--output", str(folder / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def answers(run: Path) -> list[str]:
    """Greedy answers in Python. The base model gives others."""

    def answer(model: str) -> list[str]:
        return open_model(model).answer([[{"role": "user", "content": prompt}] for prompt in PROMPTS], 8)

    found = answer(str(run))
    different = sum(one != other for one, other in zip(found, answer(str(run.parent / "base")), strict=True))
    assert different >= 5
    return found


def test_a_lora_export_in_plain_peft(run: Path, answers: list[str], tmp_path: Path) -> None:
    assert main(["export", str(run), "--to", "lora", "--output", str(tmp_path / "lora")]) == 0
    arguments = json.dumps([str(run.parent / "base"), str(tmp_path / "lora"), PROMPTS])
    done = subprocess.run(
        [sys.executable, "-c", ALONE + PEFT_SCRIPT, arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == answers


@pytest.mark.slow
def test_a_merged_model_behind_transformers_serve(run: Path, answers: list[str], tmp_path: Path) -> None:
    """A process of its own, asked over HTTP."""
    assert main(["merge", str(run)]) == 0
    port, log = free_port(), tmp_path / "log"
    script = f"{ALONE}from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", script, "serve", str(run / "merged"), "--port", str(port), "--device", "cpu"]
    with log.open("w", encoding="utf-8") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        found = [ask(port, str(run / "merged"), prompt, server) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait()
    assert found == answers, log.read_text(encoding="utf-8")


def ask(port: int, model: str, prompt: str, server: subprocess.Popen[bytes]) -> str:
    """The answer of the server, which may still be starting."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": 8}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    end = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return str(json.load(response)["choices"][0]["message"]["content"]).strip()
        except urllib.error.URLError as error:
            refused = isinstance(error.reason, ConnectionRefusedError)
            if not refused or server.poll() is not None or time.monotonic() > end:
                raise
        time.sleep(0.2)
