"""`sparsegrad VERB ...`: finds the verb's file, and turns errors into words."""

from __future__ import annotations

import errno
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from rich.console import Console
from rich.table import Table

from ..run.exit_codes import ExitCode, exit_code_of

VERBS = {
    "demo": "SparseGrad next to LoRA with a real model, in minutes and without a download",
    "train": "fine-tune a model on a task; the adapter, the scores and a picture go into a folder",
    "search": "try learning rates and batch sizes; the best are a file that train takes",
    "evaluate": "scores of a finished run, or of one of its splits",
    "predict": "what a finished run says of new rows",
    "merge": "write a finished run's model with the adapter merged into its weights",
    "export": "write an adapter as a LoRA adapter, for servers that know only LoRA",
    "inspect": "parameters, layers and memory of any model, from its config alone",
    "reproduce": "the paper's comparison and what goes beyond it, as a grid of runs",
    "figures": "pictures of what the method sees in a model and a task: gradients, bases, what is touched",
    "report": "compare finished runs: one page, and tables",
    "bench": "time and memory of a training step, beside LoRA's and full fine-tuning's",
    "presets": "settings that come with the package",
}
"""Verb -> what it does; its file has the same name."""

RESUMED = ("train", "search", "reproduce", "demo")
"Those that go on where they were interrupted."


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb. Returns an `ExitCode`, which says how it ended."""
    words = list(sys.argv[1:] if argv is None else argv)
    traceback = "--traceback" in words
    if traceback:
        words.remove("--traceback")
    if not words or words[0] in ("-h", "--help"):
        _help()
        return 0
    if words[0] == "--version":
        from sparsegrad_peft import __version__

        print(__version__)
        return 0
    verb, rest = words[0], words[1:]
    if verb not in VERBS:
        print(f"sparsegrad: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return ExitCode.REFUSED
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; its kernels are of no use here
    try:
        with _ended_as_by_ctrl_c():
            import_module(f".{verb}", __package__).main(rest)
    except ModuleNotFoundError as error:
        if traceback or (error.name or "").startswith("sparsegrad_peft"):
            raise
        advice = "" if "pip install" in str(error) else "; the command needs: pip install 'sparsegrad-peft[lab]'"
        print(f"sparsegrad {verb}: {error}{advice}", file=sys.stderr)
        return ExitCode.FAILED
    except Exception as error:  # a traceback helps nobody who typed a wrong word
        if traceback:
            raise
        print(f"sparsegrad {verb}: {_words(error)}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        goes_on = "; the same command goes on from the last checkpoint" if verb in RESUMED else ""
        print(f"sparsegrad {verb}: interrupted{goes_on}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FINISHED


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """SIGTERM, which batch systems send, does what Ctrl-C does: what was started ends too, and files are whole."""
    if threading.current_thread() is not threading.main_thread():  # Python's rule: handlers are set there
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename}: no room on the disk ({error.strerror}); what was saved before is whole. Make room, "
            "then the same command goes on from there"
        )
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingDivergedError":
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _help() -> None:
    table = Table.grid(padding=(0, 2))
    for verb, words in VERBS.items():
        table.add_row(f"  {verb}", words)
    console = Console(highlight=False, markup=False)
    console.print(
        "usage: sparsegrad VERB [options]\n\nFine-tunes the MLP layers of transformers by sparse gradients.\n"
    )
    console.print(table)
    console.print("\n  sparsegrad VERB --help       what can be set, with an example")
    console.print("  sparsegrad VERB --traceback  show where an error came from\n")
    console.print("A first run, in a few minutes and without a download:\n  sparsegrad demo")


if __name__ == "__main__":
    sys.exit(main())
