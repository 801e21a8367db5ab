"""Write files and folders completely or not at all: a kill or a full disk leaves the previous version.

Of several processes of one run, rank 0 writes. The functions that write do nothing on the others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

from .checkpoints import writing
from .processes import is_rank0


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file under a draft name, then rename it: readers see the old file or the new one, both complete."""
    if not is_rank0():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex[:12]}.draft")
    try:
        with writing(path), draft.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        _sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def save_whole(folder: Path, save: Callable[[Path], object]) -> None:
    """Let `save` fill a draft folder, then rename it. A previous folder stays complete until then.

    The files are on the disk when this returns, so that a file written later may say so.
    """
    if not is_rank0():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.with_name(f".{folder.name}.draft")
    former = folder.with_name(f".{folder.name}.former")
    shutil.rmtree(draft, ignore_errors=True)
    if former.exists() and not folder.exists():  # killed between the two renames below
        os.replace(former, folder)
    shutil.rmtree(former, ignore_errors=True)
    try:
        with writing(folder):
            save(draft)
            for path in (*draft.rglob("*"), draft):
                _sync(path)
        if folder.exists():
            os.replace(folder, former)
        os.replace(draft, folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        if former.exists() and not folder.exists():
            os.replace(former, folder)
        shutil.rmtree(former, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_of(folder: Path) -> list[Path]:
    """Files and folders in a folder, without the drafts that a killed process may have left."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if not is_draft(path))


def is_draft(path: Path) -> bool:
    """True for an unfinished file, or for the former version of a folder."""
    return path.name.startswith(".") and path.suffix in (".draft", ".former")


def check_file(path: Path) -> None:
    """Raise before any work if a file cannot be written.

    Raises:
        IsADirectoryError, NotADirectoryError, PermissionError: see the message.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file to write, found a folder")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Check by writing a temporary file in the nearest folder that exists; permissions alone do not tell.

    Raises:
        NotADirectoryError, PermissionError: see the message.
    """
    near = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not near.is_dir():
        raise NotADirectoryError(f"{folder}: {near} is a file, not a folder; choose another output folder")
    try:
        with tempfile.TemporaryFile(dir=near):
            pass
    except OSError as error:
        raise PermissionError(
            f"{folder}: cannot write in {near} ({error.strerror}); choose another output folder"
        ) from error
