"""An adapter before calibration: it has its size and data-free bases, trains, saves, loads and merges."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from helpers import (
    MLP_LINEARS,
    TINY_MODELS,
    cores,
    logits,
    max_difference,
    tiny_batch,
    tiny_model,
    train_adapter,
    trained_adapter,
    tuner_layers,
    uncalibrated_adapter,
)
from sparsegrad_peft import SparseGradConfig, calibrate_adapter

IGNORED = pytest.mark.filterwarnings("ignore:adapter .* was not calibrated:UserWarning")


def count(model: PeftModel) -> int:
    return int(model.get_nb_trainable_parameters()[0])


def warned(model: nn.Module, steps: int = 2) -> list[str]:
    """Warnings of some forward passes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            model(**tiny_batch("bert"))
    return [str(w.message) for w in caught if w.category is UserWarning]


def test_size_of_a_new_adapter() -> None:
    """Two blocks of hidden size 64 and inner size 160: 1,800 entries, of 165,120 in the whole weights."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "vocab_size": 60}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model = get_peft_model(base, SparseGradConfig())
    before = count(model)
    whole = sum(layer.in_features * layer.out_features for layer in tuner_layers(model))
    assert before == sum(core.numel() for core in cores(model))
    assert before < 0.02 * whole
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=1, progress=False)
    assert count(model) == before


@IGNORED
@pytest.mark.parametrize("kind", list(TINY_MODELS))
@pytest.mark.parametrize("options", [{}, {"c": 0.5, "r": "full"}, {"c": "full", "r": "full"}])
def test_life_without_calibration(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    data, base = tiny_batch(kind), tiny_model(kind)
    before = logits(base, data)
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**options))
    assert max_difference(logits(model, data), before) == 0
    assert not model.peft_config["default"].calibrated
    train_adapter(model.train(), data)
    after = logits(model.eval(), data)
    assert max_difference(after, before) > 1e-5
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert max_difference(logits(loaded, data), after) == 0
        assert not loaded.peft_config["default"].calibrated
    resumed = get_peft_model(tiny_model(kind), SparseGradConfig(**options))
    resumed.load_adapter(str(tmp_path), "default")
    assert max_difference(logits(resumed.eval(), data), after) == 0
    assert not resumed.peft_config["default"].calibrated
    assert max_difference(logits(model.merge_and_unload(safe_merge=True), data), after) < 1e-4


def test_transformers_loads_it(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), SparseGradConfig(init_weights=False)).eval()
    model.save_pretrained(tmp_path)
    plain = tiny_model("llama")
    plain.load_adapter(str(tmp_path))
    assert max_difference(logits(plain.eval(), tiny_batch("llama")), logits(model, tiny_batch("llama"))) == 0


def test_all_adapters_of_a_size_share_their_bases() -> None:
    model = get_peft_model(tiny_model("llama"), SparseGradConfig())
    shapes = {(layer.out_features, layer.in_features) for layer in tuner_layers(model)}
    assert len({id(layer.core_and_basis("default")[1]) for layer in tuner_layers(model)}) == len(shapes) == 2


@IGNORED
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("narrow", [0.5, "energy:0.99"])
def test_an_optimizer_from_before_calibration_stays_right(low_cpu_mem_usage: bool, narrow: float | str) -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(narrow=narrow), low_cpu_mem_usage=low_cpu_mem_usage)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    if not low_cpu_mem_usage:
        model(**tiny_batch("bert")).loss.backward()  # a graph that is still alive, of the size before
    before, shapes = cores(model), [core.shape for core in cores(model)]
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=4, progress=False)
    assert all(core is old for core, old in zip(cores(model), before, strict=True))
    optimizer.zero_grad()
    model(**tiny_batch("bert")).loss.backward()
    optimizer.step()
    assert all(bool(core.any()) for core in cores(model))
    assert ([core.shape for core in cores(model)] != shapes) is (narrow == "energy:0.99")


def test_without_memory_it_is_neither_saved_nor_merged(tmp_path: Path) -> None:
    model = uncalibrated_adapter(low_cpu_mem_usage=True)
    for use in (lambda: model.save_pretrained(tmp_path), model.merge_adapter):
        with pytest.raises(RuntimeError, match="was made with low_cpu_mem_usage=True and has no core yet"):
            use()


def test_training_without_calibration_warns_once_for_each_adapter() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig()).train()
    (message,) = warned(model)  # of six layers, in two steps
    assert "adapter 'default' was not calibrated" in message
    assert "calibrate_adapter(model, batches)" in message
    assert not warned(model)
    model.add_adapter("other", SparseGradConfig())
    assert not warned(model)  # not active
    model.set_adapter("other")
    (message,) = warned(model)
    assert "adapter 'other'" in message
    assert not warned(copy.deepcopy(model))


def test_while_an_adapter_is_calibrated_there_is_no_warning_of_another() -> None:
    """Also where the other is in layers of its own. The warning comes when it trains."""
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(layers_to_transform=[0, 1])).train()
    model.add_adapter("other", SparseGradConfig(layers_to_transform=[1, 2]))
    model.base_model.set_adapter(["default", "other"])
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=1, progress=False)  # a warning is an error here
    (message,) = warned(model)
    assert "adapter 'other' was not calibrated" in message


def test_what_does_not_train_without_calibration_is_silent() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    assert not warned(model)  # the base is in eval mode, and so are the layers put into it
    with torch.no_grad():
        assert not warned(model.train())
    model.requires_grad_(False)
    assert not warned(model)
    assert not warned(get_peft_model(tiny_model("bert"), SparseGradConfig(original_space=True)).train())
    assert not warned(trained_adapter("bert")[0].train())
    assert len(warned(get_peft_model(tiny_model("bert"), SparseGradConfig()).train())) == 1


def test_sizes_that_do_not_fit_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"c, layer bert.encoder.layer.0.intermediate.dense: .* a count from 1 to 16"):
        get_peft_model(tiny_model("bert"), SparseGradConfig(c=17, r=4))


def test_a_file_of_an_early_version_without_calibration(tmp_path: Path) -> None:
    """Such an adapter has whole cores, no bases, and `core_shapes: {}` in its configuration."""
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(original_space=True, init_weights=False)).eval()
    expected = logits(model, tiny_batch("bert"))
    model.save_pretrained(tmp_path)
    config = SparseGradConfig.from_pretrained(tmp_path).to_dict()
    config = {key: value for key, value in config.items() if key != "data_free"} | {"core_shapes": {}}
    SparseGradConfig(**(config | {"original_space": False})).save_pretrained(str(tmp_path))
    text = (tmp_path / "adapter_config.json").read_text().replace('"core_shapes": null', '"core_shapes": {}')
    (tmp_path / "adapter_config.json").write_text(text.replace('"full"', "null"))
    loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path).eval()
    assert max_difference(logits(loaded, tiny_batch("bert")), expected) == 0
    assert len(cores(loaded)) == MLP_LINEARS["bert"]
    plain = tiny_model("bert")
    plain.load_adapter(str(tmp_path))
    assert max_difference(logits(plain.eval(), tiny_batch("bert")), expected) == 0
