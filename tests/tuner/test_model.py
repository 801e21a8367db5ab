"""Everything that users do with a PEFT adapter, done with a SparseGrad one; adapters are compared by logits."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors import safe_open

from helpers import (
    MLP_GROUPS,
    MLP_LINEARS,
    TINY_MODELS,
    logits,
    max_difference,
    tiny_batch,
    tiny_model,
    train_adapter,
    trained_adapter,
    tuner_layers,
)
from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups

KINDS = list(TINY_MODELS)


@pytest.mark.parametrize("kind", KINDS)
def test_life_of_an_adapter(kind: str, tmp_path: Path) -> None:
    """A no-op before and after calibration; learns; saves; loads onto a fresh base; merges; comes off again."""
    data = tiny_batch(kind)
    model, base = trained_adapter(kind, calibrated=False, trained=0, shared=True)
    before = logits(base, data)
    assert len(tuner_layers(model)) == MLP_LINEARS[kind]
    assert max_difference(logits(model, data), before) == 0
    calibrate_adapter(model, [data], n_steps=3, training=False, progress=False)
    assert max_difference(logits(model, data), before) == 0
    assert len({id(layer.sparsegrad_basis["default"]) for layer in tuner_layers(model)}) == MLP_GROUPS[kind]

    model, _ = trained_adapter(kind, shared=True)
    after = logits(model, data)
    assert max_difference(after, before) > 1e-4
    with model.disable_adapter():
        assert max_difference(logits(model, data), before) == 0
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sum("sparsegrad_S" in name for name in names) == MLP_LINEARS[kind]
    assert sum("sparsegrad_basis" in name for name in names) == 2 * MLP_GROUPS[kind]  # each basis once
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage).eval()
        assert max_difference(logits(loaded, data), after) == 0
        assert len({id(layer.sparsegrad_basis["default"]) for layer in tuner_layers(loaded)}) == MLP_GROUPS[kind]
    model.merge_adapter(safe_merge=True)
    assert max_difference(logits(model, data), after) < 1e-4
    model.unmerge_adapter()
    assert max_difference(logits(model, data), after) < 1e-4
    merged = model.merge_and_unload(safe_merge=True)
    assert max_difference(logits(merged, data), after) < 1e-4
    assert merged.state_dict().keys() == base.state_dict().keys()
    assert all(value.is_contiguous() for value in merged.state_dict().values())  # as safetensors needs them
    assert max_difference(logits(loaded.unload(), data), before) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("calibrated", [True, False])
def test_only_the_adapter_trains(kind: str, calibrated: bool) -> None:
    model, base = trained_adapter(kind, calibrated=calibrated, trained=2)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == MLP_LINEARS[kind]
    assert all("sparsegrad_S.default" in name for name in trained)
    count, _ = model.get_nb_trainable_parameters()
    assert count == sum(layer.sparsegrad_S["default"].numel() for layer in tuner_layers(model))
    for name, value in base.state_dict().items():
        assert any(torch.equal(value, other) for other in model.state_dict().values() if other.shape == value.shape), (
            name
        )


def test_several_adapters(tmp_path: Path) -> None:
    data = tiny_batch("bert")
    model, base = trained_adapter("bert")
    first = logits(model, data)
    model.add_adapter("other", SparseGradConfig(c=0.25, r=0.5, shared=False))
    model.set_adapter("other")
    assert max_difference(logits(model, data), logits(base, data)) == 0
    calibrate_adapter(model, [data], adapter_name="other", n_steps=2, training=False, progress=False)
    optimizer = SparseGradAdamW(param_groups(model), lr=0.05)
    assert (
        sum(len(group["params"]) for group in optimizer.param_groups) == MLP_LINEARS["bert"]
    )  # the active adapter's alone
    model(**data).loss.backward()
    optimizer.step()
    other = logits(model, data)
    assert max_difference(other, first) > 1e-4
    model.set_adapter("default")
    assert max_difference(logits(model, data), first) == 0
    mixed = logits(model, data, adapter_names=["default", "other", "__base__", "default"])
    expected = torch.stack([first[0], other[1], logits(base, data)[2], first[3]])
    assert max_difference(mixed, expected) < 1e-5
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(model, data, adapter_names=["default", "none", "other", "other"])
    model.base_model.set_adapter(["default", "other"])
    both = logits(model, data)
    assert max_difference(both, first) > 1e-4
    assert max_difference(both, other) > 1e-4
    model.merge_adapter(["default", "other"])
    assert max_difference(logits(model, data), both) < 1e-4
    model.unmerge_adapter()
    model.set_adapter("other")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "other"), adapter_name="again").eval()
    assert max_difference(logits(loaded, data), other) == 0
    loaded.load_adapter(str(tmp_path), "first")
    loaded.set_adapter("first")
    assert max_difference(logits(loaded, data), first) == 0
    with pytest.warns(UserWarning, match="Adapter first was active which is now deleted"):
        loaded.delete_adapter("first")
    assert loaded.active_adapters == ["again"]
    assert all(list(layer.sparsegrad_S) == list(layer.sparsegrad_basis) == ["again"] for layer in tuner_layers(loaded))
    assert max_difference(logits(loaded, data), other) == 0


def test_modules_to_save_and_auto_model(tmp_path: Path) -> None:
    """Sequence classification: the head trains and is saved with the adapter; the Auto class finds the base itself."""
    data = tiny_batch("bert")
    tiny_model("bert").save_pretrained(tmp_path / "base")
    base = type(tiny_model("bert")).from_pretrained(tmp_path / "base")
    model = get_peft_model(base, SparseGradConfig(task_type="SEQ_CLS", c=0.5, r=0.5))
    calibrate_adapter(model, [data], n_steps=2, progress=False)
    optimizer = SparseGradAdamW(param_groups(model, density=0.1), lr=0.02)
    assert [group["sparse"] for group in optimizer.param_groups] == [True, False]  # cores, and the head
    model(**data).loss.backward()
    optimizer.step()
    expected = logits(model.eval(), data)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter").eval()
    assert max_difference(logits(loaded, data), expected) == 0
    merged = loaded.merge_and_unload(safe_merge=True)
    assert max_difference(logits(merged, data), expected) < 1e-5
    assert not any("modules_to_save" in name for name in merged.state_dict())


def test_modules_to_save_that_have_no_weight_of_their_own() -> None:
    """BERT's pooler holds a linear layer; merging puts the trained one in its place."""
    data = tiny_batch("bert")
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.5, modules_to_save=["pooler", "classifier"]))
    calibrate_adapter(model, [data], n_steps=2, progress=False)
    before = logits(model, data)
    train_adapter(model, data, 3, 0.02)
    expected = logits(model.eval(), data)
    assert max_difference(expected, before) > 1e-3
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.bert.pooler).__name__ == "BertPooler"
    assert max_difference(logits(merged, data), expected) < 1e-5


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"target_modules": ["query", "value"]}, 6),
        ({"target_modules": r".*layer\.1\.intermediate\.dense"}, 1),
        ({"target_modules": "all-linear"}, 19),  # with attention and pooler, without the head
        ({"layers_to_transform": 0}, 2),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layer"}, 4),
        ({"exclude_modules": ["output.dense"]}, 3),
        ({"shared": True}, 6),
    ],
)
def test_choice_of_layers(options: dict[str, Any], layers: int) -> None:
    if "layers_to_transform" in options:  # PEFT takes lists of endings here, and no regular expressions
        both = ["intermediate.dense", "output.dense"]
        options = {**options, "target_modules": both, "exclude_modules": r".*attention.*"}
    base = tiny_model("bert")
    options = {"task_type": "SEQ_CLS", **options}
    model = get_peft_model(base, SparseGradConfig(c=0.5, r=0.5, **options))
    assert len(tuner_layers(model)) == layers
    calibrate_adapter(model, [tiny_batch("bert")], n_steps=1, progress=False)
    bases = {id(layer.sparsegrad_basis["default"]) for layer in tuner_layers(model)}
    assert len(bases) == (MLP_GROUPS["bert"] if "shared" in options else layers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_half_precision_base(dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    """Core and bases stay float32 on a half-precision base: a rounded basis would not be orthogonal any more."""
    model, _ = trained_adapter("llama")
    model.save_pretrained(tmp_path)
    data = tiny_batch("llama")
    loaded = PeftModel.from_pretrained(
        tiny_model("llama").to(dtype), str(tmp_path), is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    for mine, theirs in zip(tuner_layers(loaded), tuner_layers(model), strict=True):
        assert torch.equal(mine.sparsegrad_basis["default"].U, theirs.sparsegrad_basis["default"].U)
        assert mine.sparsegrad_S["default"].dtype == torch.float32
    assert max_difference(logits(loaded.eval(), data).float(), logits(model, data)) < 5e-2
    loaded.train()
    loaded(**data).loss.backward()
    assert all(layer.sparsegrad_S["default"].grad.dtype == torch.float32 for layer in tuner_layers(loaded))
    plain = get_peft_model(tiny_model("llama").to(dtype), SparseGradConfig(), autocast_adapter_dtype=False)
    assert all(layer.sparsegrad_S["default"].dtype == dtype for layer in tuner_layers(plain))
    assert torch.isfinite(logits(plain, data)).all()


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(kind: str, reentrant: bool) -> None:
    data = tiny_batch(kind)
    gradients = []
    for checkpointing in (False, True):
        model, _ = trained_adapter(kind)
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**data, **({"use_cache": False} if kind != "bert" else {})).loss.backward()
        gradients.append([layer.sparsegrad_S["default"].grad for layer in tuner_layers(model)])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)


def test_hooks_of_the_base_layer_are_called() -> None:
    """The one-product path goes around the base layer's forward; a hook there must still be heard."""
    model, _ = trained_adapter("bert")
    expected, heard = logits(model, tiny_batch("bert")), []
    layer = tuner_layers(model)[0]
    layer.base_layer.register_forward_hook(lambda *_: heard.append(1))
    assert max_difference(logits(model, tiny_batch("bert")), expected) < 1e-5
    assert heard == [1]


def test_convert_to_lora_at_full_rank() -> None:
    """PEFT's own conversion takes the update of each layer, so servers that know LoRA alone can serve it."""
    model, _ = trained_adapter("bert", target_modules=r".*layer\.\d+\.(intermediate|output)\.dense")
    data = tiny_batch("bert")
    expected = logits(model, data)
    config, weights = convert_to_lora(model, 16)
    assert isinstance(config, LoraConfig)
    lora = get_peft_model(tiny_model("bert"), config).eval()
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(lora, weights)
    assert max_difference(logits(lora, data), expected) < 1e-4


def test_calibration_refuses() -> None:
    model, base = trained_adapter("bert", trained=1)
    with pytest.raises(ValueError, match=r"adapter 'default' has already learnt something \(6 of 6 layers"):
        calibrate_adapter(model, [tiny_batch("bert")], n_steps=1)
    with pytest.raises(ValueError, match="no SparseGrad adapter named 'other'"):
        calibrate_adapter(model, [tiny_batch("bert")], adapter_name="other")
    with pytest.raises(ValueError, match="no SparseGrad adapter named 'default'; make one with get_peft_model"):
        calibrate_adapter(base, [tiny_batch("bert")])


def test_ready_statistics() -> None:
    """What one adapter's calibration returned calibrates another, without a batch."""
    model, _ = trained_adapter("bert", calibrated=False, trained=0)
    statistics = calibrate_adapter(model, [tiny_batch("bert")], n_steps=2, progress=False)
    twin, _ = trained_adapter("bert", calibrated=False, trained=0, c=0.25)
    assert calibrate_adapter(twin, calibration=statistics) is statistics
    for mine, theirs in zip(tuner_layers(twin), tuner_layers(model), strict=True):
        U = mine.sparsegrad_basis["default"].U
        assert torch.equal(U, theirs.sparsegrad_basis["default"].U[: len(U)])
    other, _ = trained_adapter("llama", calibrated=False, trained=0)
    with pytest.raises(ValueError, match="the statistics are of other layers than the adapter's: in group"):
        calibrate_adapter(other, calibration=statistics)


def test_adapter_of_another_model(tmp_path: Path) -> None:
    model, _ = trained_adapter("bert", target_modules=r".*layer\.\d+\.(intermediate|output)\.dense")
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"] = ["query"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"made for bert.encoder.layer.0.intermediate.dense, .* not for .*query"):
        PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"c": 0}, 'c: expected "full", a count of at least 1, .*; found 0'),
        ({"r": 2.0}, "r: expected .* a fraction in"),
        ({"c": "half"}, "c: expected .* found 'half'"),
        ({"prefer": "disk"}, 'prefer must be "memory" or "speed", found \'disk\''),
        ({"basis_dtype": "int8"}, "basis_dtype must be one of bfloat16, float32, float64, or None; found 'int8'"),
        ({"layers_pattern": "layer"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_bad_config(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SparseGradConfig(**options)


def test_a_fresh_process_loads_after_the_import(tmp_path: Path) -> None:
    data = tiny_batch("bert")
    model, base = trained_adapter("bert")
    base.save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"data": data, "logits": logits(model, data)}, tmp_path / "expected.pt")
    script = f"""
import torch
import sparsegrad_peft.tuner
from peft import PeftModel
from transformers import BertForSequenceClassification
base = BertForSequenceClassification.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "adapter")!r}).eval()
expected = torch.load({str(tmp_path / "expected.pt")!r})
with torch.no_grad():
    assert torch.allclose(model(**expected["data"]).logits, expected["logits"], atol=1e-6)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pickle_and_copy(tmp_path: Path) -> None:
    model, _ = trained_adapter("bert", shared=True)
    data = tiny_batch("bert")
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for twin in (loaded, copy.deepcopy(model)):
        assert max_difference(logits(twin, data), logits(model, data)) == 0
        assert len({id(layer.sparsegrad_basis["default"]) for layer in tuner_layers(twin)}) == MLP_GROUPS["bert"]


def test_a_forward_put_on_the_layer_itself_is_kept() -> None:
    model = tiny_model("bert")
    wanted = model(**tiny_batch("bert")).logits
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    changed = model(**tiny_batch("bert")).logits
    assert not torch.allclose(changed, wanted)
    torch.testing.assert_close(get_peft_model(model, SparseGradConfig())(**tiny_batch("bert")).logits, changed)


def test_nothing_is_merged_into_a_computed_weight() -> None:
    model = tiny_model("bert")
    layer = model.get_submodule("bert.encoder.layer.0.intermediate.dense")
    torch.nn.utils.parametrizations.weight_norm(layer)
    adapted = get_peft_model(model, SparseGradConfig(target_modules=["layer.0.intermediate.dense"]))
    with pytest.raises(TypeError, match="computes its weight"):
        adapted.merge_and_unload()


def test_the_saved_card_says_what_to_import(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    for _ in range(2):
        model.save_pretrained(str(tmp_path))
        card = (tmp_path / "README.md").read_text(encoding="utf-8")
        assert card.startswith("---")
        assert "library_name: peft" in card
        assert card.count("Import `sparsegrad_peft.tuner`") == 1
