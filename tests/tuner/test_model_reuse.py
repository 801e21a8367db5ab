"""Configs and models that are used in ways PEFT allows: a config twice, a compiled model, a second adapter."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import compile_regions
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers import logits, tiny_batch, tiny_model, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter


def calibrated(config: SparseGradConfig) -> PeftModel:
    model = get_peft_model(tiny_model("bert"), config)
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=2, progress=False)
    return model


def bases_of(model: nn.Module) -> list[Tensor]:
    bases = [layer.core_and_basis("default")[1] for layer in tuner_layers(model)]
    return [side for basis in bases for side in (basis.U, basis.V) if side is not None]


def test_a_config_makes_several_adapters() -> None:
    """As in a loop over seeds; calibration must not leave its mark on the user's object."""
    config = SparseGradConfig()
    first = calibrated(config)
    assert not config.calibrated
    assert first.peft_config["default"].calibrated
    second = get_peft_model(tiny_model("bert"), config)
    assert not second.peft_config["default"].calibrated
    calibrate_adapter(second, [tiny_batch("bert")], n_steps=2, progress=False)
    assert bases_of(second)
    assert all(bool(basis.any()) for basis in bases_of(second) if basis.is_floating_point())


@pytest.mark.parametrize("options", [{}, {"inference_mode": True}, {"inference_mode": True, "original_space": True}])
def test_a_config_is_left_as_it_is(options: dict[str, Any]) -> None:
    config = SparseGradConfig(**options)
    before = config.to_dict()
    for kind in ("bert", "llama"):
        with torch.no_grad():
            get_peft_model(tiny_model(kind), config)(**tiny_batch(kind))
    assert config.to_dict() == before


def test_a_compiled_model_is_calibrated(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.compile(get_peft_model(tiny_model("bert"), SparseGradConfig()), backend="eager")
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=2, progress=False)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    assert [name for name in again.peft_config["default"].core_shapes if "_orig_mod" in name] == []


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("compiled", ["base", "adapter"])
def test_compiled_regions_leave_no_mark_on_the_adapter(compiled: str, tmp_path: Path) -> None:
    """Each block is wrapped, which puts `_orig_mod` into the names of its layers."""
    data, base = tiny_batch("llama"), tiny_model("llama")
    model = get_peft_model(compile_regions(base, backend="eager") if compiled == "base" else base, SparseGradConfig())
    if compiled == "adapter":
        model = compile_regions(model, backend="eager")
    calibrate_adapter(model, [data], n_steps=2, progress=False)
    for layer in tuner_layers(model):
        nn.init.normal_(layer.sparsegrad_S["default"])
    try:
        expected = logits(model.eval(), data)
    finally:
        torch._dynamo.reset()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval(), data), expected)
    assert not [name for name in model.peft_config["default"].core_shapes if "_orig_mod" in name]
    # The library once wrote these names. And a file is loaded into compiled regions too.
    old = {
        key.replace("layers.0.", "layers.0._orig_mod."): value
        for key, value in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    shapes = {name.replace("layers.0.", "layers.0._orig_mod."): shape for name, shape in config["core_shapes"].items()}
    save_file(old, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"core_shapes": shapes}), "utf-8")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path).eval(), data), expected)
    again = compile_regions(get_peft_model(tiny_model("llama"), SparseGradConfig()), backend="eager")
    again.load_adapter(str(tmp_path), "default")
    found = torch.stack([layer.get_delta_weight("default").sum() for layer in tuner_layers(again)])
    assert torch.equal(found, torch.stack([layer.get_delta_weight("default").sum() for layer in tuner_layers(model)]))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_second_adapter_on_layers_found_by_structure() -> None:
    model = get_peft_model(Blocks(), SparseGradConfig())
    model.add_adapter("two", SparseGradConfig())
    assert model.peft_config["two"].target_modules == model.peft_config["default"].target_modules
    assert set(model.peft_config["two"].target_modules) == {
        f"blocks.{n}.{name}" for n in (0, 1) for name in ("up", "down")
    }


def test_an_expert_without_tokens() -> None:
    model = calibrated(SparseGradConfig()).eval()
    layer = model.base_model.model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        for shape in ((0, layer.in_features), (2, 0, layer.in_features)):
            assert layer(torch.zeros(shape)).shape == (*shape[:-1], layer.out_features)


@pytest.mark.parametrize("config", [SparseGradConfig(target_modules=["linear1", "linear2"]), SparseGradConfig()])
def test_encoder_layers_of_pytorch(config: SparseGradConfig) -> None:
    """In eval mode they read the weights of their layers, unless they are told not to."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), nn.Linear(16, 1))
    model = get_peft_model(base, config)
    x = torch.randn(3, 5, 16)
    calibrate_adapter(model, [x], n_steps=2, loss_fn=lambda m, x: m(x).square().mean(), progress=False)
    for name, parameter in model.named_parameters():
        if "sparsegrad_S" in name:
            nn.init.normal_(parameter)
    expected = model.train()(x)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), expected)


def test_a_layer_that_is_never_called_is_refused() -> None:
    base = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    with pytest.raises(TypeError, match="MultiheadAttention reads its weight and never calls it"):
        get_peft_model(base, SparseGradConfig(target_modules=["out_proj"]))
    get_peft_model(base, LoraConfig(target_modules=["linear1"]))  # nothing of ours is in the model


def test_a_deleted_adapter_leaves_nothing(tmp_path: Path) -> None:
    calibrated(SparseGradConfig(task_type="SEQ_CLS")).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("bert"), tmp_path)
    layer = tuner_layers(model)[0]
    with torch.no_grad():
        model.eval()(**{name: value[:1] for name, value in tiny_batch("bert").items()})
    basis = weakref.ref(layer.core_and_basis("default")[1])
    model.delete_adapter("default")
    gc.collect()
    assert basis() is None


def test_a_copy_of_an_adapter_has_its_head_and_tokens() -> None:
    """PEFT makes both anew."""
    model = calibrated(SparseGradConfig(task_type="SEQ_CLS", trainable_token_indices=[1, 2]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default" in name:
                parameter.normal_()
    expected = logits(model.eval(), tiny_batch("bert"))
    model.add_adapter("twin", model.peft_config["default"])
    assert torch.equal(logits(model, tiny_batch("bert")), expected)
    model.set_adapter("twin")
    assert torch.equal(logits(model.eval(), tiny_batch("bert")), expected)
    model.delete_adapter("default")
    assert torch.equal(logits(model, tiny_batch("bert")), expected)
