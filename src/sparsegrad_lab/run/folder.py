"""The files of a run. Each is written whole or not at all, so that a kill or a full disk leaves the former one."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml

from .checkpoints import best_step, is_whole, writing
from .settings import RunArguments


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, then put it there: readers see an old one or a new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}.draft")
    try:
        with writing(path), draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def check_file(path: Path) -> None:
    """Raise before any work where a file cannot be written.

    Raises:
        IsADirectoryError, NotADirectoryError, PermissionError: see the message.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder")
    RunFolder(path.parent).check_writable()


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a folder beside its place, then put it there; a former one is whole until then, or comes back."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.draft")
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(draft, ignore_errors=True)
    if former.exists() and not folder.exists():  # a kill between the two steps below
        os.replace(former, folder)
    shutil.rmtree(former, ignore_errors=True)
    try:
        with writing(folder):
            save(draft)
        if folder.exists():
            os.replace(folder, former)
        os.replace(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if former.exists() and not folder.exists():
            os.replace(former, folder)
        shutil.rmtree(former, ignore_errors=True)


class RunFolder:
    """Where a run is kept.

    config.yaml       what was asked for, as run
    method.json       the PEFT config that was named as the method, where one was
    environment.json  commit, versions, device, seed
    calibration.json  its time and memory, where there was one; a run that was interrupted does not calibrate again
    metrics.json      the trainer's log: loss, learning rate, scores
    adapter/          the best evaluation's adapter; or model/, where the method trains the weights themselves
    tokenizer/        with which the model was trained; or processor/, which reads images
    result.json       scores, times, memory: written last, so it says that the run is finished
    curves.png        loss and score
    checkpoints/      while it runs
    merged/           after `sparsegrad merge`
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def checkpoints(self) -> Path:
        """Folder of the trainer's checkpoints."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").is_file()

    @property
    def weights(self) -> Path:
        """The adapter, or the model."""
        adapter = self.path / "adapter"
        return adapter if adapter.is_dir() else self.path / "model"

    def check(self, arguments: RunArguments) -> None:
        """Whether this run may have the folder: it is empty, or holds this very run.

        Raises:
            FileExistsError: the folder holds something else; the message says in what it differs.
            NotADirectoryError, PermissionError: it cannot be written.
        """
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"{self}: expected a folder to write, found a file; choose another output folder")
        if (self.path / "config.yaml").is_file():
            there, here = _with_defaults(self.read_arguments()), arguments.as_dict()
            there["output"] = here["output"]  # another name for the same folder
            found = {name: pair for name, pair in _differences(there, here).items() if pair[0] != pair[1]}
            if "method" not in found and (former := self.read_json("method.json")) is not None:
                now = json.loads(Path(arguments.method).read_text(encoding="utf-8"))
                found |= {n: pair for n, pair in _differences(former, now, "method").items() if pair[0] != pair[1]}
            if found:
                words = ", ".join(f"{name} ({found[name][0]} there, {found[name][1]} here)" for name in sorted(found))
                raise FileExistsError(
                    f"{self} holds another run, which differs in {words}; choose another output folder, or remove it"
                )
        elif self.path.exists() and any(self.path.iterdir()):
            raise FileExistsError(
                f"{self} is not empty and holds no run (no config.yaml); choose another output folder"
            )
        if not self.finished:
            self.check_writable()

    def check_writable(self) -> None:
        """By writing, in the nearest folder that there is: permissions alone do not say it, and nothing is left."""
        near = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not near.is_dir():
            raise NotADirectoryError(f"{self}: {near} is a file, not a folder; choose another output folder")
        try:
            with tempfile.TemporaryFile(dir=near):
                pass
        except OSError as error:
            raise PermissionError(
                f"{self}: nothing can be written in {near} ({error.strerror}); choose another output folder"
            ) from error

    def start(self, arguments: RunArguments) -> None:
        """Write down what was asked for, so that the folder is this run's."""
        if not (self.path / "config.yaml").is_file():
            if arguments.method.endswith(".json"):  # a PEFT config, which may be edited meanwhile
                self.write_json("method.json", json.loads(Path(arguments.method).read_text(encoding="utf-8")))
            self.write_yaml("config.yaml", arguments.as_dict())

    def read_arguments(self) -> dict[str, Any]:
        """What the run was asked for.

        Raises:
            FileNotFoundError: this is no run folder.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            several = sorted(self.path.glob("seed-*"))
            hint = f"; it holds several runs, name one of them, such as {several[0]}" if several else ""
            raise FileNotFoundError(f"{self} is no run folder (no config.yaml){hint}")
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        return found

    def read_result(self) -> dict[str, Any]:
        """Scores, times and memory of a finished run."""
        found: dict[str, Any] = json.loads((self.path / "result.json").read_text(encoding="utf-8"))
        return found

    def read_json(self, name: str) -> Any:
        """A JSON file's content; None where it is not there."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write_yaml(self, name: str, content: Any) -> None:
        """Write a YAML file."""
        write_whole(self.path / name, yaml.safe_dump(content, sort_keys=False, allow_unicode=True))

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file; NaN and infinity, such as a gradient's norm may be, become null."""
        write_whole(self.path / name, json.dumps(_without_nan(content), indent=2, allow_nan=False) + "\n")

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint; `drop_broken_checkpoints` leaves none but those that a run can go on from."""
        return max(self.checkpoints.glob("checkpoint-*"), key=_step, default=None)

    def drop_broken_checkpoints(self) -> list[str]:
        """Remove what a run cannot go on from, so that the trainer does not count it; returns the names.

        That is a checkpoint that a kill or a full disk has cut off, and one without the best checkpoint before it: the
        trainer ends with the best one's weights, and would quietly take its last where that is gone.
        """
        found = sorted(self.checkpoints.glob("checkpoint-*"), key=_step)
        whole = {_step(path) for path in found if is_whole(path)}
        broken = [path for path in found if _step(path) not in whole or (best_step(path) or _step(path)) not in whole]
        for path in broken:
            shutil.rmtree(path)
        return [path.name for path in broken]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _without_nan(content: Any) -> Any:
    """NaN and infinity, which JSON has not, as null."""
    if isinstance(content, dict):
        return {name: _without_nan(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run that an earlier version began, with those that it did not know."""
    known = RunArguments().as_dict()
    groups = {name: {**group, **settings.get(name, {})} for name, group in known.items() if isinstance(group, dict)}
    return {**known, **settings, **groups}


def _differences(there: Any, here: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return {prefix: (there, here)}
    return {
        name: pair
        for key in {*there, *here}
        for name, pair in _differences(there.get(key), here.get(key), f"{prefix}.{key}" if prefix else key).items()
    }
