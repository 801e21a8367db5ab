"""A file of JSON lines that grows by whole lines: a kill or a full disk loses at most the line in flight."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..run.checkpoints import writing
from ..run.whole_files import check_file
from ..tasks.read import objects_in


class RowsFile:
    """An open file; see `open_rows`."""

    def __init__(self, path: Path, check: Callable[[dict[str, Any], str], None]) -> None:
        self.path = path
        content = path.read_bytes() if path.is_file() else b""
        end = content.rfind(b"\n") + 1
        last_is_whole = _is_object(content[end:])
        self._whole: int | None = len(content) if last_is_whole else end
        self._break = b"\n" if last_is_whole else b""
        self.rows: list[dict[str, Any]] = []
        for line, row in objects_in(content[: self._whole], path):
            check(row, f"{path}, line {line}")
            self.rows.append(row)

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns. The first one replaces a line that a kill cut off."""
        self.rows.append(row)
        with writing(self.path), self.path.open("ab") as file:
            if self._whole is not None:
                file.truncate(self._whole)
                file.write(self._break)
                self._whole = None
            # A judge may write half of a pair of surrogates, which is no character.
            file.write(json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def open_rows(path: Path, check: Callable[[dict[str, Any], str], None] = lambda row, where: None) -> Iterator[RowsFile]:
    """Open a file for one process, with the rows that it already has. It changes with the first row that is added.

    Args:
        path: the file.
        check: gets each row and its place, and raises ValueError if it does not belong in the file.

    Raises:
        ValueError: a line that a kill cannot have cut off is no JSON object.
        FileExistsError: another process has the file open.
    """
    check_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FileExistsError(f"{path}: another process writes this file; wait for it, or write another one") from None
    try:
        yield RowsFile(path, check)
    finally:
        lock.release()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False
