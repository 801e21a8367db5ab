"""The folder of a run: which files it holds, and who may use it."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ..methods.registry import find_method
from ..methods.settings import resolved, updated
from ..tasks.checksums import sha256_of
from ..tasks.parse_files import read_json, read_yaml
from .checkpoints import best_step, is_complete
from .processes import process_count
from .settings import WITHOUT_EFFECT, RunArguments, flat
from .whole_files import check_writable, content_of, is_draft, write_whole

_ROWS = ("data.train_file", "data.validation_file", "data.unrelated")
"Settings that may name a file of rows."
_RESULT = ("task", "text", "labels", "metrics", "metric", "score", "trained_entries", "training", "calibration")
"Keys of result.json that other verbs read."
_BEFORE_THE_SETTINGS = {".lock", "method.json", "data.json"}
"Files that a killed process may have written before config.yaml."


class RunFolder:
    """The folder of a run.

    config.yaml       the settings
    method.json       the PEFT config, if it was given as the method
    data.json         SHA-256 of the files of rows, if the task has some
    environment.json  commit, versions, device, number of processes, seed, SHA-256 of the rows of each split
    calibration.json  time and memory of the calibration, if there was one; a resumed run does not calibrate again
    metrics.json      the trainer's log: losses, learning rates, scores
    adapter/          adapter of the best evaluation; model/ for a method that trains the weights themselves
    tokenizer/        tokenizer; processor/ for images
    logs/             TensorBoard's, with `report_to`
    curves.png        loss and score
    result.json       scores, times, memory; written last: the run is finished if it is there
    checkpoints/      while the run is not finished; .lock while a process trains
    merged/           after `sparsegrad merge`
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock = FileLock(self.path / ".lock")

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """True if the run is finished."""
        return (self.path / "result.json").is_file()

    @property
    def weights(self) -> Path:
        """Folder of the adapter or the model."""
        adapter = self.path / "adapter"
        return adapter if adapter.is_dir() else self.path / "model"

    def check(self, arguments: RunArguments) -> None:
        """Check that this run may use the folder: it is empty, or holds this very run.

        Raises:
            FileExistsError: the folder holds something else, and the message says what differs; or another process
                trains into it.
            NotADirectoryError, PermissionError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self}: expected a folder to write, found a file; choose another output folder")
        if (self.path / "config.yaml").is_file():
            if differences := self._differences(arguments):
                found = ", ".join(f"{name} ({there} there, {here} here)" for name, there, here in differences)
                raise FileExistsError(
                    f"{self} holds another run, which differs in {found}; choose another output folder, or remove it"
                )
        elif {path.name for path in content_of(self.path)} - _BEFORE_THE_SETTINGS:
            raise FileExistsError(
                f"{self} is not empty and holds no run (no config.yaml); choose another output folder"
            )
        if not self.finished:
            self._check_processes()
            check_writable(self.path)
            if (self.path / ".lock").is_file():  # without it, nobody trains; the folder stays as it is
                self._take()
                self._lock.release()

    def _check_processes(self) -> None:
        """Raise FileExistsError if the run was started on another number of processes: its steps have other rows."""
        there = (self.read_json("environment.json") or {}).get("processes", 1)
        if self.last_checkpoint() is not None and there != process_count():
            raise FileExistsError(
                f"{self} holds a run on {there} processes, found {process_count()}. The rows of a step depend on "
                f"the number of processes: resume it on {there}, or choose another output folder"
            )

    def holds_another_run(self, arguments: RunArguments) -> bool:
        """True if it is a run folder, and its run has other settings."""
        return (self.path / "config.yaml").is_file() and bool(self._differences(arguments))

    def _differences(self, arguments: RunArguments) -> list[tuple[str, Any, Any]]:
        """Settings that differ: name, value in the folder, value in `arguments`."""
        there, here = _with_defaults(self.read_arguments()), arguments.as_dict()
        there |= {name: here[name] for name in WITHOUT_EFFECT}
        there, here = resolved(there), resolved(here)
        if there["method"] == here["method"] and (former := self.read_json("method.json")) is not None:
            there["method"], here["method"] = former, read_json(Path(arguments.method))
        there, here = flat(there), flat(here)
        for name, content in (self.read_json("data.json") or {}).items():
            path = here.get(name)
            if path == there.get(name) and isinstance(path, str) and Path(path).is_file():
                there[name], here[name] = (
                    f"{path} with SHA-256 {sha[:12]}..." for sha in (content, sha256_of([Path(path)]))
                )
        names = sorted(there.keys() | here.keys())
        return [(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]

    def _take(self) -> None:
        """Lock the folder for this process. Raises FileExistsError if another one has locked it."""
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise FileExistsError(f"{self}: another process trains into this folder; wait for it") from None

    def release(self) -> None:
        """Let other processes train into the folder again."""
        if self._lock.is_locked:
            (self.path / ".lock").unlink(missing_ok=True)
            self._lock.release()

    def start(self, arguments: RunArguments) -> None:
        """Take the folder for this process, write the settings into it, and remove drafts of a killed process.

        Raises:
            FileExistsError: another process trains into the folder, or has finished the run since `check`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._take()
        if self.finished:
            raise FileExistsError(f"{self}: another process has just finished this run; the same command shows it")
        for path in self.path.glob(".*") if self.path.is_dir() else ():
            if is_draft(path) and path.is_file():
                path.unlink(missing_ok=True)
        if not (self.path / "config.yaml").is_file():
            if arguments.method.endswith(".json"):  # the file may be edited before the run is resumed
                self.write_json("method.json", read_json(Path(arguments.method)))
            if files := files_of_rows(arguments):  # they too may be changed before the run is resumed
                self.write_json("data.json", files)
            self.write_yaml("config.yaml", arguments.as_dict())

    def check_finished(self) -> None:
        """Raise FileNotFoundError if this is not a run folder, the run is not finished, or its weights are gone."""
        settings = self.read_arguments()
        if not self.finished:
            command = ["sparsegrad", "train", "--config", str(self.path / "config.yaml")]
            if Path(str(settings.get("output"))).resolve() != self.path.resolve():  # the folder was moved or copied
                command += ["--output", str(self)]
            raise FileNotFoundError(f"{self} holds a run that is not finished; resume it: {shlex.join(command)}")
        if not self.weights.is_dir():
            raise FileNotFoundError(
                f"{self} holds scores and no weights: adapter/ and model/ are gone. A search keeps no weights; train "
                "its best.yaml. Else remove result.json, and train again with the same command"
            )

    def read_arguments(self) -> dict[str, Any]:
        """The settings of the run.

        Raises:
            FileNotFoundError: this is not a run folder.
            ValueError: config.yaml is damaged.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            if not self.path.exists():
                raise FileNotFoundError(f"there is no {self}; expected the folder of a run")
            several = sorted(self.path.glob("seed-*"))
            hint = f"; it holds several runs, give one of them, such as {several[0]}" if several else ""
            raise FileNotFoundError(f"{self} is not a run folder (no config.yaml){hint}")
        settings = read_yaml(path)
        if not isinstance(settings, dict):
            raise ValueError(f"{path}: expected the settings of a run, found {type(settings).__name__}")
        return settings

    def read_result(self) -> dict[str, Any]:
        """Scores, times and memory of a finished run.

        Raises:
            ValueError: result.json is damaged.
        """
        path = self.path / "result.json"
        result = read_json(path)
        missing = [name for name in _RESULT if not isinstance(result, dict) or name not in result]
        if missing:
            raise ValueError(
                f"{path}: expected the result of a run, found none of its {', '.join(missing)}; remove the file, and "
                "train again with the same command"
            )
        return dict(result)

    def read_json(self, name: str) -> Any:
        """Content of a JSON file; None if there is no such file."""
        path = self.path / name
        return read_json(path) if path.is_file() else None

    def write_yaml(self, name: str, content: Any) -> None:
        """Write a YAML file."""
        write_whole(self.path / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file. NaN and infinity, which JSON does not have, become null."""
        write_whole(self.path / name, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint. Call `drop_broken_checkpoints` first."""
        return max(self.checkpoints.glob("checkpoint-*"), key=_step, default=None)

    def drop_broken_checkpoints(self) -> list[str]:
        """Remove checkpoints that a run cannot resume from, and return their names.

        These are incomplete checkpoints, and those whose best checkpoint before them is gone: the trainer loads the
        best one's weights at the end, and without it would silently keep the last ones.
        """
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=_step)
        complete = {_step(path) for path in found if is_complete(path)}
        broken = [
            path for path in found if _step(path) not in complete or (best_step(path) or _step(path)) not in complete
        ]
        for path in broken:
            shutil.rmtree(path)
        return [path.name for path in broken]


def output_folder(arguments: RunArguments) -> Path:
    """The output folder, with the names of the task and the method filled in."""
    task, method = arguments.task.replace("/", "-"), find_method(arguments.method).name
    return Path(arguments.output.replace("{task}", task).replace("{method}", method)).expanduser()


def files_of_rows(arguments: RunArguments) -> dict[str, str]:
    """SHA-256 of the files of rows, by setting."""
    settings = flat(arguments.as_dict())
    files = {name: settings[name] for name in _ROWS if settings[name] and Path(settings[name]).is_file()}
    return {name: sha256_of([Path(path)]) for name, path in files.items()}


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _without_nan(content: Any) -> Any:
    """The content with null in place of NaN and infinity."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, with the defaults of those that an earlier version did not have."""
    known = RunArguments().as_dict()
    settings = updated({**known, **settings})
    groups = {name: {**group, **settings.get(name, {})} for name, group in known.items() if isinstance(group, dict)}
    return {**known, **settings, **groups}
