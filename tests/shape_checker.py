"""Shape checks for the test run: beartype on array annotations alone.

The hook of jaxtyping would check every argument, and so hide the library's own messages about a `k` that is no integer.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from beartype import beartype

_ARRAY = re.compile(r"\b(Float|Int|Bool)\[")


def arrays_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """`beartype(function)`, looking only at annotations such as `Float[Tensor, "r c"]`."""
    function.__annotations__ = {
        name: hint
        for name, hint in function.__annotations__.items()
        if _ARRAY.search(hint if isinstance(hint, str) else repr(hint))
    }
    return beartype(function)
