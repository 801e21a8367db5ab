"""Read YAML and JSON that others wrote. A malformed or hostile file gives one error that names it.

Light: imports no torch and no data library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

_MAX_YAML_CHARACTERS = 1_000_000
_MAX_NODES = 100_000
_MAX_DEPTH = 100


def read_yaml(path: Path) -> Any:
    """Content of a YAML file; plain data, no Python objects.

    Raises:
        ValueError: the file is not YAML, or breaks a limit of `load_yaml`. The message names the file.
    """
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: expected YAML ({error})") from error


def read_json(path: Path) -> Any:
    """Content of a JSON file.

    Raises:
        ValueError: the file is not JSON, or nested too deeply. The message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON ({error})") from error


def load_yaml(text: str) -> Any:
    """Content of YAML; plain data, no Python objects.

    Raises:
        ValueError: it is too long, nested too deeply, too large once its aliases are expanded, or has a key twice.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > _MAX_YAML_CHARACTERS:
        raise ValueError(f"expected at most {_MAX_YAML_CHARACTERS:,} characters, found {len(text):,}")
    return yaml.load(text, Loader=_CheckedLoader)


class _CheckedLoader(yaml.SafeLoader):
    """Checks each value once its parts are read, and before Python objects are made of it.

    A few lines of aliases can stand for billions of values, which no program can process.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # number of values in it, for those that are complete

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise ValueError(f"expected at most {_MAX_DEPTH} levels of nesting, found more")
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None or node in self._sizes:
            return node
        if alias is not None:
            raise ValueError(f"found the alias *{alias.anchor} outside the value that it names")
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        parts = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        size = 1 + (0 if isinstance(node, yaml.ScalarNode) else sum(self._sizes[part] for part in parts))
        if size > _MAX_NODES:
            raise ValueError(f"expected at most {_MAX_NODES:,} values, found more; aliases (*name) count as copies")
        self._sizes[node] = size
        return node


def _check_keys(mapping: yaml.MappingNode) -> None:
    """Raise `ValueError` for a key that stands twice: YAML keeps the later one in silence."""
    keys: set[str] = set()
    for key, _ in mapping.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys:
                line = key.start_mark.line + 1
                raise ValueError(f"found the key {key.value!r} twice, again in line {line}; put both into one")
            keys.add(key.value)
