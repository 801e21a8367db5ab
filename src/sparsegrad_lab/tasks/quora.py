"""Tasks `quora` and `paraphrases`: pairs of questions from Quora (Wang et al., 2017), not GLUE's QQP rows.

`quora` says whether both questions ask the same. `paraphrases` has only the pairs that do: a language model reads
the first question and writes the second.
"""

from __future__ import annotations

import os
from pathlib import Path

from .glue import DATA_VARIABLE
from .hold_out import split_apart
from .labels import labelled_dataset
from .read import read_rows
from .task import LANGUAGE, LOSSES, Task

_HEADER = ("label", "question1", "question2", "id")
_TEXT, _LABELS = ("question1", "question2"), ("0", "1")


def load_paraphrases(folder: str | Path | None = None, val_size: float | None = None) -> Task:
    """Load the pairs that ask the same, as prompts with answers. Arguments and errors: see `load_quora`."""
    pairs = load_quora(folder, val_size)
    duplicate = _LABELS.index("1")
    splits = {
        split: rows.select([row for row, label in enumerate(rows["label"]) if label == duplicate]).select_columns(_TEXT)
        for split, rows in pairs.splits.items()
    }
    return Task("paraphrases", _TEXT, None, LOSSES, splits, pairs.source, LANGUAGE, pairs.apart)


def load_quora(folder: str | Path | None = None, val_size: float | None = None) -> Task:
    """Load the pairs.

    Args:
        folder: see `find_folder`.
        val_size: train on dev.tsv, without this share of it, which is evaluated; train.tsv is not read. Pairs that
            share a question stay together.

    Raises:
        ValueError: see `read_rows` and `split_apart`.
        FileNotFoundError: there are no such files.
    """
    found = find_folder(folder)
    splits = {}
    for split, name in (("train", "train"), ("validation", "dev")):
        path = found / f"{name}.tsv"
        if path.is_file() and not (val_size is not None and split == "train"):
            rows = read_rows(path, header=_HEADER, quoting="none", replace_broken=True)
            splits[split] = labelled_dataset(rows, _TEXT, "label", _LABELS, str(path))
    if val_size is not None:
        train, held = split_apart(splits["validation"], val_size, _TEXT, f"data.val_size, {found}")
        splits = {"train": train, "validation": held}
    return Task("quora", _TEXT, _LABELS, ("accuracy", "f1"), splits, str(found), apart=val_size is not None)


def find_folder(data: str | Path | None) -> Path:
    """Return the folder with the files. Reads no file.

    Args:
        data: a folder that holds `qqp/dev.tsv` (and `qqp/train.tsv`), or the files themselves; None: the folder in the
            environment variable SPARSEGRAD_DATA.

    Raises:
        FileNotFoundError: there is no dev.tsv, or no folder was given.
    """
    data = data or os.environ.get(DATA_VARIABLE)
    if not data:
        raise FileNotFoundError(f"quora: expected a folder with qqp/dev.tsv, in data.folder or in ${DATA_VARIABLE}")
    candidates = [Path(data) / "qqp", Path(data)]
    for folder in candidates:
        if (folder / "dev.tsv").is_file():
            return folder
    raise FileNotFoundError(f"{data}: expected dev.tsv of the Quora pairs, in {', '.join(map(str, candidates))}")
