"""The files of the figures: the numbers, a picture each, and a page that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..run.folder import RunFolder, write_whole
from .curves import ageing, spectrum, update_norms
from .drawing import Drawing, of_run
from .flow import data_flow
from .matrices import gradient_before_after, touched
from .strided import strided_structure


def draw(data: dict[str, Any]) -> list[Drawing]:
    """All figures, from what `collect` returns."""
    return [
        data_flow(), gradient_before_after(data), strided_structure(data), spectrum(data), ageing(data), touched(data),
        update_norms(data),
    ]  # fmt: skip


def check_output(folder: Path) -> None:
    """Whether figures may be written there; former ones are replaced.

    Raises:
        FileExistsError: it holds something else than figures.
        NotADirectoryError, PermissionError: it cannot be written.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: expected a folder to write, found a file; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "figures.json").is_file():
        raise FileExistsError(
            f"{folder} is not empty and holds no figures (no figures.json); choose another output folder"
        )
    RunFolder(folder).check_writable()


def read(folder: Path) -> dict[str, Any]:
    """The numbers of figures that were made before.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is damaged, or holds something else.
    """
    path = folder / "figures.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there are no figures to draw again; leave out figures.redraw to make them")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        of_run(found)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: expected the numbers of figures ({error}); make them anew elsewhere") from error
    return found


def write(data: dict[str, Any], folder: Path) -> list[Drawing]:
    """`figures.json`, an SVG for each figure, and `index.md`; each written whole or not at all."""
    drawings = draw(data)
    write_whole(folder / "figures.json", json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    for drawing in drawings:
        write_whole(folder / f"{drawing.name}.svg", drawing.svg())
    write_whole(folder / "index.md", index(data, drawings))
    return drawings


def index(data: dict[str, Any], drawings: list[Drawing]) -> str:
    """The page, as Markdown."""
    environment = data["environment"]
    commit = f", commit {environment['commit'][:10]}" if environment.get("commit") else ""
    command = f": `{data['command']}`" if data.get("command") else ""
    shown = [f"## {each.title}\n\n![{each.alt}]({each.name}.svg)\n\n{each.see}" for each in drawings]
    end = (
        f"One run, seed {environment['seed']}{commit}{command}. The numbers are in `figures.json`; "
        "`--figures.redraw true` draws them again."
    )
    return "\n\n".join([f"# Figures: {of_run(data)}", *shown, end]) + "\n"
