"""The versions of PEFT and transformers that the adapter supports, checked when the package is imported."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

SUPPORTED = {"peft": ("0.21", "0.22"), "transformers": ("5.5", "5.24")}
"""Package -> (lowest version, first version that is too new). `pyproject.toml` declares the same ranges.

peft: 0.21 introduced the state-dict hooks of `peft_private.HOOKS`. transformers: from 5.24 on, `model.add_adapter`
requires PEFT 0.22.
"""


def check_versions() -> None:
    """Check the installed PEFT and transformers.

    Raises:
        ModuleNotFoundError: one of them is not installed.
        ImportError: one of them is too old or too new; the message has the `pip install` command.
    """
    installed = {package: version(package) for package in SUPPORTED}
    if not all(is_supported(package, found) for package, found in installed.items()):
        ranges = {package: f"{package}>={low},<{high}" for package, (low, high) in SUPPORTED.items()}
        found = " and ".join(f"{package} {number}" for package, number in installed.items())
        wanted = " ".join(f"'{one}'" for one in ranges.values())
        raise ImportError(
            f"sparsegrad_peft.tuner needs {' and '.join(ranges.values())}; found {found}. Install supported "
            f"versions: pip install {wanted}"
        )


def is_supported(package: str, number: str) -> bool:
    """True if this version of the package is in the supported range. A pre-release counts as its release."""
    low, high = (Version(bound).release for bound in SUPPORTED[package])
    return low <= Version(number).release < high
