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
        ValueError: the file is not YAML, or breaks a limit of `check_yaml`. The message names the file.
    """
    try:
        text = path.read_text(encoding="utf-8")
        check_yaml(text)
        return yaml.safe_load(text)
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


def check_yaml(text: str) -> None:
    """Raise if YAML is too long, nested too deeply, too large once its aliases are expanded, or has a key twice.

    A few lines of aliases can stand for billions of values, which no program can process.

    Raises:
        ValueError: it breaks a limit.
        yaml.YAMLError: it is not YAML.
    """
    if len(text) > _MAX_YAML_CHARACTERS:
        raise ValueError(f"expected at most {_MAX_YAML_CHARACTERS:,} characters, found {len(text):,}")
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]  # anchor, number of nodes so far; outermost first
    sizes: dict[str, int] = {}

    def close(anchor: str | None, size: int) -> None:
        if anchor is not None:
            sizes[anchor] = size
        parent, total = open_nodes.pop()
        open_nodes.append((parent, total + size))
        if total + size > _MAX_NODES:
            raise ValueError(f"expected at most {_MAX_NODES:,} values, found more; aliases (*name) count as copies")

    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > _MAX_DEPTH:
                raise ValueError(f"expected at most {_MAX_DEPTH} levels of nesting, found more")
        elif isinstance(event, yaml.CollectionEndEvent):
            close(*open_nodes.pop())
        elif isinstance(event, yaml.ScalarEvent):
            close(event.anchor, 1)
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise ValueError(f"found the alias *{event.anchor} outside the value that it names")
            close(None, sizes[event.anchor])
    _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))


def _check_keys(root: yaml.Node | None) -> None:
    """Raise `ValueError` for a key that stands twice in a mapping: YAML keeps the later one in silence."""
    nodes, known = [root], set()
    while nodes:
        node = nodes.pop()
        if node is None or id(node) in known:
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        elif isinstance(node, yaml.MappingNode):
            nodes += [value for _, value in node.value]
            keys: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    line = key.start_mark.line + 1
                    raise ValueError(f"found the key {key.value!r} twice, again in line {line}; put both into one")
                keys |= {key.value} if isinstance(key, yaml.ScalarNode) else set()
