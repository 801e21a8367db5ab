"""How the `sparsegrad` command ends, as an exit code that other programs can read. Light: imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit code of the `sparsegrad` command."""

    FINISHED = 0
    FAILED = 1
    "an error that has no code of its own"
    REFUSED = 2
    "the command line or the settings are not valid, or do not fit the rows or the model; nothing was started"
    DIVERGED = 3
    "the training loss is not finite"
    OUT_OF_MEMORY = 4
    INTERRUPTED = 130
    "by Ctrl-C or SIGTERM; the same command resumes the run"

    @property
    def status(self) -> str:
        """The word for this ending in result files: "finished", "failed", "diverged", "out of memory" or "killed"."""
        words = {ExitCode.REFUSED: "failed", ExitCode.INTERRUPTED: "killed"}
        return words.get(self, self.name.lower().replace("_", " "))


class RefusedError(ValueError):
    """The settings are not valid. The message lists every problem."""


@contextmanager
def refusing() -> Iterator[None]:
    """Let a ValueError end the command with `ExitCode.REFUSED`: settings that do not fit the rows or the model.

    Unlike a RefusedError, it may concern this process only, and each process reports its own.
    """
    try:
        yield
    except ValueError as error:
        vars(error)["refused"] = True
        raise


def exit_code_of(error: BaseException) -> ExitCode:
    """Exit code of the command that an exception ends."""
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED
    if isinstance(error, RefusedError) or getattr(error, "refused", False):
        return ExitCode.REFUSED
    # By name, since importing these classes would load torch.
    names = {base.__name__ for base in type(error).__mro__}
    if "TrainingDivergedError" in names:
        return ExitCode.DIVERGED
    # PyTorch raises a plain RuntimeError when the CPU's allocator fails.
    if names & {"OutOfMemoryError", "MemoryError"} or "DefaultCPUAllocator: can't allocate memory" in str(error):
        return ExitCode.OUT_OF_MEMORY
    return ExitCode.FAILED


def status_of(returncode: int) -> str:
    """The word for the end of a `sparsegrad` process, from `subprocess`'s return code.

    A process that a signal ends (return code below 0) is "killed". Linux does that to a process when memory runs out.
    """
    if returncode < 0:
        return ExitCode.INTERRUPTED.status
    try:
        return ExitCode(returncode).status
    except ValueError:  # not a code of this command
        return ExitCode.FAILED.status
