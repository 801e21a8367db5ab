"""Start `sparsegrad` in a real process that is forked from one with the libraries loaded: importing takes seconds."""

from __future__ import annotations

import os
import runpy
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch.multiprocessing import get_context

from groups_of_processes import preload


class Command:
    """A command that runs. Its output goes to files in `folder`.

    Args:
        words: verb and options of `sparsegrad`, or a Python script (a name that ends with .py) and its options.
        folder: for the output; it is made if there is none.
        environment: variables besides those of this process, such as a rank.
        niceness: of the process.
    """

    def __init__(
        self, words: list[str], folder: Path, environment: Mapping[str, str] | None = None, niceness: int = 0
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._out, self._err = folder / "out.txt", folder / "err.txt"
        preload()
        variables = {**os.environ, **(environment or {})}
        self.process = get_context("forkserver").Process(
            target=_run, args=(words, variables, self._out, self._err, niceness)
        )
        self.process.start()

    @property
    def running(self) -> bool:
        """True until the process has ended."""
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 280) -> tuple[int, str, str]:
        """Wait for the end. Returns the exit code, which is negative after a signal, and what was printed."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, self._err.read_text(encoding="utf-8")
        return self.process.exitcode, self._out.read_text(encoding="utf-8"), self._err.read_text(encoding="utf-8")


def _run(words: list[str], variables: dict[str, str], out: Path, err: Path, niceness: int) -> None:
    from sparsegrad_lab.cli.main import main

    torch.set_num_threads(1)
    os.environ.clear()
    os.environ.update(variables)
    for number, file in ((1, out), (2, err)):
        with file.open("w", encoding="utf-8") as opened:
            os.dup2(opened.fileno(), number)
    os.nice(niceness)
    # As in a terminal, even if the tests were started in the background, where Ctrl-C is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        sys.exit(0)
    sys.exit(main(words))
