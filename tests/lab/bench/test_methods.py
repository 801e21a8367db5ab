"""Every method of a benchmark trains what it says, and nothing else."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch

from helpers import bench_runner
from sparsegrad_lab.bench.methods import METHODS, NotInstalledError
from sparsegrad_lab.bench.workloads import WORKLOADS, transformer

pytestmark = pytest.mark.filterwarnings("ignore:This implementation of AdamW is deprecated:FutureWarning")
"In galore_torch."


@pytest.fixture(autouse=True)
def tiny_workload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small BERT as another workload: complete bases of MiniLM's sides take seconds."""
    build = transformer("bert", "AutoModelForSequenceClassification", 32, 64, 2, vocab_size=1000)
    monkeypatch.setitem(WORKLOADS, "tiny-bert", replace(WORKLOADS["minilm"], build=build))


@pytest.mark.parametrize("rest", ["freeze", "train"])
@pytest.mark.parametrize(
    ("method", "workload"),
    [(method, "tiny-bert") for method in sorted(METHODS)]
    + [(method, "llama-long") for method in ("floor", "sparsegrad", "lora", "full")],
)
def test_every_method_trains_its_parameters(method: str, workload: str, rest: str) -> None:
    """One small block of each architecture: trained parameters move, frozen ones and the floor's MLP do not."""
    if method == "galore":
        pytest.importorskip("galore_torch")
    found = bench_runner(method, workload, tokens=16, rest=rest)
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
    kept = {
        m: bench_runner(m, "minilm", tokens=256).bytes()["kept_for_backward"] for m in ("floor", "sparsegrad", "lora")
    }
    assert kept["floor"] < kept["sparsegrad"] < kept["lora"]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name in `sys.modules` without a module is what Python has for a package that cannot be imported."""
    monkeypatch.setitem(sys.modules, "galore_torch", None)
    with pytest.raises(NotInstalledError, match="pip install galore-torch"):
        bench_runner("galore")
