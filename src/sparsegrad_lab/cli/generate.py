"""`sparsegrad generate`."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.console import Console

from ..run.parsing import make_parser
from ..run.whole_files import check_file
from .chat import check_sampling

EXAMPLE = (
    "sparsegrad generate runs/oasst1/sparsegrad --questions mt_bench.jsonl; writes "
    "runs/oasst1/sparsegrad/answers/mt_bench.jsonl, and prints the number of answers. The same command continues an "
    "interrupted one."
)


def main(argv: list[str]) -> None:
    """Answer the questions of a file."""
    parser = make_parser(
        "generate",
        "Let a language model answer the questions of a file in the form of MT-Bench, turn by turn. Writes FastChat's "
        "answer file, which sparsegrad judge reads.",
        EXAMPLE,
    )
    parser.add_argument("model", type=str, help="folder of a finished run or of an adapter, or a pretrained model "
                        "(hub name, folder, GGUF file, smollm2)")  # fmt: skip
    parser.add_argument("--questions", type=str, required=True,
                        help='JSON lines with "question_id", "category" and "turns"')  # fmt: skip
    parser.add_argument("--output", type=str | None, default=None,
                        help="file to write; default for a run: answers/QUESTIONS.jsonl in its folder")  # fmt: skip
    parser.add_argument("--model_id", type=str | None, default=None,
                        help="name of the model in the file; default: the last two parts of its path")  # fmt: skip
    parser.add_argument("--temperature", type=float | None, default=None,
                        help="of all answers; default: by category, as FastChat: writing and roleplay 0.7, stem and "
                        "humanities 0.1, extraction, math, coding and reasoning 0, others 0.7")  # fmt: skip
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="maximum length of an answer")
    parser.add_argument("--batch_size", type=int, default=8, help="questions that are answered at the same time")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args(argv)
    check_sampling(options)
    if options.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {options.batch_size}")
    output = output_file(options.model, options.output, options.questions)
    from ..chat.questions import read_questions

    questions = read_questions(Path(options.questions))
    check_file(output)
    from ..chat.generation import AnswerSettings, answer_questions
    from ..chat.model import open_model
    from ..run.progress_bar import make_progress_bar

    model = open_model(options.model)
    model_id = options.model_id or default_id(options.model)
    settings = AnswerSettings(options.seed, options.max_new_tokens, options.temperature)
    with make_progress_bar(Console(stderr=True)) as bar:
        task = bar.add_task("answering", total=len(questions))
        count = answer_questions(
            model, questions, output, model_id=model_id, settings=settings, batch_size=options.batch_size,
            advance=lambda done: bar.advance(task, done),
        )  # fmt: skip
    print(f"written: {output} ({count} new answers, {len(questions)} in all)")
    paths = [shlex.quote(str(path)) for path in (output, options.questions)]
    print(f"next:    sparsegrad judge {paths[0]} --questions {paths[1]} --model JUDGE")


def default_id(model: str) -> str:
    """Return the last two parts of a model's path. Those of a folder are of its full path: `.` has none."""
    path = Path(model)
    return "-".join((path.resolve() if path.exists() else path).parts[-2:])


def output_file(model: str, output: str | None, questions: str) -> Path:
    """Return the file to write.

    Raises:
        ValueError: there is no default, since `model` is no run.
    """
    if output is not None:
        return Path(output)
    if (Path(model) / "config.yaml").is_file():
        return Path(model) / "answers" / f"{Path(questions).stem}.jsonl"
    raise ValueError(f"{model} is not the folder of a run: name a file to write with --output")
