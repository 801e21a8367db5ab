"""Read settings from the command line and from YAML files. The only file that uses jsonargparse."""

from __future__ import annotations

import json
import re
import sys
from argparse import ArgumentError
from argparse import ArgumentParser as PlainParser
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader, set_parsing_settings

from ..methods.registry import METHODS
from ..tasks.parse_files import check_yaml, read_yaml
from .presets import preset
from .settings import RunArguments, flat

# The docstring under a field of a dataclass is its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

_load_yaml = get_loader("yaml")


def _load_checked_yaml(text: str) -> Any:
    check_yaml(text)
    return _load_yaml(text)


set_loader("yaml", _load_checked_yaml, exceptions=(yaml.YAMLError, ValueError))

_PLAIN = re.compile(r"(?!all-linear$)[\w.]+(,[\w.]+)*$")
"Names of layers; not a regular expression with another meaning."


class VerbParser(ArgumentParser):
    """Suggests the option that an unknown one may stand for: `--training.learning_rate` for `--learning_rate`."""

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse the command line. A list may be written `a,b`; shells read `[a,b]` as a file pattern."""
        words = list(sys.argv[1:] if args is None else args)
        return super().parse_args(self._with_lists(words), *more, **options)

    def instantiate(self, namespace: Any, *args: Any, **options: Any) -> Any:
        """Create the settings. `training: null` in a file would be a TypeError."""
        for name in sorted({action.dest.partition(".")[0] for action in self._actions if "." in action.dest}):
            if namespace.get(name) is None:
                self.error(f"{name}: expected settings, found null")
        return super().instantiate(namespace, *args, **options)

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
            if value[:1] in "[-" or value == "null" or not plain:  # a list already, or one value
                continue
            items = value.split(",") if "list[int]" in types[option] else map(json.dumps, value.split(","))
            listed = f"[{', '.join(items)}]"
            found[place + (not equals)] = f"{option}={listed}" if equals else listed
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and a suggestion, and exit with code 2."""
        names = [action.dest for action in self._actions if action.option_strings]
        ends = {name.rpartition(".")[2]: name for name in names}
        found = []
        for word in re.findall(r"arguments: --([\w.]+)|[Oo]ption '([\w.]+)' is not|option '([\w.]+)'$", message):
            unknown = "".join(word)
            near = get_close_matches(unknown, names, n=1) or get_close_matches(unknown.rpartition(".")[2], ends, n=1)
            found += [f"--{ends.get(name, name)}" for name in near]
        if found:
            message = f"{message}; did you mean {', '.join(found)}?"
        if re.search(r"<class 'str'>. Got value: (True|False|-?\d)", message):
            message += "\nYAML reads no, yes and 0 as other types than text; put text in quotes, as in ['no', 'yes']"
        super().error(message, ex)


def make_parser(verb: str, description: str, example: str) -> VerbParser:
    """A parser for `sparsegrad VERB`. Its help ends with an example and what the example prints."""
    parser = VerbParser(prog=f"sparsegrad {verb}", description=description, allow_abbrev=False)
    parser.epilog = f"example: {example}"
    return parser


def run_parser(verb: str, description: str, example: str, argv: list[str]) -> VerbParser:
    """A parser for all settings of a run. Its defaults are those of the preset that `argv` names."""
    parser = make_parser(verb, description, example)
    parser.usage = "%(prog)s [--OPTION VALUE ...]"  # the list of all options would hide an error's one line
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--preset", type=str, default=None, help="settings to start from; list: sparsegrad presets")
    parser.add_class_arguments(RunArguments)
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    rates = ", ".join(f"{method.learning_rate:g} ({method.name})" for method in METHODS.values())
    for action in parser._actions:
        if action.dest == "method":
            action.help = f"{action.help}. {methods}"
        if action.dest == "training.learning_rate":
            action.help = f"{action.help}: {rates}"
    name = _preset_name(argv)
    if name is not None:
        parser.set_defaults(flat(preset(name)))
    return parser


def run_arguments(parsed: dict[str, Any]) -> RunArguments:
    """The run's settings from what a `run_parser` has parsed."""
    return RunArguments(**{name: value for name, value in parsed.items() if name not in ("config", "preset")})


def arguments_from(settings: dict[str, Any]) -> RunArguments:
    """The run's settings from nested settings, as in a file for `--config`.

    Raises:
        ValueError: there is no such setting, or it has another type.
    """
    parser = _settings_parser()
    try:
        return run_arguments(vars(parser.instantiate(parser.parse_object(settings))))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


@cache  # a study reads hundreds of settings; creating a parser takes longer than using it
def _settings_parser() -> VerbParser:
    parser = run_parser("train", "", "", [])
    parser.exit_on_error = False
    return parser


def _preset_name(argv: list[str]) -> str | None:
    """The preset that the command line names, or the config file that it names."""
    plain = PlainParser(add_help=False, allow_abbrev=False)
    plain.add_argument("--preset")
    plain.add_argument("--config")
    known, _ = plain.parse_known_args(argv)
    name = known.preset
    if name is None and known.config is not None and Path(known.config).is_file():
        settings = read_yaml(Path(known.config))
        name = settings.get("preset") if isinstance(settings, dict) else None
    return name if isinstance(name, str) else None  # the parser refuses other types
