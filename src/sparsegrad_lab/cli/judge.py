"""`sparsegrad judge`."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from ..run.parsing import VerbParser, make_parser
from ..run.whole_files import check_file, write_whole

EXAMPLE = (
    "sparsegrad judge runs/lora/answers/mt.jsonl runs/sparsegrad/answers/mt.jsonl --questions "
    "mt.jsonl --model gpt-4o; prints a table of mean ratings by category and model, with 95 % intervals."
)


def main(argv: list[str]) -> None:
    """Grade answers with a judge, and print a table."""
    options = _parser().parse_args(argv)
    _check(options)
    from ..chat.answers_page import answers_page
    from ..chat.endpoint import Endpoint
    from ..chat.grading import Grading, has_reference, pair_items, single_items
    from ..chat.prompts import read_prompts
    from ..chat.questions import REFERENCE_CATEGORIES
    from ..chat.ratings import table_of
    from ..run.progress_bar import make_progress_bar

    output = _output_file(options)
    _check_written(options, output)
    questions, models = _read(options)
    prompts = read_prompts(None if options.prompts is None else Path(options.prompts))
    judge = Endpoint(options.model, timeout=options.timeout)
    without = [
        f"{question.id} (turn {turn})"
        for question in questions if question.category in REFERENCE_CATEGORIES
        for turn in range(1, len(question.turns[:2]) + 1) if not has_reference(question, turn)
    ]  # fmt: skip
    if without:
        print(f"no reference answer, graded without: {', '.join(without)}", file=sys.stderr)
    items = (single_items if options.mode == "single" else pair_items)(questions, models)
    with make_progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("judging", total=len(items))

        async def grade() -> list[dict[str, Any]]:
            try:
                grading = Grading(judge, prompts, options.concurrency)
                return await grading.run(items, output, lambda count: bar.advance(task, count))
            finally:
                await judge.close()

        rows = asyncio.run(grade())
    table, note = table_of(rows), _note(rows, options.mode, next(iter(models)))
    _show(table, note)
    if options.page is not None:
        write_whole(Path(options.page), answers_page(questions, models, rows, table, note))
        print(f"page: {options.page}")
    print(f"judgements: {output}")


def _parser() -> VerbParser:
    parser = make_parser(
        "judge",
        "Let a strong model grade answers from 1 to 10 (FastChat's single-answer grading), or compare them in pairs. "
        "The model is on a server with OpenAI's interface: $OPENAI_API_KEY is the key, $OPENAI_BASE_URL the address "
        "(default: OpenAI's). The same command continues an interrupted one.",
        EXAMPLE,
    )
    parser.add_argument("answers", type=str, nargs="+", help="answer files of sparsegrad generate, one for each model")
    for name, meaning in {
        "questions": "the file of questions that were answered",
        "model": "name of the judge on the server",
    }.items():
        parser.add_argument(f"--{name}", type=str, required=True, help=meaning)
    parser.add_argument(
        "--mode", type=Literal["single", "pair"], default="single",
        help="single: rate each answer; pair: compare each file with the first one, in both orders",
    )  # fmt: skip
    for name, meaning in {
        "references": "file of reference answers, in the form of answers; default: the questions' own",
        "prompts": "FastChat's judge_prompts.jsonl; default: this package's own wording",
        "output": "file of judgements; default: judgements-MODEL-MODE.jsonl beside the first answers",
        "page": "Markdown file to write: the table, and all answers side by side",
    }.items():
        parser.add_argument(f"--{name}", type=str | None, default=None, help=meaning)
    parser.add_argument("--concurrency", type=int, default=8, help="largest number of requests at the same time")
    parser.add_argument(
        "--timeout", type=float, default=300.0, help="seconds to wait for a judgement, repetitions included"
    )
    return parser


def _check(options: Any) -> None:
    if options.concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, found {options.concurrency}")
    if not 0 < options.timeout < float("inf"):
        raise ValueError(f"timeout must be above 0, found {options.timeout}")
    if options.mode == "pair" and len(options.answers) < 2:
        raise ValueError("mode pair compares answer files with the first one: expected at least two, found one")


def _check_written(options: Any, output: Path) -> None:
    """Raise an error for a file that cannot be written, or is another file of the command."""
    known = {Path(path).resolve(): "a file of answers" for path in options.answers}
    for name in ("questions", "references", "prompts"):
        if (path := getattr(options, name)) is not None:
            known[Path(path).resolve()] = f"--{name}"
    written = {"--output": output} | ({} if options.page is None else {"--page": Path(options.page)})
    for name, file in written.items():
        check_file(file)
        if file.resolve() in known:
            raise ValueError(f"{name}: {file} is also {known[file.resolve()]}; name another file to write")
        known[file.resolve()] = name


def _read(options: Any) -> tuple[list[Any], dict[str, Any]]:
    """Questions with their references, and answers by the name of the model."""
    from ..chat.answers import read_answers
    from ..chat.questions import read_questions

    questions = read_questions(Path(options.questions))
    if options.references is not None:
        _, references = read_answers(Path(options.references), ())
        questions = [replace(q, reference=tuple(references.get(q.id, q.reference))) for q in questions]
    models: dict[str, Any] = {}
    for path in options.answers:
        name, answers = read_answers(Path(path), questions)
        if name in models:
            raise ValueError(f"{path}: a second file of model {name}; give each a model_id of its own")
        models[name] = answers
    return questions, models


def _output_file(options: Any) -> Path:
    if options.output is not None:
        return Path(options.output)
    judge = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in options.model)
    return Path(options.answers[0]).parent / f"judgements-{judge}-{options.mode}.jsonl"


def _note(rows: list[dict[str, Any]], mode: str, first: str) -> str:
    """What the numbers of the table mean."""
    from ..chat.ratings import unrated

    what = "Mean rating, 1 to 10," if mode == "single" else f"Share of wins against {first} (a tie counts half),"
    note = f"{what} with its 95 % interval over questions."
    count = unrated(rows)
    return f"{note} {count} of {len(rows)} judgements have no rating and are left out." if count else note


def _show(found: dict[str, dict[str, Any]], note: str) -> None:
    from ..chat.ratings import TOTAL

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    names = list(dict.fromkeys(name for means in found.values() for name in means))
    ends = [name for name in names if name.startswith("turn ") or name == TOTAL]
    table = Table("", *found)
    for name in [*sorted(set(names) - set(ends)), *sorted(ends, reverse=True)]:
        table.add_row(name, *(str(means.get(name, "")) for means in found.values()))
    console.print(table)
    console.print(note)
