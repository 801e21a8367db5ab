"""SHA-256 of files. Light: imports no torch and no data library."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path


def sha256_of(files: Iterable[Path]) -> str:
    """Return the SHA-256 of the contents of files, one after the other. They may be larger than memory."""
    digest = sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
