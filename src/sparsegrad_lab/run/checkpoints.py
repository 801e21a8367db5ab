"""Which checkpoints are complete, and write errors that name the file."""

from __future__ import annotations

import errno
import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

_WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
_NO_SPACE = re.compile(r"os error (\d+)|PytorchStreamWriter failed|file write failed|unexpected pos|iostream error")


def is_complete(checkpoint: Path) -> bool:
    """True if a run can resume from the checkpoint: no file is missing or truncated.

    PyTorch's zip files have checksums. Safetensors files store their size but no checksum, so that values changed by a
    failing disk are not found.
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
    """Step of the best evaluation up to this checkpoint; None before the first evaluation."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    step: int | None = state.get("best_global_step")
    return step


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing to a disk into an OSError that names the path.

    Safetensors, tokenizers and PyTorch raise errors of their own types. Python names a file that cannot be opened, but
    not one that cannot be written to.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _WRITE_ERRORS or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except Exception as error:  # tokenizers raise a plain Exception
        match = _NO_SPACE.search(str(error))
        number = int(match[1] or errno.ENOSPC) if match else None
        if number not in _WRITE_ERRORS:
            raise
        first_line = str(error).splitlines()[0]
        raise OSError(number, f"a file could not be written ({first_line})", str(path)) from error
