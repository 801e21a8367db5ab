"""`sparsegrad COMMAND ...`: run a subcommand, and print errors without a traceback."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module

from rich.console import Console
from rich.table import Table

from ..run.exit_codes import ExitCode, exit_code_of
from ..run.processes import is_rank0, only_rank0_speaks, process_count, rank, reports
from .completion import complete

VERBS = {
    "demo": "compare SparseGrad and LoRA on a small model, in minutes and without a download",
    "train": "fine-tune a model on a task",
    "search": "find the best learning rate and batch size",
    "evaluate": "print the scores of a finished run",
    "predict": "predict with a finished run",
    "chat": "talk to a language model",
    "generate": "let a language model answer questions",
    "judge": "let a strong model grade answers",
    "merge": "merge the adapter of a finished run into its model",
    "export": "convert an adapter to a LoRA adapter",
    "inspect": "show parameters, adapted layers and memory of a model",
    "reproduce": "run the experiments of the paper, and others",
    "figures": "draw gradients, bases and updates of a model on a task",
    "report": "compare finished runs on a page and in tables",
    "bench": "measure time and memory of a training step",
    "presets": "list the settings that come with the package",
}
"""Subcommand -> what it does. Each has a file of the same name in this folder."""

RESUMABLE = ("train", "search", "reproduce", "demo", "generate", "judge")
"""Subcommands that resume interrupted work when they are run again."""

DISTRIBUTED = ("train", "search", "reproduce")
"""Subcommands that `torchrun` and `accelerate launch` may start in several processes."""

_NEEDS_ARGUMENTS = ("train", "search", "figures", "bench")
"""Subcommands that print their help without arguments: their defaults would start a long run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return an `ExitCode`."""
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_ARGCOMPLETE" in os.environ:
        complete(VERBS, lambda verb: import_module(f".{verb}", __package__).main([]))
    traceback = "--traceback" in words
    if traceback:
        words.remove("--traceback")
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        return ExitCode.FINISHED
    if words[0] in ("-V", "--version"):
        from sparsegrad_peft import __version__

        print(__version__)
        return ExitCode.FINISHED
    verb = words[0]
    rest = words[1:] or (["--help"] if verb in _NEEDS_ARGUMENTS else [])
    if verb not in VERBS:
        near = get_close_matches(verb, VERBS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(VERBS)}"
        print(f"sparsegrad: no subcommand {verb!r}; {advice}", file=sys.stderr)
        return ExitCode.REFUSED
    if process_count() > 1 and verb not in DISTRIBUTED:
        if is_rank0():
            print(
                f"sparsegrad {verb}: runs in one process, found {process_count()}; start it without torchrun or "
                "accelerate launch",
                file=sys.stderr,
            )
        return ExitCode.REFUSED
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; its warnings do not concern us
    try:
        with _sigterm_as_ctrl_c(), only_rank0_speaks():
            import_module(f".{verb}", __package__).main(rest)
            sys.stdout.flush()
    except ModuleNotFoundError as error:
        if traceback or (error.name or "").startswith(("sparsegrad_peft", "sparsegrad_lab")):
            raise
        advice = "" if "pip install" in str(error) else "; in a checkout, install it with: pip install '.[lab]'"
        print(f"sparsegrad {verb}: {error}{advice}", file=sys.stderr)
        return ExitCode.FAILED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            return ExitCode.FAILED
        if traceback:
            raise
        if reports(error):
            from ..run.aliases import with_options

            where = f" (rank {rank()})" if process_count() > 1 else ""
            print(f"sparsegrad {verb}{where}: {with_options(_message(error), rest)}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt as interrupt:
        where = "" if verb in ("generate", "judge") else ", from the last checkpoint if there is one"
        advice = f"; run the same command to go on{where}" if verb in RESUMABLE else ""
        if reports(interrupt):
            print(f"sparsegrad {verb}: interrupted{advice}", file=sys.stderr)
        return ExitCode.INTERRUPTED
    return ExitCode.FINISHED


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Treat SIGTERM, which batch systems send, as Ctrl-C: child processes end too, and files stay complete."""
    if threading.current_thread() is not threading.main_thread():  # Python sets signal handlers there only
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def _reader_has_left() -> bool:
    """True if nobody reads the standard output any more, as after `| head -1`. The rest of it then goes nowhere."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{error.filename}: no space left ({error.strerror}). Earlier files are complete; free some space, then "
            "run the same command to continue"
        )
    if isinstance(error, (ValueError, OSError)) or type(error).__name__ == "TrainingDivergedError":
        return str(error)
    return f"{type(error).__name__}: {error} (--traceback shows where)"


def _print_help() -> None:
    table = Table.grid(padding=(0, 2))
    for verb, description in VERBS.items():
        table.add_row(f"  {verb}", description)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(
        "usage: sparsegrad COMMAND [options]\n\nFine-tune the MLP layers of transformers with sparse gradients.\n"
    )
    console.print(table)
    console.print("\n  sparsegrad COMMAND --help       options and an example")
    console.print("  sparsegrad COMMAND --traceback  show the traceback of an error")
    console.print("  sparsegrad --version            print the version")
    console.print('\nCompletion in bash and zsh: eval "$(register-python-argcomplete sparsegrad)"\n')
    codes = ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode)
    console.print(f"Exit codes: {codes}\n")
    console.print("Start here (minutes, no download):\n  sparsegrad demo")


if __name__ == "__main__":
    sys.exit(main())
