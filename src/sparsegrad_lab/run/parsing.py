"""Read settings from the command line and from YAML files. The only file that uses jsonargparse."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Action, ArgumentError
from argparse import ArgumentParser as PlainParser
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader, set_parsing_settings

from ..methods.registry import METHODS
from ..methods.settings import updated
from ..tasks.parse_files import load_yaml, read_yaml
from .aliases import INSTEAD, aliases_of, check_given_once, given_names, with_options
from .completers import add_completers
from .folder import RunFolder
from .presets import preset
from .processes import is_rank0
from .settings import RunArguments, flat

# The docstring under a field of a dataclass is its help.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

_load_yaml = get_loader("yaml")


def _load_checked_yaml(text: str) -> Any:
    load_yaml(text)  # refuses what is too large, and keys that stand twice
    return _load_yaml(text)


set_loader("yaml", _load_checked_yaml, exceptions=(yaml.YAMLError, ValueError))

_PLAIN = re.compile(r"(?!all-linear$)[\w.]+(,[\w.]+)*$")
"Names of layers; not a regular expression with another meaning."


_FLAG_VALUES = ("true", "false", "null", "yes", "no", "on", "off")

_NO_SETTINGS = ("config", "preset", "quiet")
"Options of a run's command that are no settings of the run."


class _HelpFormatter(DefaultHelpFormatter):
    """Shows the placeholder of the value once: `--training.epochs, --epochs EPOCHS`."""

    def _format_action_invocation(self, action: Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if not name.endswith("+")]
        placeholder = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {placeholder}"


class VerbParser(ArgumentParser):
    """Accepts other names of settings, lists as `a,b`, and flags without a value; suggests the nearest option."""

    aliases: Mapping[str, str] = {}
    "Other name -> name of the setting."
    given: frozenset[str] = frozenset()
    "Settings that the command line names, by dotted name."
    words: Sequence[str] = ()
    "The command line."

    def add_aliases(self) -> None:
        """Accept other names of the options that were added so far, also in YAML files, and show them in the help."""
        actions = {action.dest: action for action in self._actions if action.option_strings}
        self.aliases = {
            alias: name
            for alias, name in aliases_of(actions).items()
            if f"--{alias}" not in self._option_string_actions
        }
        for alias, name in self.aliases.items():
            actions[name].option_strings = [*actions[name].option_strings, f"--{alias}"]
            self._option_string_actions[f"--{alias}"] = actions[name]

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """Parse the command line. A list may be written `a,b`; shells read `[a,b]` as a file pattern."""
        if "_ARGCOMPLETE" in os.environ:
            add_completers(self)
        words = _config_first(self._with_values(list(sys.argv[1:] if args is None else args)))
        self.check_given_once(word.partition("=")[0][2:] for word in words if word.startswith("--"))
        self.words = words
        names = {word.partition("=")[0] for word in words} & self._option_string_actions.keys()
        self.given = frozenset(self._option_string_actions[name].dest for name in names)
        return super().parse_args(self._with_lists(words), *more, **options)

    def check_given_once(self, names: Iterable[str]) -> None:
        """Exit with an error if two names of one setting are given."""
        try:
            check_given_once(names, self.aliases)
        except ValueError as error:
            self.error(str(error))

    def _with_values(self, words: list[str]) -> list[str]:
        """The words, with "true" after each flag that has no value: `--json MODEL` is `--json true MODEL`."""
        flags = {
            option
            for action in self._actions
            for option in action.option_strings
            if getattr(action, "_typehint", None) in (bool, bool | None)
        }
        found = []
        for word, following in zip(words, [*words, "--"][1:], strict=True):
            found += [word, "true"] if word in flags and following.lower() not in _FLAG_VALUES else [word]
        return found

    def instantiate(self, namespace: Any, *args: Any, **options: Any) -> Any:
        """Create the settings. `training: null` in a file would be a TypeError."""
        for name in sorted({action.dest.partition(".")[0] for action in self._actions if "." in action.dest}):
            if not isinstance(namespace.get(name), Namespace):
                self.error(f"{name}: expected settings, found {json.dumps(namespace.get(name), default=str)}")
        return super().instantiate(namespace, *args, **options)

    def _with_lists(self, words: list[str]) -> list[str]:
        types = {
            option: (hint := getattr(action, "_typehint", None), *get_args(hint))
            for action in self._actions
            for option in action.option_strings
            if not option.endswith("+")  # adds one item
        }
        found = list(words)
        for place, word in enumerate(words):
            option, equals, value = word.partition("=")
            lists = [kind for kind in types.get(option, ()) if get_origin(kind) is list]
            if not lists or (not equals and place + 1 == len(words)):
                continue
            value = value if equals else words[place + 1]
            plain = str not in types[option] or get_origin(types[option][0]) is list or _PLAIN.match(value)
            if value[:1] in "[-" or value == "null" or not plain:  # a list already, or one value
                continue
            items = value.split(",") if lists == [list[int]] else map(json.dumps, value.split(","))
            listed = f"[{', '.join(items)}]"
            found[place + (not equals)] = f"{option}={listed}" if equals else listed
        return found

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the message and a suggestion, and exit with code 2."""
        if not is_rank0():  # which prints the same
            sys.exit(2)
        names = [action.dest for action in self._actions if action.option_strings]
        ends = {name.rpartition(".")[2]: name for name in names} | dict(self.aliases)
        found = []
        for word in re.findall(r"arguments: --([\w.]+)|[Oo]ption '([\w.]+)' is not|option '([\w.]+)'$", message):
            unknown = "".join(word)
            if self.aliases and unknown in INSTEAD:
                found.append(INSTEAD[unknown])
                continue
            near = get_close_matches(unknown, names, n=1) or get_close_matches(unknown.rpartition(".")[2], ends, n=1)
            found += [f"--{ends.get(name, name)}" for name in near]
        if found:
            message = f"{message}; did you mean {', '.join(found)}?"
        if re.search(r"<class 'str'>. Got value: (True|False|-?\d)", message):
            message += "\nYAML reads no, yes and 0 as other types than text; put text in quotes, as in ['no', 'yes']"
        super().error(with_options(message, self.words), ex)


def _config_first(words: list[str]) -> list[str]:
    """Put `--config FILE` before the other options: jsonargparse lets the later one win, and they override the file."""
    first, others, place = [], [], 0
    while place < len(words):
        taken = 1
        if words[place] == "--config" or words[place].startswith("--config="):
            taken = 1 if "=" in words[place] else 2
            first += words[place : place + taken]
        else:
            others.append(words[place])
        place += taken
    return first + others


def make_parser(verb: str, description: str, example: str) -> VerbParser:
    """A parser for `sparsegrad COMMAND`. Its help ends with an example and what the example prints."""
    parser = VerbParser(
        prog=f"sparsegrad {verb}", description=description, allow_abbrev=False, formatter_class=_HelpFormatter
    )
    parser.epilog = f"example: {example}"
    return parser


def add_quiet(parser: VerbParser) -> None:
    """Add `--quiet`."""
    parser.add_argument("--quiet", action="store_true", help="print the results only, no progress")


def run_parser(verb: str, description: str, example: str, argv: list[str]) -> VerbParser:
    """A parser for all settings of a run. Its defaults are those of the preset that `argv` names."""
    parser = make_parser(verb, description, example)
    parser.usage = "%(prog)s [--OPTION VALUE ...]"  # the list of all options would hide an error's one line
    parser.add_argument("--config", action="config", help="YAML file with any of these settings")
    parser.add_argument("--preset", type=str, default=None, help="settings to start from; list: sparsegrad presets")
    add_quiet(parser)
    parser.add_class_arguments(RunArguments)
    methods = "; ".join(f"{method.name}: {method.summary}" for method in METHODS.values())
    rates = ", ".join(f"{method.learning_rate:g} ({method.name})" for method in METHODS.values())
    for action in parser._actions:
        if action.dest == "method":
            action.help = f"{action.help}. {methods}"
        if action.dest == "training.learning_rate":
            action.help = f"{action.help}: {rates}"
    parser.add_aliases()
    name, files = _preset_and_files(argv)
    for settings in files:
        parser.check_given_once(given_names(settings))
        name = settings.get("preset") if name is None else name
    if isinstance(name, str):  # the parser refuses other types
        parser.set_defaults(flat(preset(name)))
    return parser


def run_arguments(parsed: dict[str, Any]) -> RunArguments:
    """The run's settings from what a `run_parser` has parsed."""
    return RunArguments(**{name: value for name, value in parsed.items() if name not in _NO_SETTINGS})


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


def arguments_of(folder: RunFolder) -> RunArguments:
    """The settings of the run in a folder, of this or an earlier version.

    Raises:
        FileNotFoundError: this is not a run folder.
        ValueError: config.yaml is damaged.
    """
    settings = folder.read_arguments()
    try:
        return arguments_from({**updated(settings), "data": settings["data"], "training": settings["training"]})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.path / 'config.yaml'}: expected the settings of a run, as sparsegrad train writes them; {error}"
        ) from error


@cache  # a study reads hundreds of settings; creating a parser takes longer than using it
def _settings_parser() -> VerbParser:
    parser = run_parser("train", "", "", [])
    parser.exit_on_error = False
    return parser


def _preset_and_files(argv: list[str]) -> tuple[str | None, list[dict[str, Any]]]:
    """The preset that the command line names, and the settings in the config files that it names, the last one first.

    Raises:
        ValueError: a file is not YAML; the message names the file.
    """
    plain = PlainParser(add_help=False, allow_abbrev=False)
    plain.add_argument("--preset")
    plain.add_argument("--config", action="append", default=[])
    known, _ = plain.parse_known_args(argv)
    paths = [Path(path).expanduser() for path in reversed(known.config)]  # as jsonargparse does
    files = [read_yaml(path) for path in paths if path.is_file()]
    return known.preset, [settings for settings in files if isinstance(settings, dict)]
