"""`generate` decodes with a prepared update: the same tokens and logits, and never an adapter of the past."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from helpers import tiny_batch, tiny_model, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter
from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.tuner.decoding import FEW, fold


def rows(count: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, count, dtype=torch.float64))[0].T.contiguous()


@pytest.mark.parametrize(("out", "in_", "r", "c"), [(5, 123, 2, 9), (123, 5, 40, 3), (16, 12, 4, 4), (7, 11, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 1, 4)])
def test_the_same_in_float64(out: int, in_: int, r: int, c: int, bias: bool, shape: tuple[int, ...]) -> None:
    U, V, S = rows(c, in_), rows(r, out), torch.randn(r, c, dtype=torch.float64)
    weight, x = torch.randn(out, in_, dtype=torch.float64), torch.randn(*shape, in_, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    matrices = fold("default", S, Basis(U, V), x.dtype)
    assert matrices is not None
    assert matrices.down.shape == (min(r, c), in_)
    assert matrices.up.shape == (out, min(r, c))
    expected = nn.functional.linear(x, weight + V.T @ S @ U, b)
    torch.testing.assert_close(matrices.apply(x, weight, b), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("neurons_out", "neurons_in"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 1, 4)])
def test_neurons_in_float64(neurons_out: bool, neurons_in: bool, bias: bool, shape: tuple[int, ...]) -> None:
    (out, in_), (r, c) = (31, 23), (7, 5)
    U = torch.randperm(in_)[:c].int() if neurons_in else rows(c, in_)
    V = torch.randperm(out)[:r].int() if neurons_out else rows(r, out)
    scale_out, scale_in = torch.rand(r, dtype=torch.float64), torch.rand(c, dtype=torch.float64)
    S = torch.randn(r, c, dtype=torch.float64)
    weight, x = torch.randn(out, in_, dtype=torch.float64), torch.randn(*shape, in_, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    basis = Basis(U, V, in_features=in_, out_features=out, scale_in=scale_in, scale_out=scale_out)
    ready = fold("default", S, basis, x.dtype)
    assert ready is not None
    expected = nn.functional.linear(x, weight + basis.from_basis(S), b)
    torch.testing.assert_close(ready.apply(x, weight, b), expected, rtol=0, atol=1e-12)


def test_not_where_it_would_be_larger() -> None:
    """Complete bases: two matrices of the layer's own size would take the place of three."""
    S = torch.randn(6, 4, dtype=torch.float64)
    assert fold("default", S, Basis(None, None), torch.float64) is None
    assert fold("default", S, Basis(rows(4, 4), rows(6, 6)), torch.float64) is not None


@pytest.fixture(params=[True, False], ids=["neurons", "directions"])
def adapted(request: pytest.FixtureRequest) -> PeftModel:
    model = get_peft_model(
        tiny_model("llama"), SparseGradConfig(task_type="CAUSAL_LM", narrow=8, wide=8, neurons=request.param)
    )
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=4, progress=False)
    change(model)
    return model.eval()


def change(model: nn.Module) -> None:
    """Change the cores, as fused optimizers do, without telling PyTorch's version counters."""
    for layer in tuner_layers(model):
        layer.sparsegrad_S["default"].data = torch.randn_like(layer.sparsegrad_S["default"])


def generated(model: nn.Module, **options: Any) -> list[Tensor]:
    """Logits of six generated tokens."""
    found = model.generate(
        input_ids=tiny_batch("llama")["input_ids"][:2, :4], max_new_tokens=6, min_new_tokens=6, do_sample=False,
        pad_token_id=0, output_logits=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    return [found.sequences.double(), *found.logits]


def test_what_generate_gives_is_what_the_merged_model_gives(adapted: PeftModel) -> None:
    used = []
    for layer in tuner_layers(adapted):
        layer.register_forward_hook(lambda module, *_: used.append(module.folded is not None))
    for _ in range(2):
        merged = copy.deepcopy(adapted).merge_and_unload()
        for found, expected in zip(generated(adapted), generated(merged), strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        change(adapted)
    assert all(used)
    assert not any(layer.folded for layer in tuner_layers(adapted))
    assert tiny_batch("llama")["input_ids"][:2, :4].numel() <= FEW


def test_dropped_when_generate_fails_or_nothing_is_to_be_folded(adapted: PeftModel) -> None:
    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = adapted.base_model.model.lm_head.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        generated(adapted)
    handle.remove()
    assert not any(layer.folded for layer in tuner_layers(adapted))
    with adapted.disable_adapter():
        base = generated(adapted)
    for found, expected in zip(base, generated(tiny_model("llama").eval()), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not hasattr(get_peft_model(tiny_model("bert"), SparseGradConfig()).base_model, "generate")
