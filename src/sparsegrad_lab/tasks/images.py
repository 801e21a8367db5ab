"""Tasks `digits` and `images`: scikit-learn's handwritten digits, and image folders of your own."""

from __future__ import annotations

from pathlib import Path

from .task import IMAGES, Task

COLUMN = "image"
"""Column of the images: rows of grey values, 0 to 255, or the path of a file."""

_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
_N_DIGITS_VALIDATION = 500


def load_digits() -> Task:
    """Load 1,297 training and 500 validation digits of 8 by 8 pixels, stratified by class."""
    import numpy as np
    from datasets import Dataset
    from sklearn import datasets, model_selection

    found = datasets.load_digits()
    images = np.rint(found.images * (255 / 16)).astype(np.uint8)
    train, validation = model_selection.train_test_split(
        np.arange(len(images)), test_size=_N_DIGITS_VALIDATION, stratify=found.target, random_state=0
    )
    splits = {
        name: Dataset.from_dict({COLUMN: images[rows].tolist(), "label": found.target[rows].tolist()})
        for name, rows in (("train", train), ("validation", validation))
    }
    labels = tuple(str(digit) for digit in range(10))
    return Task("digits", (COLUMN,), labels, ("accuracy",), splits, "scikit-learn", IMAGES)


def load_images(folder: str | Path) -> Task:
    """Load the images `train/CLASS/*` and `validation/CLASS/*` of a folder, and other splits, such as test.

    Raises:
        FileNotFoundError: one of the two folders is missing or has no image.
        ValueError: there are fewer than two classes, or a split has a class that train does not have.
    """
    from datasets import Dataset

    root = Path(folder)
    found: dict[str, list[tuple[str, str]]] = {}
    for split in sorted(root.iterdir()) if root.is_dir() else ():
        files = (path for path in sorted(split.glob("*/*")) if path.suffix.lower() in _ENDINGS)
        found[split.name] = [(str(path), path.parent.name) for path in files]
    for split_name in ("train", "validation"):
        if not found.get(split_name):
            raise FileNotFoundError(
                f"{root}: expected images in {root}/{split_name}/CLASS/ ({', '.join(_ENDINGS)}), found none"
            )
    labels = sorted({label for _, label in found["train"]})
    if len(labels) < 2:
        raise ValueError(f"{root}/train: expected folders of at least two classes, found {', '.join(labels)}")
    number = {label: i for i, label in enumerate(labels)}
    splits = {}
    for name in ("train", "validation", *(name for name in found if name not in ("train", "validation"))):
        unknown = {label for _, label in found[name]} - number.keys()
        if unknown:
            raise ValueError(f"{root}/{name}: expected the classes of train, {', '.join(labels)}; found {min(unknown)}")
        if found[name]:
            paths, classes = zip(*found[name], strict=True)
            splits[name] = Dataset.from_dict({COLUMN: list(paths), "label": [number[label] for label in classes]})
    return Task(root.name, (COLUMN,), tuple(labels), ("accuracy",), splits, str(root), IMAGES)
