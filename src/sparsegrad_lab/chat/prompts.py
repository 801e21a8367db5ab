"""What a judge is asked: this package's own wording, or a file of FastChat (`judge_prompts.jsonl`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..tasks.parse_files import read_yaml
from ..tasks.read import read_objects

_FIELD = re.compile(r"\{(\w+)\}")
_ANSWERS = {"single": ("answer",), "pair": ("answer_a", "answer_b")}
_NAMES = {"single": "single-v1", "pair": "pair-v2"}


def prompt_name(kind: str, turn: int, has_reference: bool) -> str:
    """FastChat's name of a prompt.

    Args:
        kind: "single" or "pair".
        turn: 1 or 2.
        has_reference: the judge sees a reference answer.
    """
    name = f"{kind}-math-v1" if has_reference else _NAMES[kind]
    return name if turn == 1 else f"{name}-multi-turn"


def fields_of(name: str) -> set[str]:
    """The fields that the template of a prompt may have."""
    answers = _ANSWERS[name.partition("-")[0]]
    turns = ("_1", "_2") if name.endswith("-multi-turn") else ("",)
    found = {f"{field}{turn}" for field in ("question", *answers) for turn in turns}
    return found | ({"ref_answer_1", "ref_answer_2"} if "-math-" in name else set())


@dataclass(frozen=True)
class Prompt:
    """One prompt: a system message, and a template with fields in braces."""

    name: str
    system: str
    template: str

    def messages(self, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The messages for the judge. Braces in the values are text."""
        text = _FIELD.sub(lambda match: values[match[1]], self.template)
        return [{"role": "system", "content": self.system}, {"role": "user", "content": text}]


def read_prompts(path: Path | None = None) -> dict[str, Prompt]:
    """Read prompts by their names; None: this package's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a prompt lacks a key, its template has an unknown field, or one of the eight prompts is missing.
    """
    where = path or Path(str(files(__package__))) / "prompts.yaml"
    if not where.is_file():
        raise FileNotFoundError(f"{where}: no such file; expected prompts of a judge")
    items = read_yaml(where) if where.suffix == ".yaml" else [item for _, item in read_objects(where)]
    if not isinstance(items, list):
        raise ValueError(f"{where}: expected a list of prompts, found {str(items)[:60]!r}")
    expected = {prompt_name(kind, turn, ref) for kind in _NAMES for turn in (1, 2) for ref in (False, True)}
    found = {}
    for item in items:
        prompt = _prompt(item, where)
        if prompt.name in expected:  # a file of FastChat may have others
            unknown = set(_FIELD.findall(prompt.template)) - fields_of(prompt.name)
            if unknown:
                raise ValueError(
                    f"{where}, {prompt.name}: unknown field {', '.join(sorted(unknown))}; expected some of "
                    f"{', '.join(sorted(fields_of(prompt.name)))}"
                )
            found[prompt.name] = prompt
    if missing := expected - found.keys():
        raise ValueError(f"{where}: expected prompts named {', '.join(sorted(missing))}, found none")
    return found


def _prompt(item: Any, where: Path) -> Prompt:
    keys = ("name", "system_prompt", "prompt_template")
    if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in keys):
        raise ValueError(f"{where}: expected prompts with {', '.join(keys)} as text, found {str(item)[:60]!r}")
    return Prompt(*(item[key] for key in keys))
