"""Complete the command line in a shell, with argcomplete: `eval "$(register-python-argcomplete sparsegrad)"`."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Callable, Iterable


def complete(verbs: Iterable[str], run: Callable[[str], None]) -> None:
    """Answer a shell that asks for completions, in the environment's `COMP_LINE`.

    Args:
        verbs: the names of the verbs.
        run: calls a verb without arguments; its parser completes the options, and ends the process.
    """
    import argcomplete

    line = os.environ["COMP_LINE"][: int(os.environ["COMP_POINT"])]
    words = line.split()[1:]
    if words and words[0] in verbs and (len(words) > 1 or line.endswith(" ")):
        os.environ["_ARGCOMPLETE"] = "2"  # the number of words before the options
        run(words[0])
    parser = ArgumentParser(prog="sparsegrad")
    parser.add_argument("verb", choices=list(verbs))
    argcomplete.autocomplete(parser)
