"""`sparsegrad presets`."""

from __future__ import annotations

import yaml

from ..run.parsing import make_parser
from ..run.presets import preset, preset_names

EXAMPLE = "sparsegrad presets --show paper/bert-base/rte; prints the settings as YAML."


def main(argv: list[str]) -> None:
    """List them, or print one."""
    parser = make_parser("presets", "Settings that come with the package, for sparsegrad train --preset NAME.", EXAMPLE)
    parser.add_argument("--show", type=str | None, default=None, help="print one as YAML")
    found = parser.parse_args(argv)
    if found.show is None:
        print("\n".join(preset_names()))
    else:
        print(yaml.safe_dump(preset(found.show), sort_keys=False), end="")
