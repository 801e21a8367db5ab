"""A parser in the manner of all verbs."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

# The docstring under a field of a dataclass is its help: there is no second place that describes it.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class VerbParser(ArgumentParser):
    """Says which option an unknown one may have been meant for: `--learning_rate` is `--training.learning_rate`."""

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
