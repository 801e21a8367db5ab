"""Commit, versions and machine, for the record of a run or a benchmark."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("sparsegrad-peft", "torch", "transformers", "peft", "accelerate", "datasets", "scikit-learn")


def processor() -> str:
    """Name of the CPU; the kernel's, which `platform` does not give on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def checkout() -> dict[str, Any]:
    """Commit of the checkout that this package is imported from, and whether its source was changed since.

    An installed package has no commit; its version says what it is, and `commit` is None.

    Raises:
        subprocess.CalledProcessError: it is a checkout, and git cannot read it.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "src"))}


def environment() -> dict[str, Any]:
    """All of it, JSON-able."""
    # A virtual machine's processor often has a family's name alone; the instructions tell which of them it is.
    instructions = torch.backends.cpu.get_cpu_capability()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor()}, {instructions}"
    return {
        **checkout(),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "device": device,
        "threads": torch.get_num_threads(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
