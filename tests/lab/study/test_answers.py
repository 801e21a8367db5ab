"""The models of a study answer questions before their weights are removed; the answers come onto one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from chat_models import save_model, write_answers
from grids import read
from sparsegrad_lab.chat.answers import read_answers
from sparsegrad_lab.chat.questions import read_questions
from sparsegrad_lab.cli.main import main
from sparsegrad_lab.run.exit_codes import ExitCode
from sparsegrad_lab.study.answers import AnswerFiles
from sparsegrad_lab.study.experiment import Cell
from sparsegrad_lab.study.experiment_files import load_experiment

METHODS = ("full", "lora")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Six questions of one turn, and one of two."""
    rows: list[dict[str, Any]] = [
        {"question_id": number, "category": "math", "turns": [f"what is {number}"]} for number in range(6)
    ]
    rows.append({"question_id": 6, "category": "writing", "turns": ["what is a film", "and one warm"]})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiment of two methods on a tiny LLaMA with a chat template."""
    save_model(tmp_path / "llama")
    (tmp_path / "texts.txt").write_text("what is warm\na film\n", encoding="utf-8")
    message = [{"role": "user", "content": "what is warm"}, {"role": "assistant", "content": "a bright film"}]
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps({"messages": message})] * 8), encoding="utf-8")
    rows = str(tmp_path / "rows.jsonl")
    experiment = {
        "title": "Talk", "question": "Which?", "models": [str(tmp_path / "llama")], "tasks": ["text"],
        "seeds": [0, 1], "answers": {"seed": 0, "max_new_tokens": 4},
        "settings": {
            "data": {"train_file": rows, "validation_file": rows, "text": ["messages"], "max_length": 32,
                     "unrelated": str(tmp_path / "texts.txt")},
            "training": {"epochs": 2, "batch_size": 8, "learning_rate": 0.01},
        },
        "methods": {name: {"settings": {"method": name}} for name in METHODS},
    }  # fmt: skip
    (tmp_path / "experiments" / "talk").mkdir(parents=True)
    (tmp_path / "experiments" / "talk" / "experiment.yaml").write_text(yaml.safe_dump(experiment), encoding="utf-8")
    return tmp_path / "experiments"


def cell_of(folder: Path, method: str, seed: int = 0) -> Cell:
    cells = load_experiment("talk", "cpu", folder).cells()
    return next(cell for cell in cells if (cell.method, cell.seed) == (method, seed))


def test_which_questions_and_which_models(folder: Path, questions: Path, tmp_path: Path) -> None:
    """Evenly spaced questions, unchanged; the models of one seed."""
    experiment = load_experiment("talk", "cpu", folder)
    for count, ids in ((None, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 2, 4]), (1, [0])):
        files = AnswerFiles(tmp_path / "results", questions, count)
        files.write_questions(experiment)
        chosen = read_questions(files.questions_file(experiment))
        assert chosen == [question for question in read_questions(questions) if question.id in ids]
    for wrong in (0, 8):
        with pytest.raises(ValueError, match=f"expected a number of questions from 1 to 7, found {wrong}"):
            AnswerFiles(tmp_path / "results", questions, wrong)
    assert [cell.seed for cell in experiment.cells() if files.lacks(cell)] == [0, 0]
    assert not any(AnswerFiles(tmp_path, questions).lacks(cell) for cell in load_experiment("digits", "cpu").cells())


def test_a_page_of_what_is_complete(folder: Path, questions: Path, tmp_path: Path) -> None:
    files = AnswerFiles(tmp_path / "results", questions)
    cells = [cell_of(folder, method) for method in METHODS]
    files.write_questions(cells[0].experiment)
    files.file(cells[0]).parent.mkdir(parents=True)
    for cell, text in zip(cells, ("bright", "dull"), strict=True):
        write_answers(files.file(cell), cell.method, text, questions)
    assert files.sets(cells) == [cells]
    page = files.write_page(cells, "Not graded.").read_text(encoding="utf-8")
    assert page.startswith("# Answers\n\nNot graded.\n")
    assert page.count("bright") == page.count("dull") == 8

    kept = files.file(cells[1]).read_text(encoding="utf-8").splitlines()
    files.file(cells[1]).write_text("\n".join(kept[:-1]) + "\n" + kept[-1][:20], encoding="utf-8")  # killed
    assert files.sets(cells) == [cells[:1]]
    assert files.lacks(cells[1])


def test_reproduce(folder: Path, questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is trained, its model answers, and its weights are removed. A run without answers is named."""
    results, runs = tmp_path / "results", tmp_path / "runs"
    words = [
        "reproduce", "talk", "--folder", str(folder), "--results", str(results), "--runs", str(runs), "--seeds", "0",
        "--methods", "full", "--questions", str(questions), "--question_count", "2", "--threads", "1",
    ]  # fmt: skip
    assert main(words) == 0
    files, cell = AnswerFiles(results, questions), cell_of(folder, "full")
    asked = read_questions(files.questions_file(cell.experiment))
    assert [question.id for question in asked] == [0, 3]
    name, answers = read_answers(files.file(cell), asked)
    assert (name, list(answers)) == ("full", [0, 3])
    assert not list(runs.rglob("*.safetensors"))
    assert f"answers: {files.page(cell)}; not graded, since no --judge was named" in capsys.readouterr().out
    result = read(results / f"{cell.name}.json")
    assert result["score"] < result["score_before"]
    assert result["unrelated_perplexity"]["before"] > 0

    assert main(["report", str(results), "--output", str(tmp_path / "report")]) == 0
    assert "Gain against forgetting" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")

    other = cell_of(folder, "lora")
    write_answers(files.file(other), other.method, "from an earlier call", files.questions_file(other.experiment))
    assert main(words) == 0
    page = files.page(cell).read_text(encoding="utf-8")
    assert page.count("**full**") == page.count("**lora**") > 0

    shutil.rmtree(files.file(cell).parent)
    capsys.readouterr()
    assert main(words) == 0
    assert f"no answers of {cell.name}; --retry" in capsys.readouterr().out


def test_refused_before_any_run(
    folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("SPARSEGRAD_DATA", raising=False)
    common = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    for words, message in (
        (["digits", "--questions", str(questions)], "--questions is for experiments whose models answer questions"),
        (["talk", "--folder", str(folder), "--judge", "gpt"], "--judge needs --questions"),
        (["talk", "--folder", str(folder), "--questions", str(questions), "--judge", "gpt"], "a judge needs a key in"),
        (["talk", "--folder", str(folder), "--questions", "gone.jsonl"], "gone.jsonl: no such file"),
    ):
        assert main(["reproduce", *words, *common]) == ExitCode.FAILED
        assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
