"""The default form, neurons on the wide side and scaled steps, through every verb of PEFT."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from helpers import cores, logits, max_difference, tiny_batch, tiny_model, train_adapter, trained_adapter, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter, export_lora, refresh_adapter
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.sides import as_matrix
from sparsegrad_peft.tuner.peft_private import PREFIX

KINDS = ["bert", "llama", "gpt2", "t5", "vit"]
DEFAULT: dict[str, Any] = {"c": None, "r": None, "narrow": 4, "wide": 6}


def default(kind: str, **options: Any) -> tuple[PeftModel, torch.nn.Module]:
    return trained_adapter(kind, **{**DEFAULT, **options})


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_the_reference_s(kind: str) -> None:
    model, _ = default(kind)
    for layer in tuner_layers(model):
        S, basis = layer.core_and_basis("default")
        U, V = as_matrix(basis.U, layer.in_features, S.dtype), as_matrix(basis.V, layer.out_features, S.dtype)
        expected = reference.scaled_update(S, U, V, basis.scale_in, basis.scale_out)
        found = layer.get_delta_weight("default")
        torch.testing.assert_close(found.T if kind == "gpt2" else found, expected, atol=1e-6, rtol=1e-4)
        wide, narrow = (basis.V, basis.U) if layer.in_features < layer.out_features else (basis.U, basis.V)
        assert wide.shape == (6,)
        assert not wide.is_floating_point()
        assert narrow.shape == (4, min(layer.in_features, layer.out_features))


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_merged_and_unloaded(kind: str, tmp_path: Path) -> None:
    model, base = default(kind)
    data = tiny_batch(kind)
    expected = logits(model, data)
    assert max_difference(expected, logits(base, data)) > 1e-4
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
        assert max_difference(logits(loaded.eval(), data), expected) == 0
    assert max_difference(logits(loaded.merge_and_unload(), data), expected) < 1e-5
    model.merge_adapter()
    model.unmerge_adapter()
    assert max_difference(logits(model, data), expected) < 1e-5
    with model.disable_adapter():
        assert max_difference(logits(model, data), logits(base, data)) < 1e-5


def test_the_file_holds_indices_of_neurons(tmp_path: Path) -> None:
    """A wide side takes 4 bytes a neuron, and a scale 4 bytes a row."""
    model, _ = default("llama", modules_to_save=None)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sizes = {name.rpartition(".")[2]: tensor.nbytes for name, tensor in tensors.items() if "layers.0.mlp.up" in name}
    assert sizes == {"U": 4 * 16 * 2, "V": 6 * 4, "scale_in": 4 * 4, "scale_out": 6 * 4, f"{PREFIX}S": 4 * 6 * 4}


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("V", lambda t: t.fill_(0), "distinct"),
        ("V", lambda t: t.add_(1000), "another model|range"),
        ("V", lambda t: t.neg_(), "distinct"),
        ("scale_in", lambda t: t.fill_(torch.nan), "positive, finite"),
        ("scale_out", lambda t: t.zero_(), "positive, finite"),
    ],
)
def test_damaged_files_are_refused(name: str, damage: Any, message: str, tmp_path: Path) -> None:
    model, base = default("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if "up_proj" in key and key.endswith(f".{name}"))
    damage(tensors[key])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises((ValueError, RuntimeError), match=message):
        logits(PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)), tiny_batch("llama"))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_exported_as_lora(kind: str, tmp_path: Path) -> None:
    model, base = default(kind)
    model.save_pretrained(tmp_path / "ours")
    export_lora(tmp_path / "ours", tmp_path / "lora", "full", fan_in_fan_out=kind == "gpt2")
    lora = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    assert max_difference(logits(lora, tiny_batch(kind)), logits(model, tiny_batch(kind))) < 1e-4


def test_summed() -> None:
    model, _ = default("bert")
    data = tiny_batch("bert")
    alone = logits(model, data)
    model.base_model.add_weighted_adapter(["default", "default"], [0.25, 0.75], "linear", combination_type="linear")
    model.base_model.add_weighted_adapter(["default", "default"], [0.25, 0.75], "cat", combination_type="cat")
    for name in ("linear", "cat"):
        model.set_adapter(name)
        assert max_difference(logits(model, data), alone) < 1e-4, name
    assert model.peft_config["linear"].neurons
    assert model.peft_config["cat"].neurons


def test_mixed_in_a_batch() -> None:
    model, base = default("bert")
    data = {name: value for name, value in tiny_batch("bert").items() if name != "labels"}
    expected, plain = logits(model, data), logits(base, data)
    mixed = logits(model, data, adapter_names=["default", "__base__", "default", "__base__"])
    assert max_difference(mixed[::2], expected[::2]) < 1e-5
    assert max_difference(mixed[1::2], plain[1::2]) < 1e-5


def test_before_calibration_it_is_a_no_op_that_trains(tmp_path: Path) -> None:
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**DEFAULT))
    assert max_difference(logits(model, tiny_batch("llama")), logits(base, tiny_batch("llama"))) == 0
    neurons = tuner_layers(model)[0].core_and_basis("default")[1].V
    assert neurons.tolist() == sorted(set(neurons.tolist()))
    model.train()
    with pytest.warns(UserWarning, match="was not calibrated"):
        train_adapter(model, tiny_batch("llama"))
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert max_difference(logits(loaded, tiny_batch("llama")), logits(model, tiny_batch("llama"))) == 0


def test_weights_of_another_form_are_taken_by_a_new_adapter(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trainer resumes into an adapter that the script has just made, perhaps with the defaults of a later version.

    What is saved then loads again, and the log says what the script asked for in vain.
    """
    from peft import set_peft_model_state_dict

    plain = {**DEFAULT, "exponent": 0.0}
    for options, given, words in (
        (DEFAULT, {}, "cores of shape"),
        ({**DEFAULT, "neurons": False}, {}, "neurons=True"),
        (plain, {}, "exponent=1.5"),
        (DEFAULT, {"exponent": 0.0}, "exponent=0.0"),
        (DEFAULT, {"c": 0.5, "r": 0.5}, "neurons=False, exponent=0.0"),
        (DEFAULT, {"narrow": 2}, "These settings have no effect: cores of shape"),
    ):
        caplog.clear()
        model, base = trained_adapter("llama", **options)
        model.save_pretrained(tmp_path)
        fresh = get_peft_model(copy.deepcopy(base), SparseGradConfig(**given)).eval()
        set_peft_model_state_dict(fresh, load_file(tmp_path / "adapter_model.safetensors"))
        assert max_difference(logits(fresh, tiny_batch("llama")), logits(model, tiny_batch("llama"))) == 0
        assert words in caplog.text
        fresh.save_pretrained(tmp_path / "again")
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "again")).eval()
        assert max_difference(logits(again, tiny_batch("llama")), logits(model, tiny_batch("llama"))) == 0


def test_refreshed_where_complete() -> None:
    model, _ = trained_adapter("llama", **{**DEFAULT, "narrow": "full", "wide": "full"})
    expected = logits(model, tiny_batch("llama"))
    refresh_adapter(model, [tiny_batch("llama")], n_steps=2, progress=False)
    assert max_difference(logits(model, tiny_batch("llama")), expected) < 1e-4
    truncated, _ = default("llama")
    with pytest.raises(ValueError, match="truncated bases"):
        refresh_adapter(truncated, [tiny_batch("llama")], n_steps=2, progress=False)


def test_the_configuration_s_form() -> None:
    """Neurons and scales by default; the paper's form where c and r are given; no neurons in shared bases."""
    config = SparseGradConfig()
    assert (config.neurons, config.exponent) == (True, 1.5)
    for plain in (SparseGradConfig(c=0.5, r=0.5), SparseGradConfig.paper(), SparseGradConfig(original_space=True)):
        assert (plain.neurons, plain.exponent) == (False, 0.0)
    shared = SparseGradConfig(shared=True)
    assert (shared.neurons, shared.exponent) == (False, 1.5)
    with pytest.raises(ValueError, match="nothing in common"):
        SparseGradConfig(shared=True, neurons=True)
    for options in ({"exponent": -1.0}, {"exponent": 3.0}, {"trained_share": 0.0}, {"trained_share": 2.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SparseGradConfig(**options)


def test_a_share_of_the_entries_trains() -> None:
    model = get_peft_model(tiny_model("llama"), SparseGradConfig(trained_share=0.1))
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=3, progress=False)
    layers, trained = tuner_layers(model), sum(core.numel() for core in cores(model))
    assert trained == pytest.approx(0.1 * sum(layer.in_features * layer.out_features for layer in layers), rel=0.2)


def test_too_few_directions_for_the_share_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """All neurons with one direction are not half of the entries."""
    get_peft_model(tiny_model("llama"), SparseGradConfig(narrow=1, trained_share=0.5))
    assert "narrow=1 trains 0.0" in caplog.text
    caplog.clear()
    get_peft_model(tiny_model("llama"), SparseGradConfig(narrow=4, trained_share=0.1))
    assert "trained_share" not in caplog.text


def test_sizes_of_two_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="found c=8 and r=8 beside narrow=4 and wide=None; expected one of the two"):
        SparseGradConfig(c=8, r=8, narrow=4)


def test_counts_as_large_as_the_layers_are_complete() -> None:
    counted, named = (
        get_peft_model(tiny_model("llama"), SparseGradConfig(neurons=False, **sizes)).peft_config["default"]
        for sizes in ({"narrow": 16, "wide": "full"}, {"c": "full", "r": "full"})
    )
    assert [shape[1:] for shape in counted.core_shapes.values()] == [shape[1:] for shape in named.core_shapes.values()]
    assert counted.complete
    assert counted.dtype_of_bases == named.dtype_of_bases == torch.float32


@pytest.mark.parametrize("name", ["neurons", "shared", "original_space", "init_weights"])
def test_a_text_is_no_yes_or_no(name: str) -> None:
    """Any text is true, also "no"."""
    with pytest.raises(TypeError, match=f"{name} must be True or False, found 'no'"):
        SparseGradConfig(**{name: "no"})


@pytest.mark.parametrize("name", ["trained_share", "exponent"])
def test_a_number_given_as_text_is_refused_by_name(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number, found '1%'"):
        SparseGradConfig(**{name: "1%"})
