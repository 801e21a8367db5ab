"""Which checkpoints are whole, and errors of writing one in plain words."""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

_NO_ROOM = re.compile(r"os error (\d+)|PytorchStreamWriter failed|file write failed|unexpected pos|iostream error")


def is_whole(checkpoint: Path) -> bool:
    """Whether all that the trainer needs to go on is there, and no file was cut off by a kill or a full disk.

    A zip file (PyTorch's format) has checksums and its table of contents at its end. safetensors says its size in its
    head and has no checksums: numbers that a failing disk has changed are not found.
    """
    weights = list(checkpoint.glob("*.safetensors"))
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*config.json"):
            json.loads(path.read_text(encoding="utf-8"))
        for path in states:
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() is not None:
                    return False
        for path in weights:
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError):
        return False
    return bool(weights) and len(states) > 2


def best_step(checkpoint: Path) -> int | None:
    """The step of the best evaluation so far, which has a checkpoint of its own; None before the first."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    found: int | None = state.get("best_global_step")
    return found


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """An error of writing a file becomes an OSError that names the place.

    safetensors and PyTorch raise errors of their own kinds, and Python names a file that cannot be opened, but not one
    that cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(place)) from error
    except (SafetensorError, RuntimeError) as error:
        found = _NO_ROOM.search(str(error))
        if found is None:
            raise
        number = int(found[1]) if found[1] else errno.ENOSPC
        first_line = str(error).splitlines()[0]
        raise OSError(number, f"a file could not be written ({first_line})", str(place)) from error
