"""What a shell offers as values of an option."""

from __future__ import annotations

from argparse import ArgumentParser
from functools import partial
from typing import Any, Literal, get_args, get_origin

from ..methods.registry import METHODS
from ..tasks.registry import TASKS
from .presets import preset_names


def add_completers(parser: ArgumentParser) -> None:
    """Let argcomplete offer the names of tasks, methods and presets, the words that a type allows, and else files."""
    from argcomplete.completers import FilesCompleter

    names = {"task": list(TASKS), "method": list(METHODS), "preset": preset_names()}
    for action in parser._actions:
        if action.nargs == 0:
            continue
        words = names.get(action.dest) or _words(getattr(action, "_typehint", None))
        action.completer = partial(_offer, words) if words else FilesCompleter()  # type: ignore[attr-defined]


def _offer(words: list[str], **_: Any) -> list[str]:
    return words


def _words(hint: Any) -> list[str]:
    """The values of a type that has few: `bool`, `Literal`, and unions with them."""
    if hint is bool:
        return ["true", "false"]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [word for inner in get_args(hint) for word in _words(inner)] if get_origin(hint) is not list else []
