"""`sparsegrad bench`: the result file, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sparsegrad_lab.bench.methods import METHODS
from sparsegrad_lab.bench.settings import DEFAULT_METHODS, BenchArguments
from sparsegrad_lab.bench.settings import WORKLOADS as NAMES
from sparsegrad_lab.bench.speed import _shapes, check, measure, percentiles
from sparsegrad_lab.bench.workloads import WORKLOADS
from sparsegrad_lab.cli.main import main


def test_a_run_gives_a_result_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "speed.json"
    arguments = ["--workload", "mlp-16x32", "--tokens", "24", "--repeats", "3", "--warmup", "0", "--threads", "1",
             "--methods", "floor,sparsegrad", "--json", str(path)]  # fmt: skip
    assert main(["bench", *arguments]) == 0
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["methods"]) == ["floor", "sparsegrad"]
    for row in result["methods"].values():
        assert row["step_ms"].keys() == {"p20", "p50", "p80"}
        assert 0 < row["step_ms"]["p20"] <= row["step_ms"]["p50"] <= row["step_ms"]["p80"]
        assert row["peak_bytes"] > 1e6
        assert row["ratio_to"].keys() == {"floor"}
    assert result["methods"]["floor"]["ratio_to"]["floor"] == 1.0
    assert result["arguments"]["tokens"] == 24
    shown = capsys.readouterr().out
    assert "sparsegrad" in shown
    assert f"written: {path}" in shown


def test_shapes_and_live_tokens() -> None:
    """Eight sequences of 16, 32, ..., 128 tokens."""
    shapes, live = _shapes(BenchArguments(workload="bert-base-padded", tokens=1024), layers=2)
    assert shapes == [(3072, 768), (768, 3072)] * 2
    assert live == sum(range(16, 129, 16))
    assert _shapes(BenchArguments(workload="llama-long", tokens=64), layers=1)[1] == 64


def test_defaults_are_methods_that_exist() -> None:
    assert set(DEFAULT_METHODS) <= set(METHODS)
    assert tuple(WORKLOADS) == NAMES
    assert percentiles([3.0, 1.0, 2.0, 6.0, 4.0, 5.0]) == {"p20": 2.0, "p50": 3.5, "p80": 5.0}
    for name in WORKLOADS:
        check(BenchArguments(workload=name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workload": "bert"}, r"workload: expected one of bert-base, .*; found 'bert'"),
        ({"methods": "lora,lorra"}, r"methods: expected some of floor, .*; found 'lorra'"),
        ({"methods": "lora,lora"}, r"expected each method once, found lora,lora"),
        ({"tokens": 0}, r"tokens must be at least 1, found 0"),
        ({"tokens": 200}, r"expected a multiple of 128, the length of a sequence, or fewer; found 200"),
        ({"narrow": 4000}, r"narrow, bert-base: expected .* from 1 to 768"),
    ],
)
def test_refused_before_any_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(BenchArguments(**options))


def test_no_folder_for_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--workload", "mlp-16x32", "--json", str(tmp_path / "none" / "x.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
