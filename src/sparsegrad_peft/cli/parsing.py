"""A parser in the manner of all verbs."""

from __future__ import annotations

from jsonargparse import ArgumentParser, set_parsing_settings

# The docstring under a field of a dataclass is its help: there is no second place that describes it.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


def make_parser(verb: str, description: str, example: str) -> ArgumentParser:
    """For `sparsegrad VERB`; the help ends with an example and what it prints."""
    parser = ArgumentParser(prog=f"sparsegrad {verb}", description=description, allow_abbrev=False)
    parser.epilog = f"example: {example}"
    return parser
