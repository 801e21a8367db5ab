"""Kinds of task: text, language, images.

A kind knows how its models are loaded, how rows become features and batches, and how outputs are scored and predicted.

    kind                     the interface
    text, language, images   the kinds
    writer                   conversations -> tokens, and which of them are learnt
    packing                  several conversations in one row
"""

from __future__ import annotations

from ..task import IMAGES, LANGUAGE, TEXT
from .images import ImagesKind
from .kind import Kind
from .language import LanguageKind
from .text import TextKind

KINDS: dict[str, Kind] = {TEXT: TextKind(), LANGUAGE: LanguageKind(), IMAGES: ImagesKind()}
"""Name of the kind (see `tasks.task`) -> kind."""
