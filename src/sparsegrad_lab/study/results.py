"""Finds and reads the result files of runs."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .experiment_files import experiment_names
from .runs import Failure, RejectedFileError, Run, parse_result, read_json

STUDY_MARKS = (".study", "claims.journal")
"A folder that holds one of these files holds the run folders of a study; the second name is an earlier version's."
_RUN_MARKS = {"result.json", "environment.json", ".lock", "checkpoints"}
"A folder with config.yaml and other folders is a run's if it holds one of these; else the config is one's own."
_EXPECTED = "expected the result of a run, as sparsegrad train writes it"
SEARCH_MARKS = ("search.json", "trials.journal")

_RUN_OF_EXPERIMENT = re.compile(r".+-(lr.+|\d+)\.json")
"Name of a run's or a trial's file; it lies in EXPERIMENT/MODEL/TASK or EXPERIMENT/search/MODEL/TASK."


@dataclass(frozen=True)
class ResultFiles:
    """What there is below some paths."""

    runs: tuple[Run, ...]
    failures: tuple[Failure, ...]
    unfinished: tuple[Path, ...]
    "run folders without a result: interrupted, or still running"
    rejected: tuple[str, ...]
    "files that were left out, each with the reason"


def read_results(paths: Iterable[str | Path]) -> ResultFiles:
    """Read all results below some paths.

    The run folders of a study and the trials of a search are left out, unless the path is that study or search itself.
    A file that does not follow the schema is left out and named in `rejected`.

    Args:
        paths: run folders, folders that hold some, or result files.

    Raises:
        FileNotFoundError: a path does not exist, or there is no result below any of them.
    """
    roots = [Path(path) for path in paths]
    seen: set[str] = set()
    first: dict[Any, Path] = {}
    runs: list[Run] = []
    failures: list[Failure] = []
    unfinished: list[Path] = []
    rejected: list[str] = []
    other: list[Path] = []
    for root in roots:
        if not root.exists():
            raise FileNotFoundError(f"there is no {root}; expected a run folder, or a folder with result files")
        for file in [root] if root.is_file() else sorted(_result_files(root)):
            real = os.path.realpath(file)  # Path.resolve raises an error for a link that leads to itself
            if real in seen:
                continue
            seen.add(real)
            try:
                content = read_json(file)
                record = parse_result(content, file)
                if record is None and (file == root or file.name == "result.json" or _is_meant_as_result(content)):
                    raise RejectedFileError(_EXPECTED)
            except FileNotFoundError:  # of a run folder, or removed since the folder was listed
                unfinished += [file.parent] if (file.parent / "config.yaml").is_file() else []
                continue
            except (RejectedFileError, OSError) as error:
                rejected.append(f"{file}: {error.strerror if isinstance(error, OSError) else error}")
                continue
            if isinstance(record, Run):
                before = first.setdefault(record.place, file)
                if before != file:
                    rejected.append(f"{file}: the same run as {before}, or another result in its place")
                    continue
                runs.append(record)
            elif isinstance(record, Failure):
                failures.append(record)
            else:
                other.append(file)
    experiments = {*experiment_names(), *(record.experiment for record in (*runs, *failures))}
    rejected += [f"{file}: {_EXPECTED}" for file in other if _is_of_a_run(file, experiments)]
    if not runs and not failures:
        notes = [*(f"  not finished: {folder}" for folder in unfinished), *(f"  left out: {why}" for why in rejected)]
        message = (
            f"no finished runs below {', '.join(map(str, roots))}; expected result.json files, as sparsegrad train "
            "writes them"
        )
        raise FileNotFoundError("\n".join([message, *notes]))
    return ResultFiles(tuple(runs), tuple(failures), tuple(unfinished), tuple(rejected))


def _is_meant_as_result(content: Any) -> bool:
    names = content.keys() if isinstance(content, dict) else set()
    return "status" in names or len({"task", "method", "seed", "config"} & names) > 1


def _is_of_a_run(file: Path, experiments: Container[str | None]) -> bool:
    """True if a file has the name of a run's file, below the folder of one of some experiments."""
    named = _RUN_OF_EXPERIMENT.fullmatch(file.name)
    return named is not None and any(folder.name in experiments for folder in file.absolute().parents[2:4])


def _result_files(root: Path) -> Iterator[Path]:
    """JSON files below a folder that may be results. Of a run folder that is `result.json` alone, also if it does not
    exist: its other files are not results, and they come and go while the run is going on.
    """
    for name, folders, files in os.walk(root):
        folder = Path(name)
        folders[:] = [inner for inner in folders if not inner.startswith(".")]
        if "config.yaml" in files and (not folders or _RUN_MARKS & {*files, *folders}):
            folders.clear()
            yield folder / "result.json"
            continue
        if folder != root and any(mark in files for mark in STUDY_MARKS):
            folders.clear()
            continue
        if folder != root and any(mark in files for mark in SEARCH_MARKS):
            folders[:] = [inner for inner in folders if not inner.startswith("trial-")]
        yield from (folder / file for file in files if file.endswith(".json") and not file.startswith("."))
