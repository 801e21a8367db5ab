"""Kinds of task, and all in which a run of one differs from a run of another: a file for each.

kind      what a kind has to say
text      sentences with a class or a number
language  texts to go on with
images    images with a class
"""

from __future__ import annotations

from ..task import IMAGES, LANGUAGE, TEXT
from .images import ImagesKind
from .kind import Kind
from .language import LanguageKind
from .text import TextKind

KINDS: dict[str, Kind] = {TEXT: TextKind(), LANGUAGE: LanguageKind(), IMAGES: ImagesKind()}
"""By the names in `tasks.task`."""
