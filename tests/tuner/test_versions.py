"""Supported versions of PEFT and transformers, also in pyproject.toml and the constraint files."""

from __future__ import annotations

from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sparsegrad_peft.tuner import versions
from sparsegrad_peft.tuner.versions import SUPPORTED, check_versions, is_supported

ROOT = Path(__file__).parents[2]


def test_pyproject_declares_the_same_ranges() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package, (low, high) in SUPPORTED.items():
        lines = [word for word in text.split('"') if word.startswith(f"{package}>")]
        assert len(lines) == 2  # extras peft and lab
        for line in lines:
            assert {f"{s.operator}{s.version.removesuffix('.0')}" for s in Requirement(line).specifier} == {
                f">={low.removesuffix('.0')}", f"<{high}"
            }  # fmt: skip


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-lowest.txt", "constraints-newest.txt"])
def test_constraints_are_within_the_ranges(name: str) -> None:
    pins = dict(line.split("==") for line in (ROOT / name).read_text().split() if "==" in line)
    assert all(is_supported(package, pins[package]) for package in SUPPORTED)


@pytest.mark.parametrize(
    ("package", "number", "supported"),
    [
        ("peft", "0.20.0", False), ("peft", "0.21.0", True), ("peft", "0.21.2", True), ("peft", "0.22.0", False),
        ("peft", "0.22.0.dev0", False), ("transformers", "4.57.6", False), ("transformers", "5.4.0", False),
        ("transformers", "5.5.0", True), ("transformers", "5.23.0", True), ("transformers", "5.24.0", False),
    ],
)  # fmt: skip
def test_bounds(package: str, number: str, supported: bool) -> None:
    assert is_supported(package, number) is supported


def test_an_unsupported_pair_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    check_versions()
    monkeypatch.setattr(versions, "version", {"peft": "0.21.2", "transformers": "5.24.0"}.__getitem__)
    with pytest.raises(ImportError, match=r"found peft 0.21.2 and transformers 5.24.0.*pip install 'peft>=0.21,<0.22'"):
        check_versions()
