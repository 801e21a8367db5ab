"""Adapters on quantized bases: calibrated on the plain model, loaded, trained on, merged and saved; or refused by name.

All on the CPU. Each kind is skipped where its library is missing; bitsandbytes is none of the package's dependencies.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from test_trainer_trl import SFT, options
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig, TrainingArguments

from helpers import cores, logits, tiny_batch
from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups
from sparsegrad_peft.tuner.layer import SparseGradLayer
from sparsegrad_peft.tuner.quantized import is_reordered
from sparsegrad_peft.tuner.trainer import SparseGradTrainer

pytest.importorskip("accelerate", reason="transformers loads quantized models with it")

Load = Callable[[], nn.Module]
ROUNDING = "the base weight is quantized"


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def _int8_dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig(version=2))


def _nf4(compute: torch.dtype, double: bool) -> Any:
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute, bnb_4bit_use_double_quant=double
    )


# library, how to quantize, type of the rest of the model, largest error of the logits (they are of about size 0.5)
KINDS: dict[str, tuple[str, Callable[[], Any], torch.dtype, float]] = {
    "bnb-int8": ("bitsandbytes", lambda: BitsAndBytesConfig(load_in_8bit=True), torch.float32, 0.03),
    "bnb-nf4": ("bitsandbytes", lambda: _nf4(torch.float32, double=False), torch.float32, 0.2),
    "bnb-nf4-double-bfloat16": ("bitsandbytes", lambda: _nf4(torch.bfloat16, double=True), torch.bfloat16, 0.2),
    "torchao-int8": ("torchao", _int8, torch.float32, 0.03),
    "torchao-int8-bfloat16": ("torchao", _int8, torch.bfloat16, 0.03),
}


def plain() -> nn.Module:
    """A LLaMA whose sides are multiples of the 64 entries that NF4 quantizes together."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=16)
    ).eval()  # fmt: skip


@pytest.fixture(params=list(KINDS))
def quantized(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Load, torch.dtype, float]:
    """Loads the model of `plain` quantized, anew at each call; the type of the rest; the error to be expected."""
    library, how, dtype, error = KINDS[request.param]
    pytest.importorskip(library, reason=f"{library} is not installed")
    plain().save_pretrained(tmp_path / "base")

    def load() -> nn.Module:
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=how(), dtype=dtype, device_map="cpu"
        ).eval()

    return load, dtype, error


FORMS = {"neurons": {"narrow": 16, "wide": 32}, "directions": {"c": 0.25, "r": 0.25}}


@pytest.fixture
def adapter(request: pytest.FixtureRequest, tmp_path: Path) -> PeftModel:
    """Calibrated and trained on the plain model, and saved in the folder `adapter`. Of the default form, with neurons,
    unless a test asks for the other one."""
    model = get_peft_model(plain(), SparseGradConfig(**FORMS[getattr(request, "param", "neurons")]))
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=3, progress=False)
    train(model, 5)
    model.save_pretrained(tmp_path / "adapter")
    return model.eval()


def tuner_layers(model: nn.Module) -> list[SparseGradLayer]:
    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]


def train(model: nn.Module, steps: int) -> list[float]:
    optimizer = SparseGradAdamW(param_groups(model, density=0.2), lr=0.02)
    model.train()
    losses = []
    for _ in range(steps):
        loss = model(**tiny_batch("llama")).loss
        loss.backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        assert trained == {name for name, _ in model.named_parameters() if "sparsegrad_S" in name}
        assert all(layer.sparsegrad_S["default"].grad.any() for layer in tuner_layers(model))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def differs(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).abs().max())


def stored(model: nn.Module) -> list[Tensor]:
    """The quantized weights, as they are stored."""
    weights = [layer.get_base_layer().state_dict()["weight"] for layer in tuner_layers(model)]
    return [getattr(weight, "qdata", weight).clone() for weight in weights]  # torchao's numbers are within


@pytest.mark.parametrize(
    ("adapter", "low_cpu_mem_usage"), [("neurons", False), ("directions", True)], indirect=["adapter"]
)
def test_calibrated_in_float32_and_trained_on(
    quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    load, dtype, error = quantized
    data = tiny_batch("llama")
    options: dict[str, Any] = {"is_trainable": True, "low_cpu_mem_usage": low_cpu_mem_usage}
    model = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"), **options)
    assert all(layer.quantization_backend is not None for layer in tuner_layers(model))
    # PEFT rounds adapters that it loads this way to the type of the base, those of LoRA too, before it widens them.
    rounding = 2**-8 if low_cpu_mem_usage and dtype == torch.bfloat16 else 0.0
    for mine, theirs in zip(tuner_layers(model), tuner_layers(adapter), strict=True):
        assert mine.sparsegrad_S["default"].dtype == torch.float32
        torch.testing.assert_close(mine.sparsegrad_S["default"], theirs.sparsegrad_S["default"], rtol=rounding, atol=0)
        assert torch.equal(mine.sparsegrad_basis["default"].U, theirs.sparsegrad_basis["default"].U)
    before = stored(model)
    losses = train(model, 5)
    assert losses[-1] < losses[0] - 0.02
    assert all(torch.equal(a, b) for a, b in zip(stored(model), before, strict=True))
    expected = logits(model.eval(), data)

    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(load(), str(tmp_path / "again"), low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert differs(logits(again, data), expected) <= 4 * rounding
    with again.disable_adapter():
        assert differs(logits(again, data), logits(load(), data)) == 0
    fresh = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    update = differs(logits(adapter, data), logits(plain(), data))
    assert differs(logits(fresh, data), logits(adapter, data)) < error < update  # not larger than the base's own error


def test_update_of_a_layer(quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, tmp_path: Path) -> None:
    """Beside a quantized layer the update is exact: only the base is rounded."""
    load, dtype, _ = quantized
    model = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    for layer in tuner_layers(model):
        x = torch.randn(7, layer.in_features, dtype=dtype)
        with torch.no_grad():
            update = layer(x).float() - layer.base_layer(x).float()
            delta = layer.get_delta_weight("default")
            assert differs(update, x.float() @ delta.T) < (1e-5 if dtype == torch.float32 else 0.02)


def test_gradients_of_a_layer(quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, tmp_path: Path) -> None:
    """Of the input as if the base were its dequantized weight, so that the layers before it learn; of the core."""
    load, dtype, _ = quantized
    model = PeftModel.from_pretrained(load(), str(tmp_path / "adapter"), is_trainable=True).train()
    for layer in tuner_layers(model):
        x = torch.randn(7, layer.in_features, dtype=dtype, requires_grad=True)
        y = layer(x)
        delta = torch.randn_like(y)
        y.backward(delta)
        weight = layer.get_base_weight().float() + layer.get_delta_weight("default").detach()
        S, basis = layer.core_and_basis("default")
        exact = dtype == torch.float32
        torch.testing.assert_close(x.grad.float(), delta.float() @ weight, rtol=1e-2, atol=1e-2 if exact else 5e-2)
        G = delta.float().T @ x.detach().float()
        torch.testing.assert_close(S.grad, basis.to_basis(G), rtol=1e-4 if exact else 1e-2, atol=1e-4 if exact else 0.1)


def test_merge(quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, tmp_path: Path) -> None:
    """Quantized anew after the sum, and said so. After inference too, which makes bitsandbytes reorder its weights."""
    load, _, error = quantized
    data = tiny_batch("llama")
    model = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    expected = logits(model, data)
    base = logits(load(), data)
    assert differs(expected, base) > error
    with pytest.warns(UserWarning, match=ROUNDING):
        model.merge_adapter(safe_merge=True)
    assert differs(logits(model, data), expected) < error
    with pytest.warns(UserWarning, match=ROUNDING):
        model.unmerge_adapter()
    assert differs(logits(model, data), expected) < error
    with model.disable_adapter():
        assert differs(logits(model, data), base) < error
    kinds = {type(layer.get_base_layer()) for layer in tuner_layers(model)}
    with pytest.warns(UserWarning, match=ROUNDING):
        merged = model.merge_and_unload()
    assert not tuner_layers(merged)
    assert {type(block.mlp.up_proj) for block in merged.model.layers} == kinds
    assert not any(p.requires_grad for p in merged.parameters())
    assert differs(logits(merged, data), expected) < 1.5 * error  # rounded three times


def test_mixed_batches(quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, tmp_path: Path) -> None:
    load, dtype, _ = quantized
    data = tiny_batch("llama")
    model = PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
    with_adapter = logits(model, data)
    with model.disable_adapter():
        without = logits(model, data)
    mixed = logits(model, data, adapter_names=["default", "__base__", "__base__", "default"])
    expected = torch.stack([with_adapter[0], without[1], without[2], with_adapter[3]])
    # torchao's and bitsandbytes' activations are quantized a token at a time: no row sees another
    assert differs(mixed, expected) < (1e-5 if dtype == torch.float32 else 0.02)


def test_prepared_with_gradient_checkpointing(
    quantized: tuple[Load, torch.dtype, float], adapter: PeftModel, tmp_path: Path
) -> None:
    load = quantized[0]
    base = prepare_model_for_kbit_training(load(), gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    losses = train(model, 3)
    assert losses[-1] < losses[0]


def test_calibration_is_refused_with_a_remedy(quantized: tuple[Load, torch.dtype, float]) -> None:
    load = quantized[0]
    data = tiny_batch("llama")
    model = get_peft_model(load(), SparseGradConfig(c=0.25, r=0.25))
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        seen.append(1)
        return model(**tiny_batch).loss

    words = r"mlp\.gate_proj is quantized \((bnb|torchao).*\), .* Calibrate the adapter on the unquantized model"
    with pytest.raises(TypeError, match=words):
        calibrate_adapter(model, [data], n_steps=1, loss_fn=loss_fn)
    assert not seen  # before any work

    twin = get_peft_model(plain(), SparseGradConfig(c=0.25, r=0.25))
    statistics = calibrate_adapter(twin, [data], n_steps=2, progress=False)
    calibrate_adapter(model, calibration=statistics)  # the other remedy
    for mine, theirs in zip(tuner_layers(model), tuner_layers(twin), strict=True):
        assert torch.equal(mine.sparsegrad_basis["default"].U, theirs.sparsegrad_basis["default"].U)
    losses = train(model, 5)
    assert losses[-1] < losses[0] - 0.02


def test_without_bases(quantized: tuple[Load, torch.dtype, float]) -> None:
    """The original space needs no calibration: a quantized base will do from the start."""
    load = quantized[0]
    data = tiny_batch("llama")
    model = get_peft_model(load(), SparseGradConfig(original_space=True)).eval()
    assert differs(logits(model, data), logits(load(), data)) == 0
    del model
    gc.collect()
    losses = train(get_peft_model(load(), SparseGradConfig(original_space=True)), 5)
    assert losses[-1] < losses[0]


def test_quantized_activations(adapter: PeftModel, tmp_path: Path) -> None:
    """For inference only: torchao's kernel has no backward, and training would go on with wrong gradients."""
    pytest.importorskip("torchao", reason="torchao is not installed")
    plain().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=_int8_dynamic(), dtype=torch.float32, device_map="cpu"
    )
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True).eval()
    data = tiny_batch("llama")
    assert differs(logits(model, data), logits(adapter, data)) < 0.03
    model.train()
    with pytest.raises(RuntimeError, match=r"base layer \(torchao\) passes no gradient back .* quantize weights only"):
        model(**data)


def test_training_after_inference_in_4_bit(adapter: PeftModel, tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 bitsandbytes reorders the weights for inference, and then has no backward."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain().save_pretrained(tmp_path / "base")
    config = _nf4(torch.float32, double=False)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    losses = train(model, 1)
    logits(model.eval(), tiny_batch("llama"))
    state = tuner_layers(model)[0].get_base_layer().weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        with pytest.raises(RuntimeError, match=r"bitsandbytes on a CPU: after inference, model\.state_dict\(\) rest"):
            train(model, 1)
    model.state_dict()
    losses += train(model, 3)
    assert losses[-1] < losses[0]


def test_the_trainer_keeps_the_order_of_4_bit_weights(adapter: PeftModel, tmp_path: Path) -> None:
    """It trains after an evaluation on any CPU, also of a model that was used for inference before."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain().save_pretrained(tmp_path / "base")
    config = _nf4(torch.float32, double=False)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
    before = stored(model)
    logits(model.eval(), tiny_batch("llama"))  # reorders on some CPUs
    batch = tiny_batch("llama")
    rows = [{name: values[row] for name, values in batch.items()} for row in range(4)]
    options: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "report_to": "none", "use_cpu": True}
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, learning_rate=0.02, disable_tqdm=True, save_strategy="no", **options
    )
    trainer = SparseGradTrainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    assert not any(is_reordered(module) for module in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(stored(model), before, strict=True))


def test_cores_stay_float32_in_trl(adapter: PeftModel, tmp_path: Path) -> None:
    """TRL casts what trains on a quantized model to bfloat16, where steps of 1e-4 move few entries."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    plain().save_pretrained(tmp_path / "base")
    config = _nf4(torch.float32, double=False)
    for wanted in (torch.float32, torch.bfloat16):
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map="cpu")
        model = PeftModel.from_pretrained(base, str(tmp_path / "adapter"), is_trainable=True)
        for layer in tuner_layers(model) if wanted == torch.bfloat16 else ():
            layer.sparsegrad_status["default"].half = True  # as with autocast_adapter_dtype=False on a bfloat16 model
        trainer = SFT(model=model, **options(tmp_path / "out"))
        assert {core.dtype for core in cores(model)} == {torch.bfloat16}
        trainer.create_optimizer()
        assert {core.dtype for core in cores(model)} == {wanted}


def test_quantized_by_hand() -> None:
    """PEFT learns from transformers what to quantize anew with; without that it refuses."""
    torchao = pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig

    model = plain()
    torchao.quantize_(model.model, Int8WeightOnlyConfig(version=2))
    with pytest.raises(ValueError, match=r"torchao quantized layer detected .* quantization_config=TorchAoConfig"):
        get_peft_model(model, SparseGradConfig())


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unknown_quantization(dtype: torch.dtype) -> None:
    class PackedLinear(nn.Linear):
        """Stands for the layers of libraries that PEFT does not know."""

    model = plain()
    layer = PackedLinear(64, 128, bias=False)
    layer.weight = nn.Parameter(torch.zeros(128, 64).to(dtype), requires_grad=False)
    for block in model.model.layers:
        block.mlp.gate_proj = copy.deepcopy(layer)
    with pytest.raises(TypeError, match=rf"PackedLinear has a weight of {dtype}, .* adapt the unquantized model"):
        get_peft_model(model, SparseGradConfig())
