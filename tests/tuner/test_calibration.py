"""Calibration of an adapter, also if its cores were never allocated."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from helpers import (
    MLP_LINEARS,
    cores,
    logits,
    max_difference,
    tiny_batch,
    tiny_model,
    train_adapter,
    trained_adapter,
    tuner_layers,
)
from sparsegrad_peft import Calibration, PairStatistics, SparseGradConfig, Trajectory, calibrate_adapter
from sparsegrad_peft.method.config import sign_step
from sparsegrad_peft.tuner.linear import SparseGradTunerLinear


def test_original_space_is_not_calibrated() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(original_space=True))
    with pytest.raises(ValueError, match=r"original space .*takes no bases; make it with original_space=False"):
        calibrate_adapter(model, [tiny_batch("bert")], n_steps=1)


def test_calibration_is_as_recommended_unless_told_otherwise() -> None:
    """Every gradient counts with norm 1, over 30 steps of a walk; a single field replaces only itself."""
    for options, n_steps in (({}, 30), ({"n_steps": 3}, 3)):
        model = get_peft_model(tiny_model("bert"), SparseGradConfig())
        statistics = calibrate_adapter(model, [tiny_batch("bert")], progress=False, **options)
        assert statistics.config.trajectory == Trajectory(lr=1e-4, update=sign_step)
        for group in statistics.groups.values():
            assert isinstance(group, PairStatistics)
            assert group.n_gradients == n_steps * len(group.layers)
            for M in group.M.values():
                norm = float(M.norm())
                assert (
                    n_steps / 2 < norm < n_steps * (1 + 1e-5)
                )  # the same batch in every step, so nearly one direction


def test_calibration_leaves_the_adapter_out_and_others_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter adds nothing yet; others that are active change the gradients, as they will in training."""
    model, _ = trained_adapter("bert", c=0.25)
    model.add_adapter("new", SparseGradConfig(c=0.5, r=0.5))
    model.base_model.set_adapter(["default", "new"])
    used = []
    core_and_basis = SparseGradTunerLinear.core_and_basis
    monkeypatch.setattr(
        SparseGradTunerLinear, "core_and_basis", lambda self, name: used.append(name) or core_and_basis(self, name)
    )
    mine = cores(model, "new")
    statistics = calibrate_adapter(model, [tiny_batch("bert")], adapter_name="new", n_steps=1, progress=False)
    assert set(used) == {"default"}
    assert all(layer.active_adapters == ["default", "new"] for layer in tuner_layers(model))
    assert all(core.requires_grad for core in (*cores(model, "new"), *cores(model)))
    without = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.5))
    other = calibrate_adapter(without, [tiny_batch("bert")], n_steps=1, progress=False)
    assert other.groups.keys() == statistics.groups.keys()
    for group, gram in other.groups.items():
        assert not torch.equal(gram.basis(c=1, r=1).U, statistics.groups[group].basis(c=1, r=1).U)
    assert all(core is old for core, old in zip(cores(model, "new"), mine, strict=True))


def test_an_interrupted_calibration_puts_the_adapter_back() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())

    def broken(model: nn.Module, batch: object) -> Tensor:
        assert all(layer.skipped_adapters == {"default"} for layer in tuner_layers(model))
        assert not any(core.requires_grad for core in cores(model))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate_adapter(model, [tiny_batch("bert")], loss_fn=broken, progress=False)
    assert not any(layer.skipped_adapters for layer in tuner_layers(model))
    assert all(core.requires_grad for core in cores(model))
    assert not model.peft_config["default"].calibrated


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("trajectory", [None, Trajectory(lr=1e-3)])
def test_cores_that_were_never_allocated(kind: str, trajectory: Trajectory | None, tmp_path: Path) -> None:
    """`low_cpu_mem_usage=True`: no (out, in) cores before calibration, and the same adapter afterwards."""
    data = tiny_batch(kind)
    task = {"bert": "SEQ_CLS"}.get(kind, "CAUSAL_LM")
    outputs = []
    for low_cpu_mem_usage in (True, False):
        config = SparseGradConfig(c=0.5, r=0.25, task_type=task)
        model = get_peft_model(tiny_model(kind), config, low_cpu_mem_usage=low_cpu_mem_usage)
        assert all(core.is_meta is low_cpu_mem_usage for core in cores(model))
        calibrate_adapter(model, [data], n_steps=2, training=False, trajectory=trajectory, progress=False)
        assert all(core.device.type == "cpu" and core.dtype == torch.float32 for core in cores(model))
        assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
        assert len(cores(model)) == MLP_LINEARS[kind]
        train_adapter(model, data)
        outputs.append(logits(model.eval(), data))
    assert max_difference(outputs[0], logits(tiny_model(kind), data)) > 1e-4
    assert max_difference(*outputs) == 0
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path)).eval()
    assert max_difference(logits(loaded, data), outputs[0]) == 0


def statistics_of(kind: str) -> Calibration:
    model = get_peft_model(tiny_model(kind), SparseGradConfig())
    return calibrate_adapter(model, [tiny_batch(kind)], n_steps=1, progress=False)


def test_ready_statistics_for_cores_that_were_never_allocated() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(), low_cpu_mem_usage=True)
    calibrate_adapter(model, calibration=statistics_of("bert"))
    assert max_difference(logits(model, tiny_batch("bert")), logits(tiny_model("bert"), tiny_batch("bert"))) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_type_of_cores_that_were_never_allocated(dtype: torch.dtype, autocast_adapter_dtype: bool) -> None:
    types = []
    for low_cpu_mem_usage in (True, False):
        model = get_peft_model(
            tiny_model("llama").to(dtype), SparseGradConfig(), low_cpu_mem_usage=low_cpu_mem_usage,
            autocast_adapter_dtype=autocast_adapter_dtype,
        )  # fmt: skip
        calibrate_adapter(model, calibration=statistics_of("llama"))
        types.append({core.dtype for core in cores(model)})
        sides = [side for layer in tuner_layers(model) for side in layer.sparsegrad_basis["default"].buffers()]
        assert {side.dtype for side in sides if side.dim() == 2} == {torch.bfloat16}
    assert types[0] == types[1] == {torch.float32 if autocast_adapter_dtype else dtype}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_type_of_cores_without_a_peft_model(dtype: torch.dtype) -> None:
    """transformers' `add_adapter` makes LoRA's matrices bfloat16, where a small step changes nothing."""
    model = tiny_model("llama").to(dtype)
    model.add_adapter(SparseGradConfig())
    assert {core.dtype for core in cores(model)} == {torch.promote_types(dtype, torch.float32)}


def test_a_core_that_is_not_there_says_so() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(), low_cpu_mem_usage=True)
    with pytest.raises(RuntimeError, match=r"low_cpu_mem_usage=True and has no core yet: call calibrate_adapter"):
        logits(model, tiny_batch("bert"))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"c": "full", "r": 0.5}, torch.bfloat16),
        ({"c": "full", "r": "full"}, torch.float32),
        ({"narrow": "full", "wide": "full"}, torch.float32),
        ({"basis_dtype": "float64"}, torch.float64),
        ({"basis_dtype": "bfloat16", "c": "full", "r": "full"}, torch.bfloat16),
    ],
)
def test_type_of_bases(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """In memory, in the file, and after loading, also into an adapter that has no bases yet."""
    model, base = trained_adapter("llama", **{"c": None, "r": None, **options})
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    fresh = get_peft_model(copy.deepcopy(base), SparseGradConfig(**options)).eval()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    set_peft_model_state_dict(fresh, weights)
    assert {value.dtype for name, value in weights.items() if "basis" in name and value.dim() == 2} == {dtype}
    expected = logits(model, tiny_batch("llama"))
    for found in (model, again, fresh):
        assert {b.dtype for n, b in found.named_buffers() if n.endswith((".U", ".V")) and b.dim() == 2} == {dtype}
        assert max_difference(logits(found, tiny_batch("llama")), expected) == 0
    assert (
        max_difference(logits(again.merge_and_unload(), tiny_batch("llama")), expected) < 1e-5
    )  # the rounded ones, throughout


def test_a_files_bases_keep_their_type(tmp_path: Path) -> None:
    """Also where the configuration says another, as one that was written by hand may."""
    model, base = trained_adapter("bert", basis_dtype="float32")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["basis_dtype"] = None
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for low_cpu_mem_usage in (True, False):
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert max_difference(logits(again.eval(), tiny_batch("bert")), logits(model, tiny_batch("bert"))) == 0


def test_calibrating_through_the_tuner_gives_the_same_names() -> None:
    """`PeftModel`, the tuner within it, and a model with injected layers name a layer differently; files do not."""
    shapes = []
    for inner in (lambda m: m, lambda m: m.base_model, lambda m: m.base_model.model):
        model = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.5))
        calibrate_adapter(inner(model), [tiny_batch("bert")], n_steps=1, progress=False)
        shapes.append({name: shape[1:] for name, shape in model.peft_config["default"].core_shapes.items()})
    assert shapes[0] == shapes[1] == shapes[2]
    assert next(iter(shapes[0])) == "bert.encoder.layer.0.intermediate.dense"


def test_the_papers_configuration() -> None:
    config = SparseGradConfig.paper(task_type="SEQ_CLS", shared=True)
    assert (config.c, config.r, config.shared, config.task_type) == ("full", "full", True, "SEQ_CLS")
    assert SparseGradConfig.paper(c=0.5).c == 0.5
    model = get_peft_model(tiny_model("bert"), config)
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=1, progress=False)
    for layer in tuner_layers(model):
        assert layer.sparsegrad_basis["default"].is_complete
        assert layer.sparsegrad_S["default"].shape == (layer.out_features, layer.in_features)


def test_bases_of_gigabytes_are_announced(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The limit is lowered here; no model that large is made."""
    size = 6 * (2 * 8 * 16 + 4 * 4)  # bfloat16 directions of the hidden side, int32 indices of neurons
    options: dict[str, Any] = {"trained": 0, "c": None, "r": None, "narrow": 8, "wide": 4}
    monkeypatch.setattr("sparsegrad_peft.tuner.calibration.LARGE_BASES", size)
    trained_adapter("bert", **options)
    monkeypatch.setattr("sparsegrad_peft.tuner.calibration.LARGE_BASES", size - 1)
    trained_adapter("bert", **options, shared=True)
    assert not [message for message in caplog.messages if "GB" in message]
    model, _ = trained_adapter("bert", **options)
    assert [m for m in caplog.messages if m.startswith("the bases of 6 layers take 0.0 GB. With SparseGradConfig(")]
    bases = [b for n, b in model.named_buffers() if n.endswith((".U", ".V"))]
    assert sum(b.nbytes for b in bases) == size


def test_an_adapter_that_is_not_active_is_not_calibrated() -> None:
    """The gradients would be those of the weights that another adapter has trained."""
    model, _ = trained_adapter("bert")
    model.add_adapter("new", SparseGradConfig())
    with pytest.raises(ValueError, match=r"'new' is not active, and 'default' would take part .*set_adapter\('new'\)"):
        calibrate_adapter(model, [tiny_batch("bert")], adapter_name="new", progress=False)
    model.set_adapter("new")
    calibrate_adapter(model, [tiny_batch("bert")], adapter_name="new", n_steps=1, progress=False)


def test_ready_statistics_stand_alone() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    ready = calibrate_adapter(model, [tiny_batch("bert")], n_steps=1, progress=False)
    with pytest.raises(ValueError, match=r"pass ready statistics \(calibration\) or batches, n_steps, found both"):
        calibrate_adapter(model, [tiny_batch("bert")], calibration=ready, n_steps=2)


@pytest.mark.parametrize("alone", [{"r": 16}, {"c": 0.25}])
def test_the_rows_of_one_side_alone_are_no_size(alone: dict[str, Any]) -> None:
    """`r=16` is what a user of LoRA would write."""
    with pytest.raises(ValueError, match=r"alone; expected c and r, .* trained_share"):
        SparseGradConfig(**alone)


def test_a_merged_model_is_not_calibrated() -> None:
    """Nothing would train: what is merged leaves the active adapters out of the forward pass."""
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged; call unmerge_adapter\(\) first"):
        calibrate_adapter(model, [tiny_batch("bert")], progress=False)
