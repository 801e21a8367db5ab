"""The architecture that ARCHITECTURE.md describes: levels, no import cycles, few dependencies, short functions.

Imports are read from the source, so lazy imports and imports under `TYPE_CHECKING` count as well.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import PROJECT

TESTS = Path(__file__).parent
SRC = TESTS.parent / "src"
LEVELS: tuple[tuple[str, ...], ...] = (
    ("sparsegrad_peft.method",),
    ("sparsegrad_peft.tuner",),
    ("sparsegrad_peft",),  # the package's own file, which names the public parts of both
    ("sparsegrad_lab",),
    ("sparsegrad_lab.tasks",),
    ("sparsegrad_lab.methods",),
    ("sparsegrad_lab.run",),
    ("sparsegrad_lab.inspection", "sparsegrad_lab.figures", "sparsegrad_lab.bench", "sparsegrad_lab.chat"),
    ("sparsegrad_lab.study",),
    ("sparsegrad_lab.cli",),
)
"From bottom to top. A file imports from its own package and from lower levels, not from others of its level."
LEVEL = {package: number for number, packages in enumerate(LEVELS) for package in packages}
METHOD_NEEDS = {"torch", "jaxtyping", "rich"}
TUNER_NEEDS = METHOD_NEEDS | {"peft", "transformers", "accelerate", "safetensors", "huggingface_hub", "packaging"}
"PEFT itself depends on the last four."
LAB_OPTIONAL = {"gguf", "openai", "galore_torch"}
"The extra `chat`; the method `galore`, which says what to install."
LONGEST = 60


def find_modules() -> dict[str, Path]:
    """Name and file of every module of both packages."""
    modules = {}
    for path in sorted(SRC.rglob("*.py")):
        parts = path.relative_to(SRC).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


MODULES = find_modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def imported_names(module: str) -> Iterator[str]:
    """Absolute dotted names that `module` imports, wherever the import stands; `from a import b` gives `a.b`."""
    package = module.split(".") if MODULES[module].name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if not node.level else package[: len(package) - node.level + 1]
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def own_imports(module: str) -> set[str]:
    """The modules of these two packages that `module` imports."""
    found = set()
    for name in imported_names(module):
        while name and name not in MODULES:  # a name in a module is an import of the module
            name = name.rpartition(".")[0]
        if name and name != module:
            found.add(name)
    return found


IMPORTS = {module: own_imports(module) for module in MODULES}


def package_of(module: str) -> str:
    return ".".join(module.split(".")[:2]) if ".".join(module.split(".")[:2]) in LEVEL else module.split(".")[0]


def foreign_imports(package: str) -> set[str]:
    """Top-level names of the packages that a package needs beyond the standard library and this project."""
    names = {
        name.partition(".")[0] for module in MODULES if package_of(module) == package for name in imported_names(module)
    }
    return names - sys.stdlib_module_names - {"sparsegrad_peft", "sparsegrad_lab"}


def test_every_module_is_seen() -> None:
    assert len(MODULES) > 60
    assert {package_of(module) for module in MODULES} == set(LEVEL)
    assert sum(map(len, IMPORTS.values())) > 200
    assert "sparsegrad_peft.method.basis" in IMPORTS["sparsegrad_peft"]  # imported under TYPE_CHECKING


def test_no_import_cycles_between_files() -> None:
    TopologicalSorter(IMPORTS).prepare()  # CycleError names the files


@pytest.mark.parametrize("package", LEVEL)
def test_imports_only_go_down(package: str) -> None:
    up = [
        f"{module} imports {other}"
        for module in MODULES
        if package_of(module) == package
        for other in sorted(IMPORTS[module])
        if package_of(other) != package and LEVEL[package_of(other)] >= LEVEL[package]
    ]
    assert not up, "\n".join(up)


@pytest.mark.parametrize(
    ("package", "allowed"), [("sparsegrad_peft.method", METHOD_NEEDS), ("sparsegrad_peft.tuner", TUNER_NEEDS)]
)
def test_the_library_needs_few_packages(package: str, allowed: set[str]) -> None:
    assert foreign_imports(package) <= allowed


def test_the_laboratory_declares_what_it_imports() -> None:
    """Each package that it imports is a dependency of its own, and not only one of a dependency."""
    declared = {
        canonicalize_name(Requirement(line).name)
        for line in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["lab"]]
    }
    distributions = importlib.metadata.packages_distributions()
    imported = set().union(*(foreign_imports(package) for package in LEVEL if package.startswith("sparsegrad_lab")))
    assert len(imported) > 10
    missing = {
        module
        for module in imported - LAB_OPTIONAL
        if not {canonicalize_name(name) for name in distributions.get(module, [module])} & declared
    }
    assert not missing


@pytest.mark.parametrize("package", LEVEL)
def test_functions_are_short_or_say_why(package: str) -> None:
    """At most 60 lines, or a docstring with a line that starts with "Long:" and gives the reason."""
    long = [
        f"{module}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for module in MODULES
        if package_of(module) == package
        for node in ast.walk(TREES[module])
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST
        and not any(line.strip().startswith("Long: ") for line in (ast.get_docstring(node) or "").splitlines())
    ]
    assert not long, "\n".join(long)


@pytest.mark.parametrize("package", [name for name, path in MODULES.items() if path.name == "__init__.py"])
def test_a_package_lists_its_files(package: str) -> None:
    """Its docstring has a line for each file, or says what the others are. It names no file that is not there."""
    guide = ast.get_docstring(TREES[package]) or ""
    folder = MODULES[package].parent
    files = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    listed = {
        name for row in re.findall(r"^ *(\w+(?:, \w+)*)  +\S", guide, re.MULTILINE) for name in row.split(", ")
    }  # fmt: skip
    assert listed <= files | {path.name for path in folder.iterdir()}
    if "Each other file is one" not in guide:
        assert not {name for name in files if not re.search(rf"\b{name}\b", guide)}


def test_the_source_names_files_that_exist() -> None:
    """Every `file.py` in a docstring or a comment."""
    here = {path.name for path in [*SRC.rglob("*"), *TESTS.parent.glob("benchmarks/*")]}
    named = {
        (module, name)
        for module, path in MODULES.items()
        for name in re.findall(r"`(\w+\.py)`", path.read_text(encoding="utf-8"))
    }
    assert len(named) > 10
    assert not {(module, name) for module, name in named if name not in here}


def test_tests_mirror_the_source() -> None:
    """A test file is named after a file of its package, or after the package; an aspect may follow: test_optim_x.py."""
    checked, strangers = 0, []
    for package in LEVEL:
        top, _, name = package.partition(".")
        folder = TESTS / (f"lab/{name}" if top == "sparsegrad_lab" else name)
        stems = {name, *(path.stem for path in (SRC / top / name).rglob("*.py"))}
        for test in sorted(folder.rglob("test_*.py")) if name else []:
            checked += 1
            if not any(f"{test.stem}_".startswith(f"test_{stem}_") for stem in stems):
                strangers.append(str(test.relative_to(TESTS)))
    assert checked > 50
    assert not strangers
