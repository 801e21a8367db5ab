"""What a release is made of: one version, true badges, and a wheel with every file that the package reads."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import yaml
from blocks import ROOT

import sparsegrad_peft
from helpers import PROJECT


def test_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert PROJECT["version"] == sparsegrad_peft.__version__ == citation["version"]
    assert PROJECT["license"] == citation["license"] == "Apache-2.0"


def test_badges_are_true() -> None:
    badges = re.findall(r"\[!\[([^\]]+)\]\(https://img\.shields\.io", (ROOT / "README.md").read_text(encoding="utf-8"))
    versions = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", name)]
    assert badges == [
        f"Python {versions[0]} to {versions[-1]}",
        f"Licence {PROJECT['license']}",
        "Paper EMNLP 2024",
    ]


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1500


def test_workflows_call_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    assert {"make test", "make docs"} <= set(commands)
    for command in commands:
        target = command.removeprefix("make ").replace("${{ matrix.of }}", "lowest")
        assert re.search(rf"^(?:[\w-]+ )*{target}\b.*:", makefile, re.MULTILINE), command


def test_the_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """The wheel is built from the working tree as `make dist` does, without an environment of its own."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert packed == sources
