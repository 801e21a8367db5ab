"""`sparsegrad chat`."""

from __future__ import annotations

import io
import sys

from rich.console import Console

from ..run.parsing import make_parser

EXAMPLE = (
    "sparsegrad chat runs/oasst1/sparsegrad; reads messages and prints the answers as they grow. /compare shows the "
    "answers with and without the adapter side by side. sparsegrad chat smollm2 talks to a model without an adapter."
)


def main(argv: list[str]) -> None:
    """Read messages from standard input, and print answers, until /quit or the end of the input."""
    parser = make_parser("chat", "Talk to a language model in the terminal. /help lists the commands.", EXAMPLE)
    parser.add_argument("model", type=str, help="folder of a finished run or of an adapter, or a pretrained model "
                        "(hub name, folder, GGUF file, smollm2)")  # fmt: skip
    parser.add_argument("--system", type=str | None, default=None, help="system message")
    parser.add_argument("--temperature", type=float, default=0.0, help="randomness of the answers; 0: greedy")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="maximum length of an answer")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args(argv)
    check_sampling(options)
    from ..chat.model import open_model
    from ..chat.session import Session

    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    session = Session(
        open_model(options.model), console, options.max_new_tokens, options.temperature, options.seed, options.system
    )
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # lines can be edited, and earlier ones come back

        console.print(f"{options.model}: type a message, or /help", style="dim")
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            break
        if not session.take(line):
            break


def check_sampling(options: object) -> None:
    """Raise ValueError for options that no answer can be generated with."""
    values = vars(options)
    if values["max_new_tokens"] < 1:
        raise ValueError(f"max_new_tokens must be at least 1, found {values['max_new_tokens']}")
    if values["temperature"] is not None and not 0 <= values["temperature"] < float("inf"):
        raise ValueError(f"temperature must be 0 or above, found {values['temperature']}")
    if not 0 <= values["seed"] < 2**32:
        raise ValueError(f"seed must be from 0 to {2**32 - 1:,}, found {values['seed']}")
