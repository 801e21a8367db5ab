"""What all benchmarks share: the environment record, timing in turn, common options, the result file."""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from sparsegrad_lab.run.machine import processor


def environment(seed: int) -> dict[str, Any]:
    """Return commit, versions and machine of this run. Raises if git cannot read the commit."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()

    return {
        "command": "python " + " ".join([sys.argv[0], *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "src", "benchmarks/*.py")),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sparsegrad_peft": version("sparsegrad-peft"),
        "machine": f"{processor()}, {torch.get_num_threads()} threads",
    }


def time_in_turn(steps: dict[str, Callable[[], object]], repeats: int, warmup: int = 2) -> dict[str, list[float]]:
    """Return the milliseconds of each step. The steps take turns, so that a slow moment affects all of them."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-warmup, repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def parser(description: str | None, result: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results") / result, help="result file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    return parser


def write(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten: {path}")
