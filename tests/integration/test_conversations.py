"""A language model trained on conversations, from the command line to its answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.cli.main import main

CHATML = (
    "{% for m in messages %}[CLS] {{ m.content }} [SEP] {% endfor %}{% if add_generation_prompt %}[CLS] {% endif %}"
)


def messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("template", [None, CHATML])
def test_messages(template: str | None, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = template
    model = tmp_path / "model"
    tokenizer.save_pretrained(model)
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(model)
    rows = [{"messages": messages("was the film warm", "a fine one")}] * 16
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    file, run = str(tmp_path / "rows.jsonl"), str(tmp_path / "run")
    words = [
        "train", "--model", str(model), "--task", "text", "--data.train_file", file, "--data.validation_file", file,
        "--data.text", "messages", "--data.max_length", "30", "--method", "full", "--training.epochs", "20",
        "--training.learning_rate", "0.03", "--training.batch_size", "4", "--output", run,
    ]  # fmt: skip
    assert main(words) == 0
    result: dict[str, Any] = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert (result["text"], result["metric"], result["rows"]) == (["messages"], "loss", {"train": 16, "validation": 16})
    assert result["score"] < 0.1
    capsys.readouterr()
    assert main(["predict", run, "--text", "was the film warm", "was the film warm"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert answers == [{"messages": "was the film warm", "prediction": "a fine one"}] * 2
    assert main(["predict", run, "--file", file]) == 0
    (first, *_) = capsys.readouterr().out.splitlines()
    assert json.loads(first) == {**rows[0], "prediction": "a fine one"}
