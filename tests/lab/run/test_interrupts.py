"""Ctrl-C stops a run, also where a library swallows the exception."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from datasets import Dataset

from sparsegrad_lab.run.interrupts import interrupts_kept


class InterruptedWhenHashed:
    """`datasets` pickles the function that it maps, to hash it; here, Ctrl-C arrives meanwhile."""

    def __reduce__(self) -> Any:
        signal.raise_signal(signal.SIGINT)
        return (InterruptedWhenHashed, ())

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


def test_ctrl_c_while_datasets_hashes_a_function() -> None:
    rows = Dataset.from_dict({"text": ["a", "b"]})
    # `datasets` goes on as if nothing had happened; if this fails, it no longer does, and interrupts.py can go.
    assert len(rows.map(InterruptedWhenHashed(), load_from_cache_file=False)) == 2
    with pytest.raises(KeyboardInterrupt), interrupts_kept():
        rows.map(InterruptedWhenHashed(), load_from_cache_file=False)


def test_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    with interrupts_kept():
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before
