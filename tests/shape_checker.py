"""The type checker of the test run: beartype, for array annotations only.

Checking every argument would hide the library's own errors, such as the one for a `k` that is not an integer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_ARRAY = re.compile(r"\b(Float|Int|Bool)\[")


def arrays_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate with beartype, after removing all annotations but those such as `Float[Tensor, "r c"]`."""
    function.__annotations__ = {
        name: hint
        for name, hint in function.__annotations__.items()
        if _ARRAY.search(hint if isinstance(hint, str) else repr(hint))
    }
    return beartype(function)
