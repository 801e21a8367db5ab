"""Each message that the page on troubleshooting explains is one that the code can print."""

from __future__ import annotations

import ast
import re

from blocks import ROOT

FOREIGN = {"KeyError: 'SPARSEGRAD'"}
"Messages of PEFT."


def messages() -> str:
    """All texts in the sources, with a gap where a value is filled in."""
    found: list[str] = []
    for path in (ROOT / "src").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return "\n".join(found)


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^#### `(.+)`$", page, re.MULTILINE)
    assert len(explained) >= 25
    printed = messages()
    assert [message for message in explained if message not in printed and message not in FOREIGN] == []
