"""Adapted fused experts in tiny Mixtral, Qwen3-MoE and gpt-oss models: the life of an adapter, and what is refused."""

from __future__ import annotations

import copy
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, convert_to_lora, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, TrainingArguments

from helpers import F64, logits, max_difference, train_adapter, tuner_layers
from sparsegrad_peft import SparseGradConfig, SparseGradTrainer, calibrate_adapter, export_lora, refresh_adapter
from sparsegrad_peft.method import reference
from sparsegrad_peft.method.sides import as_matrix
from sparsegrad_peft.tuner.experts import SparseGradExperts

DECODER = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
           "num_key_value_heads": 1, "vocab_size": 60, "num_experts_per_tok": 2}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"moe_intermediate_size": 8, "num_experts": 3},
    "gpt_oss": {"num_local_experts": 3, "pad_token_id": 0, "layer_types": ["full_attention", "sliding_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip
PARAMETERS = [f"model.layers.{block}.mlp.experts.{name}" for block in (0, 1) for name in ("gate_up_proj", "down_proj")]
SIZES = {"narrow": 4, "wide": 11}


def moe(kind: str, dtype: torch.dtype = torch.float32, *, odd: bool = False, **sizes: Any) -> nn.Module:
    """A tiny model. Odd sizes and float64 need the experts' plain implementation, without grouped products."""
    torch.manual_seed(0)
    sizes = {**DECODER, **MODELS[kind], **sizes}
    if odd:
        sizes |= {"hidden_size": 15, "intermediate_size": 7, "moe_intermediate_size": 7}
    config = AutoConfig.for_model(kind, **sizes)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager" if odd else None)
    for name, parameter in model.named_parameters():
        if "expert" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(dtype).eval()


def batch_of(n: int = 4) -> dict[str, Tensor]:
    ids = torch.randint(1, 60, (n, 10), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def trained(kind: str = "mixtral", **options: Any) -> tuple[PeftModel, nn.Module]:
    """A model with a calibrated adapter after a few steps, and the base model."""
    base = moe(kind)
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(task_type="CAUSAL_LM", **{**SIZES, **options}))
    calibrate_adapter(model, [batch_of()], n_steps=3, progress=False)
    train_adapter(model, batch_of(), 4)
    return model.eval(), base


@pytest.mark.parametrize("kind", MODELS)
def test_experts_are_the_default_targets(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    base = moe(kind)
    with caplog.at_level(logging.INFO, logger="sparsegrad_peft"):
        model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**SIZES))
    assert "SparseGrad adapts 4 layers with 100.0 % of the MLP weights" in caplog.text
    assert all(record.levelno == logging.INFO for record in caplog.records)
    config = model.peft_config["default"]
    assert config.target_parameters == PARAMETERS
    assert sorted(config.core_shapes) == sorted(PARAMETERS)
    assert config.core_shapes[PARAMETERS[0]][1:] == [11, 4, 3 * 16, 16, 3]
    assert config.core_shapes[PARAMETERS[1]][1:] == [4, 11, 16, 3 * 8, 3]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 4 * 11
    assert torch.equal(logits(model, batch_of()), logits(base, batch_of()))


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_gradients_are_those_of_the_dense_weights(kind: str) -> None:
    """In float64: the model with W_e + ΔW_e in its parameters, from the reference, has the same outputs; and the
    gradients of the cores are those of these parameters in the basis."""
    base = moe(kind, F64, odd=True)
    config = SparseGradConfig(**SIZES, init_weights=False, basis_dtype="float64")
    model = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    dense, sides = copy.deepcopy(base), {}
    for layer in tuner_layers(model):
        assert isinstance(layer, SparseGradExperts)
        S, basis = layer.core_and_basis("default")
        U, V = as_matrix(basis.U, layer.in_features, F64), as_matrix(basis.V, layer.out_features, F64)
        name = next(n for n, p in model.base_model.model.named_parameters() if p is layer.parameter)
        name = name.replace("base_layer.", "")
        by_outputs = "gate_up" in name
        update = reference.unstacked(V.T @ S.detach() @ U, 3, by_outputs)
        sides[name] = (S, U, V, by_outputs)
        stored = dense.get_parameter(name)
        stored.data += update.mT if kind == "gpt_oss" else update
    assert sorted(sides) == sorted(PARAMETERS)
    losses = [m(**batch_of()).loss for m in (model, dense)]
    for loss in losses:
        loss.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    assert losses[0].item() != pytest.approx(base(**batch_of()).loss.item(), rel=1e-6)
    for name, (S, U, V, by_outputs) in sides.items():
        G = dense.get_parameter(name).grad
        expected = V @ reference.stacked(G.mT if kind == "gpt_oss" else G, by_outputs) @ U.T
        torch.testing.assert_close(S.grad, expected, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for n, p in model.named_parameters() if "sparsegrad" not in n)


@pytest.mark.parametrize("kind", MODELS)
def test_the_life_of_an_adapter(kind: str, tmp_path: Path) -> None:
    """Trained, saved, loaded, disabled, merged, unmerged, and merged for good."""
    base = moe(kind)
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(task_type="CAUSAL_LM", **SIZES))
    calibrate_adapter(model, [batch_of()], n_steps=3, progress=False)
    assert torch.equal(logits(model.eval(), batch_of()), logits(base, batch_of()))
    losses = train_adapter(model, batch_of(), 6)
    assert losses[-1] < losses[0]
    learnt, plain = logits(model.eval(), batch_of()), logits(base, batch_of())
    assert max_difference(learnt, plain) > 1e-3

    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.partition(".sparsegrad_")[0] for name in saved} == {f"base_model.model.{n}" for n in PARAMETERS}
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch_of()), learnt)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch_of()), plain)

    model.merge_adapter()
    assert max_difference(logits(model, batch_of()), learnt) < 1e-5
    model.unmerge_adapter()
    assert max_difference(logits(model, batch_of()), learnt) < 1e-5
    whole = loaded.merge_and_unload(safe_merge=True)
    assert not tuner_layers(whole)
    assert dict(whole.named_parameters()).keys() == dict(base.named_parameters()).keys()
    assert max_difference(logits(whole, batch_of()), learnt) < 1e-5
    assert max_difference(logits(model.unload(), batch_of()), plain) < 1e-5  # merged and unmerged before


def test_several_adapters() -> None:
    model, base = trained()
    first = logits(model, batch_of())
    model.add_adapter("twin", model.peft_config["default"])
    model.add_adapter("other", SparseGradConfig(**SIZES))
    for name, expected in (("twin", first), ("other", logits(base, batch_of())), ("default", first)):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch_of()), expected)
    model.add_weighted_adapter(["default", "twin"], [1.0, -1.0], "nothing")
    model.set_adapter("nothing")
    assert max_difference(logits(model, batch_of()), logits(base, batch_of())) < 1e-5
    model.base_model.set_adapter(["default", "twin"])
    both = logits(model, batch_of())
    model.merge_adapter(["default", "twin"])
    assert max_difference(logits(model, batch_of()), both) < 1e-5
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert all("other" not in layer.sparsegrad_S for layer in tuner_layers(model))


def test_a_second_adapter_of_other_parameters() -> None:
    """The parameters of a module are wrapped one around the other, in whatever order they are adapted."""
    base = moe("mixtral")
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(target_parameters=["experts.down_proj"], **SIZES))
    model.add_adapter("up", SparseGradConfig(target_parameters=[PARAMETERS[0]], **SIZES))
    assert list(model.peft_config["default"].core_shapes) == PARAMETERS[1::2]
    assert list(model.peft_config["up"].core_shapes) == PARAMETERS[:1]
    for name in ("default", "up"):
        model.set_adapter(name)
        calibrate_adapter(model, [batch_of()], adapter_name=name, n_steps=2, progress=False)
        before = logits(model, batch_of())
        train_adapter(model, batch_of(), 2)
        assert max_difference(logits(model, batch_of()), before) > 1e-4


def test_decoding_writes_the_neurons_and_restores_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = trained()
    ids = {"input_ids": batch_of()["input_ids"], "attention_mask": torch.ones(4, 10, dtype=torch.long)}
    options = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = {name: p.clone() for name, p in model.named_parameters()}
    formed = []
    monkeypatch.setattr(
        "sparsegrad_peft.tuner.experts.with_update", lambda *a, **k: formed.append(a) or pytest.fail("formed")
    )
    found = model.generate(**ids, **options)
    monkeypatch.undo()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    expected = model.base_model.model.generate(**ids, **options)  # without PEFT's generate
    assert all(map(torch.equal, found.logits, expected.logits))
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate(**ids, max_new_tokens=0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_generate_within_generate() -> None:
    """Neurons are written once and restored once; another adapter, or none, sees the parameter without them."""
    model, base = trained()
    ids = batch_of()["input_ids"]
    before = {name: p.clone() for name, p in model.named_parameters()}
    adapted, plain = logits(model, batch_of()), logits(base, batch_of())
    assert max_difference(adapted, plain) > 1e-3
    seen = []

    class Inside(LogitsProcessor):
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            if not seen:
                seen.append("inner")
                model.generate(input_ids=ids, max_new_tokens=1, logits_processor=[])
                assert max_difference(logits(model, batch_of()), adapted) < 1e-5
                with model.disable_adapter():
                    assert max_difference(logits(model, batch_of()), plain) < 1e-5
            return scores

    options: dict[str, Any] = {"input_ids": ids, "max_new_tokens": 3, "do_sample": False}
    expected = model.generate(**options)
    assert torch.equal(model.generate(**options, logits_processor=LogitsProcessorList([Inside()])), expected)
    assert seen
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_generate_in_two_threads() -> None:
    model, _ = trained()
    before = {name: p.clone() for name, p in model.named_parameters()}
    options: dict[str, Any] = {"input_ids": batch_of()["input_ids"], "do_sample": False}
    expected = {count: model.generate(**options, max_new_tokens=count) for count in (2, 9)}
    with ThreadPoolExecutor(2) as threads:
        calls = [(count, threads.submit(model.generate, **options, max_new_tokens=count)) for count in (2, 9, 2, 9)]
        assert all(torch.equal(call.result(), expected[count]) for count, call in calls)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("rank", ["full", 2])
def test_export_as_lora(kind: str, rank: int | str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """PEFT's LoRA on the same parameters computes the same, or the best approximation of each expert's update."""
    model, base = trained(kind)
    model.save_pretrained(str(tmp_path / "adapter"))
    errors = export_lora(tmp_path / "adapter", tmp_path / "lora", rank)
    assert "4 parameters of fused experts" in caplog.text
    assert sorted(errors) == sorted(PARAMETERS)
    lora = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    assert isinstance(lora.peft_config["default"], LoraConfig)
    if rank == "full":
        assert max_difference(logits(lora, batch_of()), logits(model, batch_of())) < 1e-5
        assert max(errors.values()) < 1e-6
        return
    updates = {layer.key(""): layer for layer in tuner_layers(model)}
    assert len(updates) == 2  # by the parameter's own name
    for layer in tuner_layers(model)[:2]:
        update = layer.get_delta_weight("default").double()  # (E, out, in), or (E, in, out): the same singular values
        s = torch.linalg.svdvals(update)
        expected = float((s[:, 2:].square().sum() / s.square().sum()).sqrt())
        assert errors[f"model.layers.0.mlp.experts.{layer.parameter_name}"] == pytest.approx(expected, rel=1e-4)


def test_layers_and_modules_to_leave_out() -> None:
    def adapted(**options: Any) -> list[str]:
        return list(
            get_peft_model(moe("mixtral"), SparseGradConfig(**SIZES, **options)).peft_config["default"].core_shapes
        )

    assert adapted(layers_to_transform=[1]) == PARAMETERS[2:]
    assert adapted(layers_to_transform=1, target_parameters=["gate_up_proj"]) == PARAMETERS[2:3]
    assert adapted(exclude_modules=r".*layers\.0\..*") == PARAMETERS[2:]
    assert adapted(target_parameters=["down_proj"], target_modules=["q_proj"])[-2:] == PARAMETERS[1::2]
    assert adapted(target_parameters=[], target_modules=["q_proj"]) == [
        f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)
    ]


def test_names_that_are_no_fused_experts() -> None:
    with pytest.raises(ValueError, match=r"found 'w1'; this MixtralForCausalLM has model\.layers\.0\.mlp\.experts\."):
        get_peft_model(moe("mixtral"), SparseGradConfig(target_parameters=["w1"]))
    with pytest.raises(TypeError, match="target_parameters must be a list of names or None, found 'gate_up_proj'"):
        SparseGradConfig(target_parameters="gate_up_proj")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"neurons": False}, {"c": 0.5, "r": 0.5}, {"shared": True}])
def test_other_forms_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"fused expert parameters, such as .* in its default form only"):
        get_peft_model(moe("mixtral"), SparseGradConfig(**options))
    with pytest.raises(ValueError, match=r"gate_up_proj holds fused experts, which train selected neurons only"):
        get_peft_model(moe("mixtral"), SparseGradConfig(target_parameters=["gate_up_proj"], **options))


def test_the_original_space() -> None:
    """MeProp: the core is as large as the parameter."""
    model = get_peft_model(moe("gpt_oss"), SparseGradConfig(original_space=True))
    assert [tuple(layer.sparsegrad_S["default"].shape) for layer in tuner_layers(model)[:2]] == [(16, 24), (48, 16)]
    losses = train_adapter(model, batch_of(), 4)
    assert losses[-1] < losses[0]


def test_what_is_refused_by_name(tmp_path: Path) -> None:
    model, _ = trained()
    batch = batch_of()
    with pytest.raises(ValueError, match="adapted fused experts, which cannot mix adapters in a batch"):
        model(**batch, adapter_names=["default"] * 4)
    with pytest.raises(ValueError, match=r"adapts fused experts \(.*experts\), whose bases cannot be replaced"):
        refresh_adapter(model, [batch], progress=False)
    model.add_adapter("other", SparseGradConfig(**SIZES))
    with pytest.raises(ValueError, match=r'fused experts .* which combination_type="cat" cannot join'):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "both", combination_type="cat")
    with pytest.raises(TypeError, match=r"SparseGradExperts|not supported"):
        convert_to_lora(model, rank=2)


def test_a_damaged_or_foreign_file_is_refused(tmp_path: Path) -> None:
    model, base = trained()
    model.save_pretrained(str(tmp_path))
    other = moe("mixtral", num_local_experts=6)
    with pytest.raises(ValueError, match=r"had \(out, in, experts\) = \(48, 16, 3\) .* and has \(96, 16, 6\) here"):
        PeftModel.from_pretrained(other, str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    name = f"base_model.model.{PARAMETERS[0]}.sparsegrad_S"
    tensors[name][0, 0] = torch.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj\.sparsegrad_S is damaged: 1 of its 44 numbers"):
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))


def test_low_cpu_mem_usage(tmp_path: Path) -> None:
    model, base = trained()
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded, batch_of()), logits(model, batch_of()))


def test_without_a_peft_model(tmp_path: Path) -> None:
    """transformers' own `add_adapter` and `save_pretrained` write what PEFT loads; its `load_adapter` cannot."""
    model = moe("mixtral")
    model.add_adapter(SparseGradConfig(**SIZES))
    calibrate_adapter(model, [batch_of()], n_steps=2, progress=False)
    train_adapter(model, batch_of(), 2)
    model.eval().save_pretrained(str(tmp_path))
    assert f"base_model.model.{PARAMETERS[0]}.sparsegrad_S" in load_file(tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(moe("mixtral"), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch_of()), logits(model, batch_of()))
    export_lora(tmp_path, tmp_path / "lora", 2)
    other = moe("mixtral")
    other.load_adapter(str(tmp_path))
    with pytest.raises(RuntimeError, match=r"Load them with PeftModel\.from_pretrained \(the load_adapter of transf"):
        logits(other, batch_of())


def test_half_precision(tmp_path: Path) -> None:
    """Cores are float32. The sum of weights and update is rounded in each forward pass as it is in a merge."""
    base = moe("qwen3_moe", torch.bfloat16)
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**SIZES))
    calibrate_adapter(model, [batch_of()], n_steps=2, progress=False)
    losses = train_adapter(model, batch_of(), 6, lr=0.1)
    assert losses[-1] < losses[0]
    assert {layer.sparsegrad_S["default"].dtype for layer in tuner_layers(model)} == {torch.float32}
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.equal(logits(loaded, batch_of()), logits(model.eval(), batch_of()))
    assert max_difference(logits(loaded.merge_and_unload(), batch_of()), logits(model, batch_of())) == 0


def test_gradient_checkpointing() -> None:
    model, _ = trained()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(**batch_of()).loss.backward()
        gradients.append([layer.sparsegrad_S["default"].grad for layer in tuner_layers(model)])
        model.zero_grad()
    assert all(map(torch.equal, *gradients))


def test_the_trainer_calibrates_and_resumes(tmp_path: Path) -> None:
    rows = [{"input_ids": ids, "labels": ids} for ids in batch_of(8)["input_ids"]]

    def trainer(steps: int) -> SparseGradTrainer:
        model = get_peft_model(moe("mixtral"), SparseGradConfig(task_type="CAUSAL_LM", **SIZES))
        arguments = TrainingArguments(str(tmp_path / "out"), max_steps=steps, save_steps=2, learning_rate=1e-2,
                                      per_device_train_batch_size=4, lr_scheduler_type="constant", report_to="none",
                                      use_cpu=True, disable_tqdm=True)  # fmt: skip
        return SparseGradTrainer(model=model, args=arguments, train_dataset=rows, density=0.5)

    straight = trainer(4)
    straight.train()
    assert straight.model.peft_config["default"].calibrated
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for one, other in zip(tuner_layers(straight.model), tuner_layers(resumed.model), strict=True):
        assert torch.equal(one.sparsegrad_S["default"], other.sparsegrad_S["default"])
