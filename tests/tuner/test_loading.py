"""Weights loaded into an adapter that is there already, as a Trainer that resumes does; and weights that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from helpers import (
    MLP_GROUPS,
    TINY_MODELS,
    cores,
    logits,
    max_difference,
    tiny_batch,
    tiny_model,
    train_adapter,
    trained_adapter,
    tuner_layers,
)
from sparsegrad_peft import SparseGradConfig, calibrate_adapter
from sparsegrad_peft.method.sizes import Sizes


def small_bert(**sizes: int) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, **sizes}
    torch.manual_seed(0)
    return BertForSequenceClassification(
        BertConfig(vocab_size=60, num_attention_heads=2, max_position_embeddings=16, **sizes)
    ).eval()


@pytest.mark.parametrize("kind", list(TINY_MODELS))
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_calibrated_weights_into_an_uncalibrated_adapter(
    kind: str, shared: bool, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    model, _ = trained_adapter(kind, shared=shared)
    data = tiny_batch(kind)
    model.save_pretrained(tmp_path)
    # What the script would have calibrated, had it not been resumed, is of another size.
    fresh = get_peft_model(tiny_model(kind), SparseGradConfig(shared=shared), low_cpu_mem_usage=low_cpu_mem_usage)
    result = fresh.load_adapter(str(tmp_path), "default", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert max_difference(logits(fresh.eval(), data), logits(model, data)) == 0
    assert fresh.peft_config["default"].core_shapes == model.peft_config["default"].core_shapes
    count = MLP_GROUPS[kind] if shared else len(tuner_layers(model))
    assert len({id(layer.sparsegrad_basis["default"]) for layer in tuner_layers(fresh)}) == count
    assert all(core.requires_grad for core in cores(fresh))
    with pytest.raises(ValueError, match="already learnt something"):
        calibrate_adapter(fresh, [data])
    train_adapter(fresh, data, 2)
    train_adapter(model, data, 2)
    assert max_difference(logits(fresh, data), logits(model, data)) == 0
    fresh.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "again")).eval()
    assert max_difference(logits(again, data), logits(fresh, data)) == 0


def test_weights_of_another_name_and_without_a_peft_model() -> None:
    model, _ = trained_adapter("bert")
    weights = get_peft_model_state_dict(model)
    data = tiny_batch("bert")
    fresh = get_peft_model(tiny_model("bert"), SparseGradConfig(), adapter_name="mine").eval()
    set_peft_model_state_dict(fresh, weights, adapter_name="mine")
    assert max_difference(logits(fresh, data), logits(model, data)) == 0
    injected = tiny_model("bert")
    injected.add_adapter(SparseGradConfig(), adapter_name="mine")
    set_peft_model_state_dict(injected.eval(), weights, adapter_name="mine")
    assert max_difference(logits(injected, data), logits(model, data)) == 0


def trainer(folder: Path, *, calibrated: bool) -> Trainer:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.5, task_type="SEQ_CLS"))
    rows = tiny_batch("bert", 24)
    if calibrated:
        calibrate_adapter(model, [rows], n_steps=2, progress=False)
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, save_steps=3,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, logging_steps=3,
    )  # fmt: skip
    dataset: Any = [{key: value[i] for key, value in rows.items()} for i in range(24)]
    return Trainer(model=model, args=arguments, train_dataset=dataset)


def test_a_trainer_resumes_into_the_adapter_that_the_script_makes(tmp_path: Path) -> None:
    """No calibration in the second run: the bases come with the checkpoint."""
    straight = trainer(tmp_path / "straight", calibrated=True)
    straight.train()
    resumed = trainer(tmp_path / "resumed", calibrated=False)
    resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    data = tiny_batch("bert")
    expected = logits(straight.model.eval(), data)
    at_checkpoint = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "straight" / "checkpoint-3")).eval()
    assert max_difference(logits(at_checkpoint, data), expected) > 1e-4  # the steps after it count
    assert max_difference(logits(resumed.model.eval(), data), expected) == 0


def test_uncalibrated_weights_into_a_calibrated_adapter(tmp_path: Path) -> None:
    model, _ = trained_adapter("bert", calibrated=False)
    model.save_pretrained(tmp_path)
    calibrated, _ = trained_adapter("bert")
    before = logits(calibrated, tiny_batch("bert"))
    with pytest.raises(ValueError, match=r"'default' is calibrated, the weights are of one that is not.*another name"):
        calibrated.load_adapter(str(tmp_path), "default")
    assert max_difference(logits(calibrated, tiny_batch("bert")), before) == 0
    calibrated.load_adapter(str(tmp_path), "other")
    calibrated.set_adapter("other")
    assert max_difference(logits(calibrated, tiny_batch("bert")), logits(model, tiny_batch("bert"))) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"original_space": True}, r"original space \(original_space=True\), the weights come with bases"),
        ({}, r"no bases for the layers bert.encoder.layer.1.intermediate.dense, .* with shared=True"),
        (
            {"target_modules": r".*layer\.[01]\.(intermediate|output)\.dense"},
            r"S for 6 layers, such as bert.encoder.layer.0.intermediate.dense, and this model with 4 adapted layers "
            r"has no bert.encoder.layer.2.intermediate.dense \(its core there: \(8, 8\)\)",
        ),
        (
            {"target_modules": r".*layer\.\d\..*dense"},
            r"6 layers, .* 9 adapted layers also has .*attention.output.dense",
        ),
    ],
)
def test_an_adapter_of_another_kind(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Refused before anything is changed."""
    trained_adapter("bert", shared=True)[0].save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_model("bert"), SparseGradConfig(**options))
    before = cores(fresh)
    with pytest.raises(ValueError, match=words):
        fresh.load_adapter(str(tmp_path), "default")
    assert all(a is b for a, b in zip(cores(fresh), before, strict=True))
    assert not fresh.peft_config["default"].calibrated


def test_bases_of_each_layer_into_an_adapter_that_shares_them(tmp_path: Path) -> None:
    trained_adapter("bert", shared=False)[0].save_pretrained(tmp_path)
    fresh = get_peft_model(tiny_model("bert"), SparseGradConfig(shared=True))
    with pytest.raises(ValueError, match=r"hold 3 bases for the layers .* has shared=True: make it with shared=False"):
        fresh.load_adapter(str(tmp_path), "default")


@pytest.mark.parametrize("shared", [True, False])
def test_calibrated_adapters_that_share_their_bases_otherwise(shared: bool, tmp_path: Path) -> None:
    """Both calibrated and of the same sizes: nothing but the number of bases tells, and the result would be wrong."""
    trained_adapter("bert", shared=shared)[0].save_pretrained(tmp_path)
    other, _ = trained_adapter("bert", shared=not shared)
    before = logits(other, tiny_batch("bert"))
    with pytest.raises(ValueError, match=rf"has shared={not shared}: make it with shared={shared} to load them"):
        other.load_adapter(str(tmp_path), "default")
    assert max_difference(logits(other, tiny_batch("bert")), before) == 0


@pytest.mark.parametrize("into_existing", [True, False])
@pytest.mark.parametrize(
    ("sizes", "words", "words_if_fresh"),
    [
        (
            {"intermediate_size": 48},
            r"bert.encoder.layer.0.intermediate.dense has \(out, in\) = \(32, 16\) there and \(48, 16\) here",
            r"bert.encoder.layer.0.intermediate.dense had \(out, in\) = \(32, 16\) .*, and has \(48, 16\) here",
        ),
        (
            {"num_hidden_layers": 2},
            r"6 layers, .* 4 adapted layers has no bert.encoder.layer.2.intermediate.dense",
            None,
        ),
        (
            {"num_hidden_layers": 4},
            r"6 layers, .* 8 adapted layers also has bert.encoder.layer.3.intermediate.dense",
            r"made for bert.encoder.layer.0.intermediate.dense, .* and not for bert.encoder.layer.3.inter",
        ),
    ],
)
def test_an_adapter_of_another_base(
    sizes: dict[str, int], words: str, words_if_fresh: str | None, into_existing: bool, tmp_path: Path
) -> None:
    trained_adapter("bert")[0].save_pretrained(tmp_path)
    base = small_bert(**sizes)
    if into_existing:
        model = get_peft_model(base, SparseGradConfig())
        with pytest.raises(ValueError, match=words):
            model.load_adapter(str(tmp_path), "default")
    else:
        with pytest.raises(ValueError, match=words_if_fresh or words):
            PeftModel.from_pretrained(base, str(tmp_path))


def test_an_adapter_with_the_default_sizes_of_an_earlier_version(tmp_path: Path) -> None:
    """The file says how large its bases are; today's defaults for `narrow` and `wide` play no part."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 1}
    assert Sizes(None, None, neurons=True).counts(1024, 256) != (28, 96)
    model = get_peft_model(small_bert(**sizes), SparseGradConfig(task_type="SEQ_CLS", narrow=96, wide=28))
    data = {"input_ids": torch.arange(10)[None]}
    calibrate_adapter(model, [{**data, "labels": torch.tensor([1])}])
    for core in cores(model):
        nn.init.normal_(core, std=0.02)
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text("utf-8")) | {"narrow": None, "wide": None}), "utf-8")
    loaded = PeftModel.from_pretrained(small_bert(**sizes), str(tmp_path)).eval()
    assert {tuple(core.shape) for core in cores(loaded)} == {(28, 96), (96, 28)}
    assert max_difference(logits(loaded, data), logits(model.eval(), data)) == 0


def test_an_adapter_of_another_architecture(tmp_path: Path) -> None:
    trained_adapter("bert")[0].save_pretrained(tmp_path)
    model = get_peft_model(tiny_model("llama"), SparseGradConfig())
    with pytest.raises(ValueError, match=r"6 layers, such as bert.*, and this model with 9 adapted layers has no bert"):
        model.load_adapter(str(tmp_path), "default")
    with pytest.raises(ValueError, match=r"Target modules .*intermediate.* not found in the base model"):
        PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path))


def test_modules_to_save_alone_load() -> None:
    """Weights without any core are none of the checks' business."""
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(task_type="SEQ_CLS"))
    head = {key: value + 1 for key, value in get_peft_model_state_dict(model).items() if "classifier" in key}
    assert head
    before = model.base_model.model.classifier.weight.detach().clone()
    set_peft_model_state_dict(model, head)
    assert max_difference(model.base_model.model.classifier.weight.detach(), before + 1) == 0


def test_a_head_that_is_not_finite_is_refused() -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(task_type="SEQ_CLS"))
    tensors = get_peft_model_state_dict(model)
    [head] = [key for key in tensors if key.endswith("classifier.weight")]
    tensors[head] = tensors[head] * torch.nan
    with pytest.raises(ValueError, match=r"weight is damaged: (\d+) of its \1 numbers are not finite"):
        set_peft_model_state_dict(model, tensors)


def test_calibrated_weights_of_another_size(tmp_path: Path) -> None:
    """Refused before the head is replaced."""
    data = tiny_batch("bert")
    models = []
    for rows in (0.5, 0.25):
        model = get_peft_model(tiny_model("bert"), SparseGradConfig(c=rows, r=0.25, task_type="SEQ_CLS"))
        calibrate_adapter(model, [data], n_steps=3, training=False, progress=False)
        train_adapter(model, data)
        models.append(model.eval())
    models[1].save_pretrained(tmp_path)
    before = logits(models[0], data)
    with pytest.raises(ValueError, match=r"core S of shape \(8, 4\) for .*, and adapter 'default' has \(8, 8\)"):
        models[0].load_adapter(str(tmp_path), "default")
    assert max_difference(logits(models[0], data), before) == 0


def test_pytorchs_own_loading_refuses_a_basis_for_each_layer_where_they_share_one() -> None:
    own, shared = (trained_adapter("bert", shared=shared)[0] for shared in (False, True))
    with pytest.raises(RuntimeError, match=r"share a basis in adapter 'default', and the weights hold one for each"):
        shared.load_state_dict(own.state_dict())
    twin, _ = trained_adapter("bert", shared=True, trained=1)
    twin.load_state_dict(shared.state_dict())
    assert max_difference(logits(twin, tiny_batch("bert")), logits(shared, tiny_batch("bert"))) == 0


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("exponent", [0.0, 1.5])
def test_pytorchs_own_loading_refuses_bases_that_it_would_mix(exponent: float, strict: bool) -> None:
    """`load_state_dict` copies the bases of all layers of a shape into the one that a new adapter has for them."""
    data = tiny_batch("llama")
    model, fresh = (
        get_peft_model(tiny_model("llama"), SparseGradConfig(narrow=4, wide=6, neurons=False, exponent=exponent))
        for _ in range(2)
    )
    calibrate_adapter(model, [data], n_steps=6, progress=False)
    train_adapter(model.train(), data)
    model.eval()
    with pytest.raises(RuntimeError, match="the weights hold calibrated bases for adapter 'default', and the adapter"):
        fresh.load_state_dict(model.state_dict(), strict=strict)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(model))
    assert max_difference(logits(fresh.eval(), data), logits(model, data)) == 0
    fresh.load_state_dict(model.state_dict())
    assert max_difference(logits(fresh, data), logits(model, data)) == 0


@pytest.mark.parametrize("shared", [True, False])
def test_accelerate_resumes_into_an_adapter_from_a_file(shared: bool, tmp_path: Path) -> None:
    """A new one would have to change the sharing of its bases while `load_state` runs, which safetensors refuses."""
    model, base = trained_adapter("bert", trained=0, shared=shared)
    model.save_pretrained(tmp_path / "adapter")
    train_adapter(model, tiny_batch("bert"))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model)
    accelerator.save_state(str(tmp_path / "state"))
    for made in (
        get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.25, shared=shared)),
        PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True),
    ):
        accelerator.free_memory()
        resumed = accelerator.prepare(made)
        if resumed.peft_config["default"].calibrated:
            accelerator.load_state(str(tmp_path / "state"))
        else:
            with pytest.raises(RuntimeError, match=r"not calibrated\. .*Accelerator\.load_state .*is_trainable=True"):
                accelerator.load_state(str(tmp_path / "state"))
    assert all(core.requires_grad for core in cores(resumed))
    assert max_difference(logits(resumed.eval(), tiny_batch("bert")), logits(model.eval(), tiny_batch("bert"))) == 0


def test_nothing_is_loaded_into_a_merged_adapter(tmp_path: Path) -> None:
    """What was merged would be lost, and unmerging would subtract something else."""
    trained_adapter("bert", trained=1)[0].save_pretrained(tmp_path)
    model, base = trained_adapter("bert")
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter 'default' is merged; call unmerge_adapter\(\) first"):
        model.load_adapter(str(tmp_path), "default")
    model.unmerge_adapter()
    with model.disable_adapter():
        assert max_difference(logits(model, tiny_batch("bert")), logits(base, tiny_batch("bert"))) < 1e-5


def test_pytorchs_own_loading_warns_of_cores_without_their_bases() -> None:
    """The trained parameters alone are no adapter, unless its bases are there already or are none."""

    def trainable(model: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in model.named_parameters() if value.requires_grad}

    trained, _ = trained_adapter("bert")
    twin, _ = trained_adapter("bert", trained=0)
    twin.load_state_dict(trainable(trained), strict=False)
    assert max_difference(logits(twin, tiny_batch("bert")), logits(trained, tiny_batch("bert"))) == 0
    new = get_peft_model(tiny_model("bert"), SparseGradConfig(c=0.5, r=0.25))
    with pytest.warns(UserWarning, match=r"cores S for adapter 'default' without their bases .*or give the") as caught:
        new.load_state_dict(trainable(trained), strict=False)
    assert len(caught) == 1  # of six layers
    started = get_peft_model(tiny_model("bert"), SparseGradConfig(init_weights=False))
    started.load_state_dict(trainable(started), strict=False)  # back to an earlier state of its own
    for options in ({"original_space": True}, {"c": "full", "r": "full"}):
        model, same = (get_peft_model(tiny_model("bert"), SparseGradConfig(**options)) for _ in range(2))
        same.load_state_dict(trainable(model), strict=False)
    new = get_peft_model(tiny_model("bert"), SparseGradConfig())
    new.load_state_dict({name: value for name, value in new.state_dict().items() if "basis" not in name}, strict=False)
