"""Kinds of task, and all in which a run of one differs from a run of another: a file for each.

kind      what a kind has to say
text      sentences with a class or a number
language  texts to go on with
"""

from __future__ import annotations

from ...tasks.task import LANGUAGE, TEXT
from .kind import Kind
from .language import LanguageKind
from .text import TextKind

KINDS: dict[str, Kind] = {TEXT: TextKind(), LANGUAGE: LanguageKind()}
"""By the names in `tasks.task`."""
