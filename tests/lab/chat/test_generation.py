"""Answers do not depend on batches, a killed command answers no question twice, and files are FastChat's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.chat.answers import read_answers
from sparsegrad_lab.chat.generation import AnswerSettings, answer_questions
from sparsegrad_lab.chat.model import ChatModel, open_model
from sparsegrad_lab.chat.questions import Question, read_questions
from sparsegrad_lab.cli.generate import default_id
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.tasks.generation import RowSampling


@pytest.fixture(scope="module")
def model(chat_llama: Path) -> ChatModel:
    return open_model(str(chat_llama))


def turns(path: Path) -> dict[Any, list[str]]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["question_id"]: row["choices"][0]["turns"] for row in rows}


def answer(model: ChatModel, questions: list[Question], path: Path, batch_size: int = 2, **options: Any) -> int:
    settings = AnswerSettings(**{"max_new_tokens": 6, **options})
    return answer_questions(model, questions, path, model_id="m", settings=settings, batch_size=batch_size)


def test_answers_do_not_depend_on_the_batch(model: ChatModel, questions: Path, tmp_path: Path) -> None:
    asked = read_questions(questions)
    for size in (1, 2, 5):
        assert answer(model, asked, tmp_path / f"{size}.jsonl", size) == 5
    assert turns(tmp_path / "1.jsonl") == turns(tmp_path / "2.jsonl") == turns(tmp_path / "5.jsonl")
    assert {name: len(texts) for name, texts in turns(tmp_path / "1.jsonl").items()} == {
        81: 2, 82: 2, 83: 2, 84: 2, "last": 1,
    }  # fmt: skip


def test_the_second_answer_follows_from_the_first(model: ChatModel, tmp_path: Path) -> None:
    """Greedy, by hand: the conversation of both turns is one prompt."""
    (asked,) = [Question(1, "math", ("what is warm", "and a film"))]
    answer(model, [asked], tmp_path / "a.jsonl")
    first, second = turns(tmp_path / "a.jsonl")[1]
    text = f"user what is warm <|end|> assistant {first} <|end|> user and a film <|end|> assistant"
    import torch

    ids = torch.tensor([model.tokenizer(text).input_ids])
    made = model.model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
    assert model.tokenizer.decode(made, skip_special_tokens=True).strip() == second


def test_temperature_by_category_and_seed(model: ChatModel, tmp_path: Path) -> None:
    """FastChat's temperatures: greedy answers are the same for each seed, the others differ."""
    asked = [Question(number, category, ("what is warm",)) for number, category in enumerate(["math", "writing"])]
    found = []
    for seed in (0, 1):
        answer(model, asked, tmp_path / f"{seed}.jsonl", seed=seed)
        found.append(turns(tmp_path / f"{seed}.jsonl"))
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_sampling_follows_the_models_probabilities(model: ChatModel) -> None:
    """4,000 first tokens of as many streams: each of the likely tokens is as frequent as the softmax says."""
    import torch

    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(4000, 1)
    picked = RowSampling([0.7] * 4000, list(range(4000)))(torch.zeros(4000, 1), scores.clone()).argmax(1)
    expected = (scores[0] / 0.7).softmax(0)
    assert torch.allclose(picked.bincount(minlength=4) / 4000, expected, atol=0.02)


def test_a_killed_command_answers_no_question_twice(model: ChatModel, questions: Path, tmp_path: Path) -> None:
    """A kill leaves whole lines, and perhaps a torn one."""
    asked, path = read_questions(questions), tmp_path / "a.jsonl"
    answer(model, asked, tmp_path / "whole.jsonl")
    answer(model, asked[:2], path)
    kept = path.read_bytes()
    path.write_bytes(kept + b'{"question_id": 83, "choi')
    assert answer(model, asked, path) == 3
    assert path.read_bytes().startswith(kept)
    assert turns(path) == turns(tmp_path / "whole.jsonl")
    assert answer(model, asked, path) == 0


def test_another_setting_is_refused(model: ChatModel, questions: Path, tmp_path: Path) -> None:
    asked, path = read_questions(questions), tmp_path / "a.jsonl"
    answer(model, asked[:2], path)
    with pytest.raises(
        ValueError, match=r"a.jsonl holds answers that differ in seed \(0 there, 1 here\); write another"
    ):
        answer(model, asked, path, seed=1)


def test_a_changed_question_is_refused(model: ChatModel, tmp_path: Path) -> None:
    """Under the same id, another text or category would keep the old answer."""
    path = tmp_path / "a.jsonl"
    answer(model, [Question(1, "math", ("what is warm",)), Question(2, "math", ("a film",))], path)
    for changed in (Question(1, "math", ("what is cold",)), Question(1, "writing", ("what is warm",))):
        with pytest.raises(ValueError, match="the answer is to another question 1"):
            answer(model, [changed], path)
        with pytest.raises(ValueError, match="the answer is to another question 1"):
            read_answers(path, [changed])
    assert answer(model, [Question(2, "math", ("a film",))], path) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"question_id": [1]}, r"line 1: expected a number or a text as question_id, found \[1\]"),
        ({"choices": {}}, r"line 1: expected choices with a list of texts as turns, found '\{\}'"),
        ({"choices": [{"turns": [1]}]}, r"line 1: expected choices with a list of texts as turns, found "),
    ],
)
def test_lines_that_are_no_answers(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question_id": 1, "model_id": "m", "choices": [{"turns": ["a"]}], **more}))
    with pytest.raises(ValueError, match=message):
        read_answers(path, [Question(1, "math", ("what is warm",))])


def test_a_file_that_holds_no_answers(model: ChatModel, questions: Path) -> None:
    asked, before = read_questions(questions), questions.read_bytes()
    with pytest.raises(
        ValueError,
        match=r"line 1: expected an answer .*, found the keys question_id, category, turns; name another --out",
    ):
        answer(model, asked, questions)
    assert questions.read_bytes() == before


def test_the_default_name_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs" / "lora").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs" / "lora")
    assert default_id(".") == default_id("../lora") == "runs-lora"
    assert default_id("org/model") == "org-model"
    assert default_id("smollm2") == "smollm2"


def test_the_command(chat_llama: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "answers.jsonl"
    words = ["generate", str(chat_llama), "--questions", str(questions), "--max_new_tokens", "4"]
    assert main([*words, "--output", str(path)]) == 0
    assert f"written: {path} (5 new answers, 5 in all)" in capsys.readouterr().out
    row = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert row.keys() >= {"question_id", "answer_id", "model_id", "choices", "tstamp"}  # FastChat's
    assert row["model_id"] == "-".join(chat_llama.parts[-2:])
    assert main(words) == 1
    assert "is not the folder of a run: name a file to write with --output" in capsys.readouterr().err
    assert main([*words, "--output", str(tmp_path)]) == 1
    assert "expected a file to write, found a folder" in capsys.readouterr().err


def test_a_long_conversation_does_not_shorten_the_others(model: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a context of 40 tokens, one conversation leaves room for 5 tokens, the other for 20."""
    monkeypatch.setattr(model.model.config, "max_position_embeddings", 40)
    talks = [[{"role": "user", "content": text}] for text in ("what", " ".join(["warm"] * 32))]
    sampling = [RowSampling([1.0] * 2, [seed, seed + 1]) for seed in range(8)]
    together = [model.answer(talks, 20, rows) for rows in sampling]
    alone = [[model.answer([talks[row]], 20, rows.of([row]))[0] for row in range(2)] for rows in sampling]
    assert together == alone
    assert max(len(first.split()) for first, _ in together) > 5 >= max(len(second.split()) for _, second in together)


def test_answers_of_other_weights_are_refused(model: ChatModel, questions: Path, tmp_path: Path) -> None:
    """A run that was trained again has another file of weights. Files of earlier versions do not name the weights."""
    asked, path = read_questions(questions), tmp_path / "a.jsonl"
    answer(model, asked[:2], path)
    trained = replace(model, weights=tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    answer(trained, asked[:3], path)
    assert answer(trained, asked[:3], path) == 0
    (tmp_path / "model.safetensors").write_bytes(b"others")
    with pytest.raises(
        ValueError, match=r"a.jsonl holds answers that differ in weights_sha256 \(\w+ there, \w+ here\)"
    ):
        answer(trained, asked[2:], path)
