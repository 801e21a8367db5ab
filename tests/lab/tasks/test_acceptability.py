"""Task `acceptability`: the sentences that come with the package."""

from __future__ import annotations

import hashlib
import json

from sparsegrad_lab.tasks.acceptability import load_acceptability


def test_the_sentences_to_the_byte() -> None:
    """Scores are comparable between versions only while the rows stay the same."""
    task = load_acceptability()
    rows = {split: data.to_list() for split, data in task.splits.items()}
    assert {split: len(found) for split, found in rows.items()} == {"train": 4000, "validation": 800}
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    assert digest == "f5f04e609782f22e8dfd8bfb79b9fc28ef171203c237c5b029db2bab275e1b72"
    assert task.labels == ("unacceptable", "acceptable")
