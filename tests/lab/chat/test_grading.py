"""A judge on a real server: `transformers serve` with a tiny LLaMA that was trained to rate.

The server is stopped and started again; broken and busy servers are real sockets that answer so.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from chat_models import free_port, write_answers
from sparsegrad_lab.chat.answers import read_answers
from sparsegrad_lab.chat.endpoint import Endpoint, EndpointError
from sparsegrad_lab.chat.grading import Grading, Item, rating_of, single_items, winner_of
from sparsegrad_lab.chat.prompts import read_prompts
from sparsegrad_lab.chat.questions import read_questions
from sparsegrad_lab.cli.main import main

Serving = Callable[..., AbstractContextManager[None]]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


async def grade(model: str, items: Sequence[Item], path: Path) -> list[dict[str, Any]]:
    judge = Endpoint(model, retries=0)
    try:
        return await Grading(judge, read_prompts(), concurrency=1).run(items, path)
    finally:
        await judge.close()


@pytest.fixture
def answers(questions: Path, tmp_path: Path) -> list[str]:
    return [
        str(write_answers(tmp_path / f"{tone}.jsonl", tone, f"{tone} one", questions)) for tone in ("dull", "bright")
    ]


def test_ratings_by_a_served_model(
    judge_llama: Path, serving: Serving, questions: Path, answers: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Both modes, from the command line. The judge prefers the first of two answers, so that all pairs are ties."""
    words = ["judge", *answers, "--questions", str(questions), "--model", str(judge_llama), "--output"]
    with serving(judge_llama):
        assert main([*words, str(tmp_path / "single.jsonl"), "--page", str(tmp_path / "page.md")]) == 0
        shown = capsys.readouterr()
        assert main([*words, str(tmp_path / "pair.jsonl"), "--mode", "pair"]) == 0
    assert "no reference answer, graded without: 84 (turn 1), 84 (turn 2)" in shown.err
    rows = rows_of(tmp_path / "single.jsonl")
    assert len(rows) == 2 * 9
    assert {(row["model"], row["score"]) for row in rows} == {("dull", 2.0), ("bright", 9.0)}
    prompts = {(row["question_id"], row["turn"]): row["judge"][1] for row in rows}
    assert prompts[81, 1] == prompts[84, 1] == "single-v1"
    assert (prompts[82, 1], prompts[82, 2]) == ("single-math-v1", "single-math-v1-multi-turn")
    (math,) = [row for row in rows if (row["question_id"], row["turn"], row["model"]) == (82, 2, "dull")]
    assert "=== Reference answer to the second question ===\na film\n" in math["user_prompt"]
    assert math["judgment"].strip() == "[[2]]"
    assert "9.00 (9.00 to 9.00)" in shown.out
    assert "**bright**, rated 9\n\n```text\nbright one\n```" in (tmp_path / "page.md").read_text(encoding="utf-8")
    pairs = rows_of(tmp_path / "pair.jsonl")
    assert len(pairs) == 9
    assert {(row["g1_winner"], row["g2_winner"]) for row in pairs} == {("model_1", "model_2")}
    assert "0.50 (0.50 to 0.50)" in capsys.readouterr().out
    assert "sk-secret" not in shown.out + shown.err + (tmp_path / "single.jsonl").read_text(encoding="utf-8")


def test_a_server_that_dies_costs_nothing(
    judge_llama: Path, serving: Serving, questions: Path, answers: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It dies in the middle; the command says so, keeps what it has, and goes on when the server is back."""
    monkeypatch.setattr("sparsegrad_lab.chat.endpoint.Endpoint.__init__.__defaults__", (2048, 30.0, 0))
    port, path = free_port(), tmp_path / "judged.jsonl"
    asked = read_questions(questions)
    models = dict(read_answers(Path(file), asked) for file in answers)
    items = single_items(asked, models)
    with serving(judge_llama, port):
        asyncio.run(grade(str(judge_llama), items[:7], path))
    before = path.read_bytes()
    words = ["judge", *answers, "--questions", str(questions), "--model", str(judge_llama), "--output", str(path)]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "no connection" in error
    assert "is the server running?" in error
    assert path.read_bytes() == before
    with serving(judge_llama, port):
        assert main(words) == 0
    assert path.read_bytes().startswith(before)
    keys = [(row["question_id"], row["turn"], row["model"]) for row in rows_of(path)]
    assert len(set(keys)) == len(keys) == 18


@contextmanager
def answering(*responses: tuple[int, str]) -> Iterator[list[str]]:
    """A server that gives these responses, the last one again and again. Yields the paths that were asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            status, body = responses[min(len(asked), len(responses) - 1)]
            asked.append(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body) + (10 if status == 200 and body.endswith("~") else 0)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
            patch.setenv("OPENAI_API_KEY", "sk-secret")
            yield asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def completion(text: str) -> str:
    message = {"role": "assistant", "content": text}
    return json.dumps({
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
    })  # fmt: skip


async def ask(retries: int = 2) -> str:
    judge = Endpoint("m", timeout=5, retries=retries)
    try:
        return await judge.ask([{"role": "user", "content": "x"}], 0.0)
    finally:
        await judge.close()


@pytest.mark.parametrize("status", [429, 500, 503])
def test_busy_servers_are_asked_again(status: int) -> None:
    with answering((status, "{}"), (status, "{}"), (200, completion("[[5]]"))) as asked:
        assert asyncio.run(ask()) == "[[5]]"
    assert asked == ["/v1/chat/completions"] * 3


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ((401, '{"error": {"message": "no: sk-secret"}}'), r"the key in \$OPENAI_API_KEY was refused \(401\)$"),
        ((404, '{"error": {"message": "no m"}}'), r"there is no model 'm', or the address in \$OPENAI_BASE_URL is"),
        ((400, '{"error": {"message": "bad sk-secret"}}'), r"400 .*bad \*\*\*"),
        ((200, '{"half": "a resp~'), r"no connection \(.*\); is the server running\?"),
        ((200, '{"choices": []}'), r"expected an answer in OpenAI's form, found another"),
        ((200, "no json"), r"expected an answer in OpenAI's form, found another"),
    ],
)
def test_refused_and_broken(response: tuple[int, str], message: str) -> None:
    with answering(response), pytest.raises(EndpointError, match=message) as caught:
        asyncio.run(ask(retries=0))
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "found"), [("sk-secret\n", r"400 .*bad \*\*\*"), ("a", r"400 .*a bad sk-secret")], ids=["newline", "short"]
)
def test_keys_in_messages(key: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line break at the end, as from a file, is no part of a key. A short key is no secret, and part of words."""
    with answering((400, '{"error": {"message": "a bad sk-secret"}}')):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(EndpointError, match=found):
            asyncio.run(ask(retries=0))


@pytest.mark.parametrize("key", ["sk-gehe\u00efm", "sk-\x07secret"])
def test_a_key_that_cannot_be_sent(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match=r"^\$OPENAI_API_KEY: expected printable ASCII characters, found others; copy"):
        Endpoint("m")


@pytest.mark.parametrize(
    "address",
    ["", "localhost:8000/v1", "ftp://h/v1", "http:///v1", "http://h:99999/v1", "http://h:x", "http://[::1", "http://h/\x07"],
)  # fmt: skip
def test_a_malformed_address(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(ValueError, match=r"^\$OPENAI_BASE_URL: expected an address such as http://localhost:8000/v1, "):
        Endpoint("m")


def test_the_time_of_a_judgement_is_limited() -> None:
    """All repetitions together; their pauses alone would take seconds."""

    async def ask_in_a_hurry() -> str:
        judge = Endpoint("m", timeout=0.3, retries=6)
        try:
            return await judge.ask([{"role": "user", "content": "x"}], 0.0)
        finally:
            await judge.close()

    with answering((500, "{}")), pytest.raises(EndpointError, match=r"no answer in 0\.3 seconds$"):
        asyncio.run(ask_in_a_hurry())


def test_a_judgement_without_a_rating_is_asked_for_again_and_kept(questions: Path, tmp_path: Path) -> None:
    """Three times without one: the rating is null, and all three judgements are in the file."""
    item = Item(read_questions(questions)[0], 1, {"m": ["an answer {with} braces", ""]})
    for responses, score in (
        ([(200, completion("5 of 10")), (200, completion("Rating: [[11]]")), (200, completion("[[7.5]] so"))], 7.5),
        ([(200, completion("I cannot"))], None),
    ):
        path = tmp_path / f"{score}.jsonl"

        with answering(*responses):
            (row,) = asyncio.run(grade("m", [item], path))
        assert row["score"] == score
        assert len(row["attempts"]) == 3
        assert "an answer {with} braces" in row["user_prompt"]


def test_what_is_parsed() -> None:
    assert [rating_of(text) for text in ("[[5]]", "[[ 10 ]] ", "[[3]] no, [[4]]", "[[0]]", "[[11]]", "[5]", "")] == [
        5, 10, 4, None, None, None, None,
    ]  # fmt: skip
    assert [winner_of(text) for text in ("[[A]]", "[[B]] or [[C]]", "[[D]]", "A")] == ["A", "C", None, None]


def test_refused_before_any_request(
    questions: Path, answers: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    words = ["judge", *answers, "--questions", str(questions), "--model", "m"]
    for more, message in (
        ([], "a judge needs a key in $OPENAI_API_KEY"),
        (["--concurrency", "0"], "concurrency must be at least 1, found 0"),
        (["--prompts", str(tmp_path / "none.jsonl")], "no such file; expected prompts of a judge"),
    ):
        assert main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    (tmp_path / "part.jsonl").write_text(Path(answers[0]).read_text(encoding="utf-8").splitlines()[0], encoding="utf-8")
    assert main(["judge", str(tmp_path / "part.jsonl"), "--questions", str(questions), "--model", "m"]) == 1
    assert "found none for 4 questions, such as 82; finish it with sparsegrad generate" in capsys.readouterr().err


def test_files_that_would_be_replaced(
    questions: Path, answers: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page, or judgements, in the place of what the command reads or also writes."""
    before = Path(answers[1]).read_bytes()
    words = ["judge", *answers, "--questions", str(questions), "--model", "m"]
    for more, message in (
        (["--page", answers[1]], f"--page: {answers[1]} is also a file of answers; name another file to write"),
        (["--output", str(questions)], f"--output: {questions} is also --questions; name another file to write"),
        (["--output", str(tmp_path / "a"), "--page", str(tmp_path / "." / "a")], "is also --output; name another file"),
        (["--page", str(tmp_path / "judgements-m-single.jsonl")], "judgements-m-single.jsonl is also --output; name"),
    ):
        assert main([*words, *more]) == 1
        assert message in capsys.readouterr().err
    assert Path(answers[1]).read_bytes() == before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question_id": 1, "turns": ["a"]},
            r"line 1: expected a judgement, found the keys question_id, turns; name an",
        ),
        (
            {"judge": []},
            r"line 1: expected the names of the judge and of its prompt, found '\[\]'; name another --output",
        ),
        ({"score": "9"}, r"line 1: expected a turn and a score that are numbers, .* found 1, '9' and \[\]; name"),
        ({"turn": "first"}, r"line 1: expected a turn and a score that are numbers, .* found 'first', 1 and"),
        ({"question_id": [1]}, r"line 1: expected a number or a text as question_id, found \[1\]"),
    ],
)
def test_a_file_that_holds_no_judgements(row: dict[str, Any], message: str, questions: Path, tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    whole = {"question_id": 1, "category": "a", "turn": 1, "model": "m", "user_prompt": "", "score": 1, "judge": ["m"]}
    path.write_text(json.dumps(row if "turns" in row else {**whole, **row}), encoding="utf-8")
    with answering((200, completion("[[9]]"))) as asked, pytest.raises(ValueError, match=message):
        asyncio.run(grade("m", [Item(read_questions(questions)[0], 1, {"m": ["an answer"]})], path))
    assert not asked


@pytest.mark.parametrize("models", [("a",), ("a", "b")])
def test_new_answers_are_graded_anew(models: tuple[str, ...], questions: Path, tmp_path: Path) -> None:
    """Ratings of earlier answers stay in the file and do not count, as after a model was trained again."""
    question, path = read_questions(questions)[0], tmp_path / "judgements.jsonl"
    calls = []
    for answer in ("good", "good", "nonsense"):
        item = Item(question, 1, {name: [answer, ""] for name in models})
        with answering((200, completion("[[9]] [[A]]"))) as asked:
            (row,) = asyncio.run(grade("m", [item], path))
        calls.append(len(asked))
        assert answer in str(row)
    assert calls == [len(models), 0, len(models)]
    assert len(rows_of(path)) == 2
