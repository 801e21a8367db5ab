"""The output folder of the figures: the record, the arrays, a picture each, and a page that shows them.

figures.json   settings, environment and single numbers; {"array": NAME} stands for an array of figures.npz
figures.npz    the arrays
NAME.svg       a figure
index.md       all figures with their captions
"""

from __future__ import annotations

import base64
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from ..methods.settings import AdapterArguments, updated
from ..run.whole_files import check_writable, write_whole
from ..tasks.parse_files import read_json
from . import ageing, data_flow, gradient_before_after, spectrum, strided_structure, touched, update_norms
from .drawing import Drawing, run_title

FIGURES = (gradient_before_after, strided_structure, spectrum, ageing, touched, update_norms)
"""The measured figures, in the order of the page. Each module has `draw(data) -> Drawing`."""
PARTS = {"gradient", "rows", "spectrum", "ageing", "touched", "runs"}
"""The parts of the numbers, which the figures read."""


def draw(data: dict[str, Any]) -> list[Drawing]:
    """Draw all figures from the result of `collect` or `read`."""
    adapter = AdapterArguments(**updated(data["config"])["adapter"])
    return [data_flow.draw(adapter), *(figure.draw(data) for figure in FIGURES)]


def check_output(folder: Path) -> None:
    """Check that figures may be written to `folder`. Existing figures are replaced.

    Raises:
        FileExistsError: the folder holds something other than figures.
        NotADirectoryError, PermissionError: the folder cannot be written.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder}: expected a folder, found a file; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "figures.json").is_file():
        raise FileExistsError(f"{folder}: not empty and has no figures.json; choose another output folder")
    check_writable(folder)


def write(data: dict[str, Any], folder: Path) -> list[Drawing]:
    """Write numbers, figures and page, each file atomically, and return the figures."""
    drawings = draw(data)
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    record = json.dumps(_take_arrays(data, "", arrays), indent=1, ensure_ascii=False, allow_nan=False)
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_whole(folder / "figures.npz", packed.getvalue())
    write_whole(folder / "figures.json", record + "\n")
    for drawing in drawings:
        write_whole(folder / f"{drawing.name}.svg", drawing.svg)
    write_whole(folder / "index.md", index_page(data, drawings))
    return drawings


def read(folder: Path) -> dict[str, Any]:
    """Read the numbers of existing figures.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a file is damaged, or holds something else.
    """
    path = folder / "figures.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, so there is nothing to redraw; remove figures.redraw")
    data: dict[str, Any] = read_json(path)
    try:
        run_title(data)
        if missing := PARTS - data.keys():
            raise KeyError(", ".join(sorted(missing)))
        # Files of earlier versions do not have these two.
        data.setdefault("mean_gradient", str(data["calibrated"]).startswith("mean gradient"))
        norms = next(iter(data["runs"].values()))["norms"]
        data.setdefault("block_numbers", {group: list(range(len(values))) for group, values in norms.items()})
        if any(isinstance(layer["images"], list) for layer in data["gradient"].values()):
            return _from_json_arrays(data)
        with (folder / "figures.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            data = _put_arrays(data, arrays)
    except (OSError, zipfile.BadZipFile, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected the numbers of figures, with figures.npz beside it ({error}); run sparsegrad figures "
            "with another output folder"
        ) from error
    return data


def _take_arrays(value: Any, path: str, arrays: dict[str, np.ndarray[Any, Any]]) -> Any:
    """Return a copy with references in place of arrays, and put the arrays into `arrays` by their path."""
    if isinstance(value, np.ndarray):
        arrays[path] = value
        return {"array": path}
    if isinstance(value, dict):
        return {key: _take_arrays(item, f"{path}/{key}".strip("/"), arrays) for key, item in value.items()}
    if isinstance(value, list):
        return [_take_arrays(item, f"{path}/{number}", arrays) for number, item in enumerate(value)]
    return value


def _put_arrays(value: Any, arrays: Any) -> Any:
    """Undo `_take_arrays`."""
    if isinstance(value, dict):
        if value.keys() == {"array"}:
            return arrays[value["array"]]
        return {key: _put_arrays(item, arrays) for key, item in value.items()}
    return [_put_arrays(item, arrays) for item in value] if isinstance(value, list) else value


def _from_json_arrays(data: dict[str, Any]) -> dict[str, Any]:
    """Convert the first format, which had no figures.npz: 8-bit images in base64, and tokens as strings of digits."""

    def image(packed: dict[str, Any]) -> np.ndarray[Any, Any]:
        levels = np.frombuffer(base64.b64decode(packed["data"]), dtype=np.uint8).reshape(packed["shape"])
        values = packed["low"] + (levels.astype(float) - 1) / 254 * (packed["high"] - packed["low"])
        return np.where(levels == 0, np.nan, values).astype(np.float16)

    for layer in data["gradient"].values():
        layer["images"] = np.stack([image(packed) for packed in layer["images"]])
    images, tokens = data["touched"]["images"], data["rows"]["tokens"]
    images.update({role: image(packed) for role, packed in images.items()})
    tokens.update({key: np.array([list(row) for row in rows]).astype(np.uint8) for key, rows in tokens.items()})
    return data


def index_page(data: dict[str, Any], drawings: list[Drawing]) -> str:
    """Return the page that shows all figures, as Markdown."""
    environment = data["environment"]
    commit = f", commit {environment['commit'][:10]}" if environment.get("commit") else ""
    command = f": `{data['command']}`" if data.get("command") else ""
    sections = [f"## {each.title}\n\n![{each.alt}]({each.name}.svg)\n\n{each.caption}" for each in drawings]
    source = (
        f"One run, seed {environment['seed']}{commit}{command}. `figures.json` and `figures.npz` hold the numbers; "
        "`--figures.redraw true` draws the figures again."
    )
    return "\n\n".join([f"# Figures: {run_title(data)}", *sections, source]) + "\n"
