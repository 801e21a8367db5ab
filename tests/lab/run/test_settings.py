"""Settings that are not valid are refused in plain words, before torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.cli.main import main
from sparsegrad_lab.methods.registry import METHODS, find_method
from sparsegrad_lab.run.exit_codes import ExitCode, RefusedError
from sparsegrad_lab.run.parsing import arguments_from
from sparsegrad_lab.run.settings import RunArguments, flat

ALIASES = "\n".join(
    ["a: &a [x, x, x, x, x, x, x, x, x]"]
    + [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
)
"A few lines that stand for 9 to the power of 9 values."


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("training: {batch_size: null}", "training.batch_size: expected a value, found null"),
        ("method: null", "method: expected a value, found null; leave it out for the default"),
        ("training: null", "training: expected settings, found null"),
        ("training: {epochs: 1e300}", "training.epochs must be above 0 and at most 1,000,000, found 1e+300"),
        ("seeds: [-1]", "seeds: expected different numbers from 0 to 4,294,967,295, at least one; found [-1]"),
        ("seeds: [4294967296]", "at least one; found [4294967296]"),
        (
            "{task: digits, training: {batches: by_length}}",
            "training.batches: by_length is for texts, found task 'digits'",
        ),
        ("{task: files, data: {labels: [no, yes]}}", "put text in quotes, as in ['no', 'yes']"),
        (ALIASES, "expected at most 100,000 values, found more; aliases (*name) count as copies"),
        ("[" * 5000, "expected at most 100 levels of nesting, found more"),
        ("a: &a [*a]", "found the alias *a outside the value that it names"),
        ("#" * 1_000_001, "expected at most 1,000,000 characters, found 1,000,001"),
    ],
    ids=lambda value: value[:24],
)
def test_config_files_that_are_refused(
    content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(content, encoding="utf-8")
    try:
        code = main(["train", "--config", str(file), "--output", str(tmp_path / "run")])
    except SystemExit as end:  # the parser's way of ending
        code = int(end.code or 0)
    assert code in (ExitCode.REFUSED, ExitCode.FAILED)
    err = " ".join(capsys.readouterr().err.split())
    assert expected in err
    assert not (tmp_path / "run").exists()


def test_quoted_labels_are_text(tmp_path: Path) -> None:
    from sparsegrad_lab.cli.train import parse

    file = tmp_path / "config.yaml"
    file.write_text("{task: files, data: {labels: ['no', 'yes']}}", encoding="utf-8")
    assert parse(["--config", str(file)]).data.labels == ["no", "yes"]


def test_json_that_is_nested_too_deeply(tmp_path: Path) -> None:
    file = tmp_path / "adapter_config.json"
    file.write_text("[" * 100_000, encoding="utf-8")
    with pytest.raises(RefusedError, match=r"adapter_config.json: expected an adapter_config.json of PEFT \(maximum"):
        RunArguments(method=str(file)).check()


def test_a_text_that_is_no_regular_expression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error names the option, or the file."""
    file = tmp_path / "adapter_config.json"
    file.write_text('{"peft_type": "LORA", "target_modules": "["}', encoding="utf-8")
    expected = r"target_modules: expected names of layers, or a regular expression of them, found '\[' \(unterminated"
    for arguments in (given("adapter.target_modules", "["), RunArguments(method=str(file))):
        with pytest.raises(RefusedError, match=expected):
            arguments.check()
    assert main(["inspect", "bert-base", "--target_modules", "["]) == ExitCode.REFUSED
    assert re.search(f"--{expected}", capsys.readouterr().err)
    assert main(["train", "--target_modules", "[", "--output", str(tmp_path / "run")]) == ExitCode.REFUSED
    assert "adapter.target_modules (--target_modules): expected" in capsys.readouterr().err


def given(name: str, value: Any) -> RunArguments:
    """Arguments with one setting changed, by its dotted name."""
    arguments = RunArguments()
    group, _, field = name.partition(".")
    setattr(getattr(arguments, group), field, value)
    return arguments


UNREAD: dict[str, tuple[Any, set[str]]] = {
    "adapter.density": (0.5, {"lora", "full", "galore"}),
    "adapter.k": (5, {"lora", "full", "galore"}),
    "adapter.products": ("sparse", {"sparsegrad", "lora", "meprop", "full", "galore"}),
    "calibration.refresh": (5, {"lora", "meprop", "full", "galore", "literal"}),
    "training.rest_learning_rate": (0.1, {"full", "galore"}),
    "training.gradient_accumulation": (2, {"literal"}),
    "adapter.layers": ([0], set()),
    "adapter.rank": (3, set()),
    "adapter.shared": (True, set()),
    "calibration.n_steps": (5, set()),
}
"""Setting -> another value than its default, and the methods that refuse it."""


@pytest.mark.parametrize("name", UNREAD)
def test_settings_that_a_method_does_not_read(name: str) -> None:
    value, refusing = UNREAD[name]
    arguments = given(name, value)
    if name == "calibration.refresh":
        arguments.adapter.c = arguments.adapter.r = "full"
    found = set()
    for method in METHODS:
        arguments.method = method
        if any(problem.startswith(f"{name} is for ") for problem in arguments.problems()):
            found.add(method)
        on_the_command_line = any(problem.startswith(f"{name} is for ") for problem in arguments.problems({name}))
        assert on_the_command_line == METHODS[method].ignores(name)
    assert found == refusing


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"method": "full"}, "method full trains the model's own weights"),
        ({"method": "literal"}, "method literal trains the model's own weights"),
        ({"method": "meprop"}, "method meprop with complete cores trains as many float32 entries as the weights have"),
        ({"adapter": {"c": "full", "r": "full"}}, "method sparsegrad with complete cores trains"),
        (
            {"method": "{folder}/pissa.json"},
            "method pissa with init_lora_weights 'pissa' needs",
        ),
        ({"method": "{folder}/original.json"}, "method original with complete cores trains as many float32 entries"),
        ({"rest": "train"}, "rest: train updates weights that are in 4 bits; use rest: freeze"),
    ],
)
def test_no_training_of_weights_in_4_bits(changed: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    (tmp_path / "pissa.json").write_text('{"peft_type": "LORA", "init_lora_weights": "pissa"}', encoding="utf-8")
    (tmp_path / "original.json").write_text('{"peft_type": "SPARSEGRAD", "original_space": true}', encoding="utf-8")
    settings: dict[str, Any] = {"load_in_4bit": True, **changed}
    if "method" in settings:
        settings["method"] = settings["method"].replace("{folder}", str(tmp_path))
    [problem] = arguments_from(settings).problems()
    assert problem.startswith(f"load_in_4bit: {reason}")
    (tmp_path / "plain.json").write_text('{"peft_type": "LORA", "use_rslora": true}', encoding="utf-8")
    for method in ("sparsegrad", "lora", str(tmp_path / "plain.json")):
        assert RunArguments(method=method, load_in_4bit=True).problems() == []


def test_settings_that_every_method_reads_are_known() -> None:
    settings = flat(RunArguments().as_dict())
    for method in METHODS.values():
        assert method.reads <= settings.keys()


def test_methods_by_name_and_by_file(tmp_path: Path) -> None:
    assert list(METHODS) == ["sparsegrad", "lora", "meprop", "full", "galore", "literal"]
    assert {name for name, method in METHODS.items() if method.leaves == "model"} == {"full", "galore", "literal"}
    file = tmp_path / "vera.json"
    file.write_text("{}", encoding="utf-8")
    assert find_method(str(file)).name == "vera"
    with pytest.raises(ValueError, match=r"expected one of sparsegrad, .*, or the path .*; found 'lore'"):
        find_method("lore")


def test_every_default_is_valid(arguments: Callable[..., RunArguments], tmp_path: Path) -> None:
    for method in METHODS:
        if method != "galore":  # its package may be missing
            assert (
                arguments(tmp_path, "--method", method, "--adapter.c", "full", "--adapter.r", "full").problems() == []
            )
