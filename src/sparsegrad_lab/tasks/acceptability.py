"""Task `acceptability`: 4,800 English sentences, acceptable or not, that come with the package.

The corpus consists of minimal pairs in the manner of BLiMP (Warstadt et al., 2020). Both sentences of a pair have the
same words, so only sentence structure predicts the label. `benchmarks/acceptability_grammar.py` generates it.
"""

from __future__ import annotations

import gzip
import json
from importlib.resources import files

from datasets import Dataset

from .task import Task


def load_acceptability() -> Task:
    """Load the 4,000 training and 800 validation sentences."""
    corpus = json.loads(gzip.decompress(files(__package__).joinpath("acceptability.json.gz").read_bytes()))
    splits = {name: Dataset.from_list(rows) for name, rows in corpus.items()}
    labels = ("unacceptable", "acceptable")
    return Task("acceptability", ("sentence",), labels, ("matthews_correlation", "accuracy"), splits, "seed 0")
