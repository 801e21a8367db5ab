"""A conversation in the terminal: streamed answers, commands, and the base model beside the adapter."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from sparsegrad_lab.chat.model import open_model
from sparsegrad_lab.chat.session import Session
from sparsegrad_lab.cli.main import main


def session(model: str) -> tuple[Session, io.StringIO]:
    written = io.StringIO()
    console = Console(file=written, width=120, highlight=False, markup=False, soft_wrap=True)
    return Session(open_model(model), console, max_new_tokens=6), written


@pytest.fixture(scope="module")
def run(chat_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learnt to answer "bright"."""
    folder = tmp_path_factory.mktemp("chat-run")
    row = {"messages": [{"role": "user", "content": "what is warm"}, {"role": "assistant", "content": "bright one"}]}
    (folder / "rows.jsonl").write_text(16 * (json.dumps(row) + "\n"), encoding="utf-8")
    file = str(folder / "rows.jsonl")
    words = [
        "train", "--model", str(chat_llama), "--task", "text", "--data.train_file", file,
        "--data.validation_file", file, "--data.text", "messages", "--training.epochs", "10",
        "--training.batch_size", "8", "--training.learning_rate", "0.1", "--calibration.n_steps", "3",
        "--adapter.narrow", "16", "--adapter.wide", "16", "--output", str(folder / "run"),
    ]  # fmt: skip
    assert main(words) == 0
    return folder / "run"


def test_a_conversation(run: Path) -> None:
    talk, written = session(str(run))
    assert talk.take("what is warm")
    assert written.getvalue() == "bright one\n"
    assert [message["content"] for message in talk.messages] == ["what is warm", "bright one"]
    assert talk.take("/reset")
    assert talk.messages == []
    assert talk.take("/system the film")
    assert talk.system == "the film"
    assert talk.take("/wrong")
    assert "no command /wrong; /help lists them" in written.getvalue()
    assert not talk.take("/quit")


def test_the_streamed_text_is_the_answer(chat_llama: Path) -> None:
    model = open_model(str(chat_llama))
    shown: list[str] = []
    conversation = [{"role": "user", "content": "what is warm"}]
    text = model.stream(conversation, 12, shown.append)
    assert "".join(shown).strip() == text == model.answer([conversation], 12)[0]
    assert text


def test_base_and_adapter_side_by_side(run: Path, chat_llama: Path) -> None:
    """The base's answer is that of the pretrained model; the conversation goes on with the adapter's."""
    talk, written = session(str(run))
    talk.take("/compare")
    assert f"comparing {run} with {chat_llama}" in written.getvalue()
    talk.take("what is warm")
    (of_base,) = open_model(str(chat_llama)).answer([[{"role": "user", "content": "what is warm"}]], 6)
    assert of_base != "bright one"
    (row,) = [line for line in written.getvalue().splitlines() if "bright one" in line]
    assert of_base.split()[0] in row.partition("bright one")[0]
    assert written.getvalue().endswith("┘\n")
    assert talk.messages[-1]["content"] == "bright one"
    talk.take("/compare")
    talk.take("/reset")
    talk.take("what is warm")
    assert written.getvalue().endswith("bright one\n")


def test_a_pretrained_model_has_nothing_to_compare(chat_llama: Path) -> None:
    talk, written = session(str(chat_llama))
    talk.take("/compare")
    assert "is a pretrained model: there is nothing to compare" in written.getvalue()


def test_a_long_conversation_says_what_to_do(chat_llama: Path) -> None:
    talk, written = session(str(chat_llama))
    talk.take("warm " * 1100)
    assert "tokens, and the model's context is 1,024; shorten it; /reset starts a new" in written.getvalue()


def test_an_adapter_folder(run: Path) -> None:
    """Without the run around it: the base model is the one that the adapter names."""
    talk, written = session(str(run / "adapter"))
    talk.take("what is warm")
    assert written.getvalue() == "bright one\n"


def test_the_command(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is warm\n/quit\nnever read\n"))
    assert main(["chat", str(run), "--max_new_tokens", "6"]) == 0
    assert capsys.readouterr().out == "bright one\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"what is \xff warm\n"), encoding="utf-8"))
    assert main(["chat", str(run), "--max_new_tokens", "6"]) == 0  # bytes that are not UTF-8 do not end it
    assert capsys.readouterr().out
    assert main(["chat", str(finished_run)]) == 1
    assert "expected a run of a language model, found one of text classification" in capsys.readouterr().err
    assert main(["chat", str(run), "--temperature", "-1"]) == 1
    assert "temperature must be 0 or above, found -1.0" in capsys.readouterr().err
