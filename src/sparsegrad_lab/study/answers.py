"""Answers of an experiment's models to the same questions: the paper's Table 6 and Appendix E.

A study removes the weights of its runs, so a model answers directly after its training. The files are in
`RESULTS/EXPERIMENT/answers/`: `questions.jsonl`, and for each model and task a file of answers per method, and a page
with all answers side by side.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..chat.answers import read_answers
from ..chat.answers_page import answers_page
from ..chat.questions import Question, read_questions
from ..run.whole_files import write_whole
from ..tasks.read import read_objects
from .experiment import Cell, Experiment


@dataclass(frozen=True)
class AnswerFiles:
    """The answers of a study.

    Args:
        results: folder of the study's result files.
        source: the questions, in the form of MT-Bench.
        count: answer this many of them, evenly spaced over the file; None: all.

    Raises:
        FileNotFoundError: there is no such file of questions.
        ValueError: a line is no question, or there are fewer than `count`.
    """

    results: Path
    source: Path
    count: int | None = None

    def __post_init__(self) -> None:
        available = len(read_questions(self.source))
        if self.count is not None and not 1 <= self.count <= available:
            raise ValueError(f"expected a number of questions from 1 to {available}, found {self.count}")

    def write_questions(self, experiment: Experiment) -> None:
        """Write the questions of an experiment, as they are in `source`."""
        rows = [row for _, row in read_objects(self.source)]
        count = len(rows) if self.count is None else self.count
        chosen = [rows[place * len(rows) // count] for place in range(count)]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        write_whole(self.questions_file(experiment), lines)

    def questions_file(self, experiment: Experiment) -> Path:
        """The file of the questions that the models answer."""
        return self.results / experiment.name / "answers" / "questions.jsonl"

    def file(self, cell: Cell) -> Path:
        """The file of a run's answers."""
        return self.questions_file(cell.experiment).parent / cell.model_and_task / f"{cell.method}.jsonl"

    def page(self, cell: Cell) -> Path:
        """The page with the answers of all methods on the model and the task of a run."""
        return self.file(cell).with_name("answers.md")

    def lacks(self, cell: Cell) -> bool:
        """True if the model of a run is to answer the questions, and has not answered all of them."""
        return cell.answers and not self._has_all(cell)

    def _has_all(self, cell: Cell) -> bool:
        try:
            read_answers(self.file(cell), read_questions(self.questions_file(cell.experiment)))
        except (FileNotFoundError, ValueError):  # `sparsegrad generate` names what is wrong, or goes on
            return False
        return True

    def command(self, cell: Cell, run: Path) -> list[str]:
        """The arguments of `sparsegrad` that let the model of a run answer; it goes on with an interrupted file."""
        settings = cell.experiment.answers
        assert settings is not None
        return [
            "generate", str(run), "--questions", str(self.questions_file(cell.experiment)),
            "--output", str(self.file(cell)), "--model_id", cell.method, "--seed", str(settings.seed),
            "--max_new_tokens", str(settings.max_new_tokens), "--batch_size", str(settings.batch_size),
        ]  # fmt: skip

    def remove(self, cell: Cell) -> None:
        """Remove the answers of a run, which is done again."""
        if cell.answers:
            self.file(cell).unlink(missing_ok=True)

    def sets(self, cells: Iterable[Cell]) -> list[list[Cell]]:
        """The runs whose models have answered all questions, by model and task."""
        found: dict[Path, list[Cell]] = {}
        for cell in cells:
            if cell.answers and self._has_all(cell):
                found.setdefault(self.page(cell), []).append(cell)
        return list(found.values())

    def write_page(self, cells: Sequence[Cell], note: str) -> Path:
        """Write the page of some runs of one model and task, without ratings; `note` says why there are none."""
        questions: list[Question] = read_questions(self.questions_file(cells[0].experiment))
        answers = {cell.method: read_answers(self.file(cell), questions)[1] for cell in cells}
        page = self.page(cells[0])
        write_whole(page, answers_page(questions, answers, [], {}, note))
        return page
