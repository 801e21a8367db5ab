"""A parser in the manner of all verbs."""

from __future__ import annotations

import json
import re
import sys
from difflib import get_close_matches
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

# The docstring under a field of a dataclass is its help: there is no second place that describes it.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


_PLAIN = re.compile(r"(?!all-linear$)[\w.]+(,[\w.]+)*$")
"Names of layers, none of them a regular expression that means anything else."


class VerbParser(ArgumentParser):
    """Says which option an unknown one may have been meant for: `--learning_rate` is `--training.learning_rate`."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Words -> settings; a list may stand as `a,b` in place of `[a,b]`, which shells take for names of files."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(self._with_lists(words), *more, **options)

    def _with_lists(self, words: list[str]) -> list[str]:
        types = {
            option: str(getattr(action, "_typehint", ""))
            for action in self._actions
            for option in action.option_strings
            if not option.endswith("+")  # adds one item
        }
        found = list(words)
        for place, word in enumerate(words):
            option, equals, value = word.partition("=")
            if "list[" not in types.get(option, "") or (not equals and place + 1 == len(words)):
                continue
            value = value if equals else words[place + 1]
            plain = "Union[str" not in types[option] or _PLAIN.match(value)
            if value[:1] in "[-" or value == "null" or not plain:  # as it is meant already
                continue
            items = value.split(",") if "list[int]" in types[option] else map(json.dumps, value.split(","))
            listed = f"[{', '.join(items)}]"
            found[place + (not equals)] = f"{option}={listed}" if equals else listed
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print it, and leave with status 2."""
        names = [action.dest for action in self._actions if action.option_strings]
        ends = {name.rpartition(".")[2]: name for name in names}
        found = []
        for word in re.findall(r"arguments: --([\w.]+)|[Oo]ption '([\w.]+)' is not|option '([\w.]+)'$", message):
            unknown = "".join(word)
            near = get_close_matches(unknown, names, n=1) or get_close_matches(unknown.rpartition(".")[2], ends, n=1)
            found += [f"--{ends.get(name, name)}" for name in near]
        super().error(f"{message}; did you mean {', '.join(found)}?" if found else message, ex)


def make_parser(verb: str, description: str, example: str) -> VerbParser:
    """For `sparsegrad VERB`; the help ends with an example and what it prints."""
    parser = VerbParser(prog=f"sparsegrad {verb}", description=description, allow_abbrev=False)
    parser.epilog = f"example: {example}"
    return parser
