"""Run one run of each experiment again, and compare its score with the committed one.

    python benchmarks/repeat.py               # all experiments
    python benchmarks/repeat.py glue digits   # some

It takes the shortest run of each experiment that trains from beginning to end, with the learning rate that the
committed search found. The result file keeps the experiments that are not repeated this time.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from record import environment, parser, write

STUDY = Path(__file__).parent / "results" / "study"


def shortest_run(experiment: str) -> Path:
    """Return the result file of the experiment's finished run with the shortest training.

    A resumed run is left out: its time is only that since it was resumed.

    Raises:
        ValueError: there is no such run.
    """
    found = []
    for file in sorted((STUDY / experiment).glob("*/*/*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["status"] == "finished" and not result.get("resumed"):
            found.append((result["training"]["seconds"], file))
    if not found:
        raise ValueError(f"{STUDY / experiment}: expected a finished run that was not resumed, found none")
    return min(found)[1]


def repeat(experiment: str, folder: Path, threads: int) -> dict[str, Any]:
    """Run the experiment's shortest run again, with the committed searches, and return both scores."""
    file = shortest_run(experiment)
    first = json.loads(file.read_text(encoding="utf-8"))
    method, seed = file.stem.rsplit("-", 1)
    results = folder / "results"
    for search in STUDY.glob("*/search"):
        shutil.copytree(search, results / search.relative_to(STUDY), dirs_exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "sparsegrad_lab.cli.main", "reproduce", experiment, "--tasks", first["task"],
         "--methods", method, "--seeds", seed, "--results", str(results), "--runs", str(folder / "runs"),
         "--threads", str(threads)],
        check=True,
    )  # fmt: skip
    second = json.loads((results / file.relative_to(STUDY)).read_text(encoding="utf-8"))
    return {
        "run": str(file.relative_to(STUDY).with_suffix("")),
        "metric": first["metric"],
        "scores": [first["score"], second["score"]],
        "commits": [result["environment"]["commit"] for result in (first, second)],
        "devices": [result["environment"]["device"] for result in (first, second)],
    }


def main() -> None:
    arguments = parser(__doc__, "repeats.json")
    arguments.add_argument("experiments", nargs="*", help="default: all that have results")
    arguments.set_defaults(threads=1)
    options = arguments.parse_args()
    names = options.experiments or sorted(folder.name for folder in STUDY.iterdir())
    repeats = json.loads(options.json.read_text(encoding="utf-8"))["repeats"] if options.json.is_file() else {}
    for name in names:
        with TemporaryDirectory() as folder:
            repeats[name] = repeat(name, Path(folder), options.threads)
        print(name, repeats[name]["run"], *repeats[name]["scores"])
        write(options.json, {"benchmark": "repeats", "environment": environment(options.seed), "repeats": repeats})


if __name__ == "__main__":
    main()
