"""Layers of one group on several devices (`device_map`).

The second device is "meta", the one that every machine has beside its CPU: it has no numbers, but each operation checks
shapes and devices.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from helpers import cores, logits, max_difference, tiny_batch, tiny_model, trained_adapter, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter

CPU, OTHER = torch.device("cpu"), torch.device("meta")


def split(model: nn.Module, first: int) -> None:
    """The blocks from number `first` on are elsewhere, as accelerate's `dispatch_model` would have them."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    for block in layers[first:]:
        block.to(OTHER)


def run_blocks(model: PeftModel, first: int) -> None:
    """The MLPs forward and backward, on each device by itself: nothing comes back from "meta"."""
    blocks = [block.get_submodule("mlp") for block in model.get_submodule("base_model.model.model.layers").children()]
    for part, device in ((blocks[:first], CPU), (blocks[first:], OTHER)):
        x = torch.randn(2, 3, 16, device=device, requires_grad=True)
        nn.Sequential(*part)(x).sum().backward()


@pytest.mark.parametrize("first", [1, 2])
def test_each_device_has_its_bases(first: int) -> None:
    """Three blocks, up- and gate-projections of all of them in one group, down-projections in another."""
    made = get_peft_model(tiny_model("llama"), SparseGradConfig(c=0.5, r=0.25, shared=True))
    calibration = calibrate_adapter(made, [tiny_batch("llama")], n_steps=3, progress=False)
    expected = [layer.sparsegrad_basis["default"] for layer in tuner_layers(made)]

    base = tiny_model("llama")
    split(base, first)
    model = get_peft_model(base, SparseGradConfig(c=0.5, r=0.25, shared=True))
    calibrate_adapter(model, calibration=calibration, progress=False)
    layers = tuner_layers(model)
    for number, (layer, basis, core) in enumerate(zip(layers, expected, cores(model), strict=True)):
        here, device = layer.sparsegrad_basis["default"], CPU if number // 3 < first else OTHER
        assert core.device == here.U.device == here.V.device == device
        if device == CPU:
            assert torch.equal(here.U, basis.U)
            assert torch.equal(here.V, basis.V)
    bases = {id(layer.sparsegrad_basis["default"]) for layer in layers}
    assert len(bases) == 2 * len({id(basis) for basis in expected})  # one for each device, not for each layer

    run_blocks(model.train(), first)
    assert all(core.grad is not None and core.grad.device == core.device for core in cores(model))


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")  # of "meta" alone
def test_loading_onto_several_devices(tmp_path: Path) -> None:
    whole, _ = trained_adapter("llama", shared=True)
    whole.save_pretrained(tmp_path)
    base = tiny_model("llama")
    expected = logits(PeftModel.from_pretrained(base, str(tmp_path)).eval(), tiny_batch("llama"))
    assert max_difference(expected, logits(tiny_model("llama"), tiny_batch("llama"))) > 1e-3

    base = tiny_model("llama")
    split(base, 2)
    model = PeftModel.from_pretrained(base, str(tmp_path))
    for number, (layer, trained) in enumerate(zip(tuner_layers(model), tuner_layers(whole), strict=True)):
        core, basis = layer.core_and_basis("default")
        assert core.device == (CPU if number < 6 else OTHER)
        if number < 6:
            assert torch.equal(core, trained.sparsegrad_S["default"])
            assert torch.equal(basis.U, trained.core_and_basis("default")[1].U)
            assert torch.equal(basis.V, trained.core_and_basis("default")[1].V)
