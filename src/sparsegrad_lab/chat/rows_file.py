"""A file of JSON lines that grows by whole lines: a kill or a full disk loses at most the line in flight."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..run.checkpoints import writing
from ..run.folder import check_file
from ..tasks.read import read_objects


class RowsFile:
    """An open file; see `open_rows`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _drop_torn_line(path)
        self.rows: list[dict[str, Any]] = [row for _, row in read_objects(path)] if path.is_file() else []

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; it is on the disk when this returns."""
        self.rows.append(row)
        with writing(self.path), self.path.open("ab") as file:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def open_rows(path: Path) -> Iterator[RowsFile]:
    """Open a file for one process, with the rows that it already has. A line that a kill cut off is removed.

    Raises:
        ValueError: another line is no JSON object.
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
        yield RowsFile(path)
    finally:
        lock.release()


def _drop_torn_line(path: Path) -> None:
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
