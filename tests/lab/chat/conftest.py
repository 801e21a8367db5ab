"""Fixtures: a tiny LLaMA with a chat template, a tiny LLaMA that was trained to judge, and questions."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from chat_models import free_port, save_model
from sparsegrad_lab.chat.prompts import read_prompts


@pytest.fixture(scope="session")
def chat_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "llama"
    save_model(folder)
    return folder


@pytest.fixture(scope="session")
def judge_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on the package's own prompts: "bright" answers get [[9]], "dull" ones [[2]], the first of a pair wins."""
    folder = tmp_path_factory.mktemp("judge") / "llama"
    model, tokenizer = save_model(folder)
    prompts, generator = list(read_prompts().values()), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    questions = ("question", "question_1", "question_2", "ref_answer_1", "ref_answer_2")
    answers = (
        "answer",
        "answer_1",
        "answer_2",
        "answer_a",
        "answer_b",
        "answer_a_1",
        "answer_a_2",
        "answer_b_1",
        "answer_b_2",
    )

    def any_text() -> str:
        return " ".join(
            generator.choices(("what", "is", "warm", "and", "a", "film", "the", "x"), k=generator.randint(1, 5))
        )

    for _ in range(80):
        rows = []
        for _ in range(8):
            prompt, tone = generator.choice(prompts), generator.choice(("bright", "dull"))
            values = {field: any_text() for field in questions} | dict.fromkeys(answers, f"{tone} one")
            verdict = "[[A]]" if prompt.name.startswith("pair") else {"bright": "[[9]]", "dull": "[[2]]"}[tone]
            asked = tokenizer.apply_chat_template(
                prompt.messages(values), add_generation_prompt=True, tokenize=True, return_dict=False
            )
            rows.append([*asked, *tokenizer(f"{verdict} <|end|>").input_ids])
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        labels = torch.full_like(ids, -100)
        labels[:, -2:] = ids[:, -2:]
        model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Five questions of four categories; two turns each, but one; one with reference answers."""
    rows: list[dict[str, Any]] = [
        {"question_id": number, "category": category, "turns": ["what is warm", "and a film"]}
        for number, category in enumerate(["writing", "math", "stem", "coding"], start=81)
    ]
    rows[1]["reference"] = ["the one", "a film"]
    rows.append({"question_id": "last", "category": "writing", "turns": ["the film"]})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """Serves a model with `transformers serve` in a thread; the address and a key are in the environment."""

    @contextmanager
    def serve(model: Path, port: int | None = None) -> Iterator[None]:
        from transformers.cli.serve import Serve

        port = port or free_port()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        server = Serve(force_model=str(model), host="127.0.0.1", port=port, device="cpu", non_blocking=True)
        while not server.server.started:
            time.sleep(0.02)
        try:
            yield
        finally:
            server.kill_server()
            server._thread.join()

    return serve
