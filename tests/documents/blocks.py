"""The code blocks of README.md and docs/: what language they are in, and what the page says of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?"
    r"```(?P<language>\w*)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
RUN = {"python", "bash", "diff"}
"Languages of the blocks that the tests run."
FILES = {"csv", "json", "yaml"}
"Languages of the blocks that are files; those with a title are written to the reader's folder."
SHOWN = {"text", "bibtex"}
"Languages of the blocks that are only shown."


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    code: str
    title: str
    not_run: str
    "why the tests do not run it"

    @property
    def commands(self) -> list[str]:
        """The commands of a bash block, each on one line."""
        return self.code.replace("\\\n", " ").splitlines()

    def side(self, sign: str) -> str:
        """One side of a diff: the lines that both sides share, and those with the sign."""
        lines = self.code.splitlines()
        return "\n".join(line[1:] for line in lines if not line or line[0] in (" ", sign)) + "\n"


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(page, found["language"], found["code"], found["title"] or "", found["reason"] or "")
        for found in _BLOCK.finditer(text)
    ]


def fences_of(page: str) -> int:
    """Number of fences in a page, two for each block."""
    return len(re.findall(r"^\s*```", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE))


def titled_files() -> dict[str, str]:
    """Name -> content of the files that the pages show."""
    blocks = [block for page in PAGES for block in blocks_of(page) if block.language in FILES and block.title]
    return {block.title: block.code for block in blocks}
