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

_NO_ROOM = re.compile(r"os error (\d+)|PytorchStreamWriter failed|file write failed|unexpected pos")


def is_whole(checkpoint: Path) -> bool:
    """Whether all that the trainer needs to go on is there, and no file was cut off by a kill or a full disk.

    Looks at the ends of the files only: safetensors says its size in its head, a zip file (PyTorch's format) has its
    table of contents at its end.
    """
    weights = list(checkpoint.glob("*.safetensors"))
    states = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt", *checkpoint.glob("rng_state*.pth")]
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        for path in checkpoint.glob("*config.json"):
            json.loads(path.read_text(encoding="utf-8"))
        for path in states:
            zipfile.ZipFile(path).close()
        for path in weights:
            with safe_open(path, "pt"):
                pass
    except (OSError, ValueError, zipfile.BadZipFile, SafetensorError):
        return False
    return bool(weights) and len(states) > 2


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """What safetensors and PyTorch raise where a file cannot be written becomes an OSError, which it is."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        found = _NO_ROOM.search(str(error))
        if found is None:
            raise
        number = int(found[1]) if found[1] else errno.ENOSPC
        first_line = str(error).splitlines()[0]
        raise OSError(number, f"a file could not be written ({first_line})", str(place)) from error
