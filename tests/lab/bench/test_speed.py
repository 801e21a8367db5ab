"""`sparsegrad bench`: every method runs a step, and counted multiply-adds are the computed ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from sparsegrad_lab.bench.counts import multiply_adds
from sparsegrad_lab.bench.methods import METHODS, NotInstalledError
from sparsegrad_lab.bench.settings import DEFAULT_METHODS, BenchArguments
from sparsegrad_lab.bench.speed import check, measure, percentiles
from sparsegrad_lab.bench.worker import Runner, Worker
from sparsegrad_lab.bench.workloads import WORKLOADS, find_workload
from sparsegrad_lab.cli.main import main
from sparsegrad_peft.method.sizes import Sizes

# galore_torch
pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")

SIZES = Sizes(narrow=8, wide=4)


def running(method: str, workload: str = "mlp-32x64", tokens: int = 96, **options: Any) -> Runner:
    settings = {"narrow": 8, "wide": 4, "threads": torch.get_num_threads(), **options}
    return Runner(BenchArguments(workload=workload, tokens=tokens, **settings), method, 1)


def counted() -> FlopCounterMode:
    """PyTorch's FLOP counter, with the product that is added in place, which it does not know."""

    def in_place(self: Any, a: tuple[int, int], b: tuple[int, int], **options: Any) -> int:
        return addmm_flop(self, a, b)

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place})


@pytest.mark.parametrize("tokens", [4, 96, 400, 1500])
@pytest.mark.parametrize(
    "method", ["floor", "sparsegrad", "sparsegrad-speed", "sparsegrad-complete", "literal", "full"]
)
def test_counted_is_computed(method: str, tokens: int) -> None:
    """With few tokens, where the update is applied in factors, and with many, where it is formed."""
    found = running(method, tokens=tokens)
    with counted() as counter:
        found.step()
    shapes = [(64, 32), (32, 64)]
    assert counter.get_total_flops() == 2 * multiply_adds(method, shapes, tokens, tokens, SIZES)


def test_counted_is_computed_with_selection_in_the_basis() -> None:
    """The published method on plain weights. Neither side counts products with a sparse matrix."""
    found = running("sparsegrad-paper")
    with counted() as counter:
        found.step()
    assert counter.get_total_flops() == 2 * multiply_adds("sparsegrad-paper", [(64, 32), (32, 64)], 96, 96, SIZES)


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize(
    ("method", "workload"),
    [(method, "minilm") for method in sorted(METHODS)]
    + [(method, "llama-long") for method in ("floor", "sparsegrad", "lora", "full")],
)
def test_every_method_trains_its_parameters(method: str, workload: str, rest: str) -> None:
    """One small block of each architecture: trained parameters move, frozen ones and the floor's MLP do not."""
    if method == "galore":
        pytest.importorskip("galore_torch")
    found = running(method, workload, tokens=16, rest=rest)
    parameters = dict(found.prepared.model.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    found.step()
    found.step()
    moved = {name for name, parameter in parameters.items() if not torch.equal(parameter, before[name])}
    assert moved <= {name for name, parameter in parameters.items() if parameter.requires_grad}
    in_mlp = {name for name in moved if ("layer" in name and "att" not in name and "orm" not in name)}
    assert bool(in_mlp) == (method != "floor")
    assert any("embed" in name for name in moved) == (rest == "train")
    size = found.bytes()
    assert size["trainable_entries"] == sum(p.numel() for p in parameters.values() if p.requires_grad)
    assert size["peak"] > size["weights"]
    assert (size["optimizer"] > 0) == (rest == "train" or method != "floor")


def test_floor_is_as_cheap_as_it_can_be() -> None:
    """The floor saves no input of the MLP, LoRA saves it, SparseGrad saves its projection."""
    kept = {m: running(m, "minilm", tokens=256).bytes()["kept_for_backward"] for m in ("floor", "sparsegrad", "lora")}
    assert kept["floor"] < kept["sparsegrad"] < kept["lora"]


def test_padding_is_padding() -> None:
    batch = find_workload("bert-base-padded").batch(1024, 0, torch.device("cpu"))
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (8, 128)
    assert (int(lengths.min()), int(lengths.max())) == (16, 128)


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


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in `sys.modules` without a module is what Python has for a package that cannot be imported."""
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(NotInstalledError, match="pip install galore-torch"):
        running("galore")


def test_a_worker_that_ends() -> None:
    """An error in the process, and a process that is killed."""
    worker = Worker(BenchArguments(workload="mlp-16x32", tokens=8, threads=1), "floor", 1)
    milliseconds = worker.timed_step()
    assert milliseconds is not None
    assert milliseconds > 0
    assert worker._ask(int, "x") is None
    assert worker.ended is not None
    assert worker.ended[0] == "failed"
    assert "ValueError: invalid literal" in worker.ended[1]
    assert worker.timed_step() is None

    worker.ended = None
    (process,) = worker._process._processes.values()
    process.kill()
    process.join()
    assert worker.timed_step() is None
    assert worker.ended == ("failed", "the process was killed (out of memory?)")
    worker.stop()


def test_defaults_are_methods_that_exist() -> None:
    assert set(DEFAULT_METHODS) <= set(METHODS)
    assert percentiles([3.0, 1.0, 2.0, 5.0, 4.0]) == {"p20": 2.0, "p50": 3.0, "p80": 5.0}
    for name in WORKLOADS:
        check(BenchArguments(workload=name))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"workload": "bert"}, r"workload: expected one of bert-base, .*; found 'bert'"),
        ({"methods": "lora,lorra"}, r"methods: expected some of floor, .*; found 'lorra'"),
        ({"methods": "lora,lora"}, r"expected each method once, found lora,lora"),
        ({"tokens": 0}, r"tokens must be at least 1, found 0"),
        ({"narrow": 4000}, r"narrow, bert-base: expected .* from 1 to 768"),
    ],
)
def test_refused_before_any_work(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        measure(BenchArguments(**options))


def test_no_folder_for_the_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--workload", "mlp-16x32", "--json", str(tmp_path / "none" / "x.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err
