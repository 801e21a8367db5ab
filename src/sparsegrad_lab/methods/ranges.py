"""Values that a setting may have."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """The numbers that a setting may have, and their description for error messages."""

    description: str
    contains: Callable[[float], bool]


COUNT = Range("at least 1", lambda value: value >= 1)
POSITIVE = Range("above 0 and finite", lambda value: 0 < value < math.inf)
NOT_NEGATIVE = Range("at least 0 and finite", lambda value: 0 <= value < math.inf)
SHARE = Range("from 0 to 1", lambda value: 0 <= value <= 1)
SELECTED_SHARE = Range("above 0 and at most 1", lambda value: 0 < value <= 1)


def range_problems(group: str, settings: Any, ranges: Mapping[str, Range]) -> list[str]:
    """Fields of a dataclass that are outside their range. None is valid if the field's type allows it.

    Args:
        group: name of the dataclass in `RunArguments`, for the messages.
        settings: an instance of the dataclass.
        ranges: field name -> valid numbers.
    """
    optional = {field.name for field in fields(settings) if "None" in str(field.type)}
    problems = []
    for name, expected in ranges.items():
        value = getattr(settings, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not expected.contains(value):
            problems.append(f"{group}.{name} must be {expected.description}, found {value}")
    return problems


def null_problems(settings: Any, prefix: str = "") -> list[str]:
    """Fields of a dataclass, and of those in it, that are None although their type does not allow it.

    The command's parser accepts `null` for any setting.
    """
    problems = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if is_dataclass(value):
            problems += null_problems(value, f"{prefix}{field.name}.")
        elif value is None and "None" not in str(field.type):
            problems.append(f"{prefix}{field.name}: expected a value, found null; leave it out for the default")
    return problems


def pattern_problems(name: str, pattern: Any) -> list[str]:
    """A text that is not a regular expression. Lists of names and None are valid.

    Args:
        name: of the setting, for the message.
        pattern: its value, as in PEFT's `target_modules`.
    """
    if not isinstance(pattern, str):
        return []
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name}: expected names of layers, or a regular expression of them, found {pattern!r} ({error})"]
    return []
