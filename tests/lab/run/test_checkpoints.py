"""Errors of writing to a full disk name the path, whichever library raises them."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from sparsegrad_lab.run.checkpoints import writing

resource = pytest.importorskip("resource", reason="limits on the size of a file: not on Windows")


@contextmanager
def full_disk() -> Iterator[None]:
    """No file may hold more than 8 bytes, which fails as a full disk does. Python ignores the signal for it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_text(path: Path) -> None:
    with path.open("w") as file:  # Python names a file that it cannot open, and none that it cannot write to
        file.write("more than 8 bytes")


@pytest.mark.parametrize(
    "write",
    [
        write_text,
        lambda path: torch.save({"a": torch.zeros(3)}, path),
        lambda path: save_file({"a": torch.zeros(3)}, path),
        lambda path: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(path)),
    ],
    ids=["python", "torch", "safetensors", "tokenizers"],
)
def test_a_full_disk_is_an_error_with_a_path(write: Callable[[Path], None], tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"run") as caught, full_disk(), writing(tmp_path / "run"):
        write(tmp_path / "file")
    assert caught.value.errno in (errno.EFBIG, errno.ENOSPC)
    assert caught.value.filename == str(tmp_path / "run")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(errno.ECONNREFUSED, "refused"), Exception("missing (os error 2)")]
)
def test_other_errors_stay(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, writing(tmp_path):
        raise error
    assert caught.value is error
