"""All methods by name."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from .method import Method
from .peft_file import PeftFile


def _load_methods() -> dict[str, Method]:
    """Import every file of this room, and collect the instances named `METHOD` in their order."""
    names = [module.name for module in iter_modules([str(Path(__file__).parent)]) if not module.ispkg]
    modules = [import_module(f".{name}", __package__) for name in names if name != Path(__file__).stem]
    methods: list[Method] = [module.METHOD for module in modules if hasattr(module, "METHOD")]
    return {method.name: method for method in sorted(methods, key=lambda method: (method.order, method.name))}


METHODS = _load_methods()
"""Name -> method."""


def find_method(name: str) -> Method:
    """The method with this name, or the PEFT method whose `adapter_config.json` has this path.

    Raises:
        ValueError: there is neither.
    """
    if name in METHODS:
        return METHODS[name]
    if Path(name).is_file():
        return PeftFile(name)
    raise ValueError(
        f"method: expected one of {', '.join(METHODS)}, or the path of an adapter_config.json; found {name!r}"
    )
