"""`sparsegrad presets`."""

from __future__ import annotations

import yaml

from ..run.parsing import make_parser
from ..run.presets import preset, preset_names

EXAMPLE = "sparsegrad presets --show paper/bert-base/rte; prints the settings as YAML."


def main(argv: list[str]) -> None:
    """Print the names of the presets, or one of them."""
    parser = make_parser("presets", "List the settings that come with the package, for train --preset NAME.", EXAMPLE)
    parser.add_argument("--show", type=str | None, default=None, help="print this preset as YAML")
    options = parser.parse_args(argv)
    if options.show is None:
        print("\n".join(preset_names()))
    else:
        print(yaml.safe_dump(preset(options.show), sort_keys=False), end="")
