"""New bases for a PEFT adapter in mid-training, beside the layers of plain PyTorch and the oracle."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from trainers import CALIBRATION, arguments, rows, saved

from helpers import (
    check_equal,
    max_difference,
    tiny_batch,
    tiny_model,
    trained_adapter,
    tuner_layers,
    uncalibrated_adapter,
)
from sparsegrad_peft import (
    SparseGradAdamW,
    SparseGradConfig,
    SparseGradTrainer,
    calibrate,
    calibrate_adapter,
    param_groups,
    refresh_adapter,
)
from sparsegrad_peft.method.reference import rotate

COMPLETE: dict[str, Any] = {"c": "full", "r": "full"}


def in_training(kind: str, *, density: float | None, **options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    """A model in float64 after a few steps, its optimizer, and the data."""
    torch.manual_seed(0)
    data = tiny_batch(kind)
    model = get_peft_model(
        tiny_model(kind).double(),
        SparseGradConfig(**COMPLETE, basis_dtype="float64", **options),
        autocast_adapter_dtype=False,
    ).eval()
    calibrate_adapter(model, [data], n_steps=2, training=False, progress=False, gram_dtype=torch.float64)
    optimizer = SparseGradAdamW(param_groups(model, density=density), lr=0.02)
    for _ in range(4):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, data


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("density", [None, 0.2])
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_the_update_stays_and_core_and_moments_turn_as_the_oracle_says(
    kind: str, density: float | None, shared: bool
) -> None:
    model, optimizer, data = in_training(kind, density=density, shared=shared)
    layers = tuner_layers(model)
    before = [copy.deepcopy(layer.core_and_basis("default")) for layer in layers]
    states = [copy.deepcopy(optimizer.state[layer.core_and_basis("default")[0]]) for layer in layers]
    cores = [layer.core_and_basis("default")[0] for layer in layers]
    modules = {id(layer.core_and_basis("default")[1]) for layer in layers}
    output = model(**data)
    logits = output.logits.detach()
    gradients = torch.autograd.grad(output.loss, cores)

    refresh_adapter(model, [data], optimizer, n_steps=3, training=False, progress=False, gram_dtype=torch.float64)

    assert max_difference(model(**data).logits.detach(), logits) < 1e-9
    assert {id(layer.core_and_basis("default")[1]) for layer in layers} == modules  # shared as before
    for layer, core, (S_old, old), state in zip(layers, cores, before, states, strict=True):
        S, new = layer.core_and_basis("default")
        assert S is core  # the parameter that the optimizer knows
        assert S.requires_grad
        assert max_difference(new.U, old.U) > 0.01
        assert new.U.dtype == torch.float64
        sides = (old.U, old.V, new.U, new.V)
        assert max_difference(S.detach(), rotate(S_old.detach(), *sides)) < 1e-12
        moments = optimizer.state[S]
        if density is None:
            assert max_difference(moments["exp_avg"], rotate(state["exp_avg"], *sides)) < 1e-12
            assert float(moments["exp_avg_sq"].sum()) == pytest.approx(float(state["exp_avg_sq"].sum()))
        else:
            assert moments["positions"].numel() == state["positions"].numel()
    model(**data).loss.backward()
    for core, gradient, (_, old), layer in zip(cores, gradients, before, layers, strict=True):
        assert core.grad is not None
        new = layer.core_and_basis("default")[1]
        assert max_difference(core.grad, rotate(gradient, old.U, old.V, new.U, new.V)) < 1e-9


def test_the_statistics_are_those_of_the_weights_as_they_are_now() -> None:
    """And nothing is left behind: of the walk, of gradients, of modes."""
    model, _, data = in_training("bert", density=None)
    merged = copy.deepcopy(model).merge_and_unload()
    before = {name: value.clone() for name, value in model.state_dict().items() if "sparsegrad" not in name}
    found = refresh_adapter(model, [data], n_steps=2, training=False, progress=False, gram_dtype=torch.float64)
    groups = {name: [layer.removeprefix("base_model.model.").removesuffix(".base_layer") for layer in group.layers]
              for name, group in found.groups.items()}  # fmt: skip
    for parameter in merged.parameters():  # as the adapted model has it: what walks are the targets alone
        parameter.requires_grad_(False)
    expected = calibrate(merged, [data], groups=groups, config=found.config, progress=False)
    for name, group in found.groups.items():
        assert max_difference(group.gram_in, expected.groups[name].gram_in) < 1e-9 * float(group.gram_in.max())
        assert max_difference(group.gram_out, expected.groups[name].gram_out) < 1e-9 * float(group.gram_out.max())
    after = {name: value for name, value in model.state_dict().items() if "sparsegrad" not in name}
    check_equal(after, before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    # Ready statistics give the same bases; the first group stands for all.
    again = copy.deepcopy(model)
    refresh_adapter(again, calibration=found, progress=False)
    check_equal(bases(again), bases(model))


def test_saved_and_loaded_after_it(tmp_path: Path) -> None:
    model, _, data = in_training("bert", density=None)
    refresh_adapter(model, [data], n_steps=2, progress=False)
    expected = model(**data).logits.detach()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model("bert").double(), tmp_path, autocast_adapter_dtype=False).eval()
    assert max_difference(loaded(**data).logits.detach(), expected) < 1e-9


def test_refusals() -> None:
    model, _ = trained_adapter("bert")
    data = tiny_batch("bert")
    with pytest.raises(ValueError, match=r'truncated bases.*no room for all that it has learnt.*"cat"'):
        refresh_adapter(model, [data], progress=False)
    with pytest.raises(ValueError, match="no SparseGrad adapter named 'other'"):
        refresh_adapter(model, [data], adapter_name="other", progress=False)
    plain, _ = trained_adapter("bert", calibrated=False)
    with pytest.raises(ValueError, match="is not calibrated"):
        refresh_adapter(plain, [data], progress=False)
    model, optimizer, data = in_training("bert", density=None)
    before = saved(model)
    for state in optimizer.state.values():
        del state["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"state of Adam .*found exp_avg, step.* in SparseGradAdamW"):
        refresh_adapter(model, [data], optimizer, progress=False)
    check_equal(saved(model), before)
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged; call unmerge_adapter"):
        refresh_adapter(model, [data], progress=False)


class Counted(SparseGradTrainer):
    losses = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        self.losses += 1
        return super().compute_loss(*args, **kwargs)


def make_trainer(folder: Path, density: float | None, every: int | None = 2) -> Counted:
    args = arguments(folder, max_steps=6, save_strategy="steps", save_steps=1, warmup_steps=2)
    return Counted(
        model=uncalibrated_adapter(**COMPLETE), args=args, train_dataset=rows(), calibration=CALIBRATION,
        density=density, refresh_every=every,
    )  # fmt: skip


def bases(model: nn.Module) -> list[torch.Tensor]:
    return [value for name, value in saved(model).items() if name.endswith("basis.default.U")]


@pytest.mark.parametrize("density", [None, 0.2])
def test_a_trainer_that_refreshes_stopped_and_resumed_equals_never_stopped(
    density: float | None, tmp_path: Path
) -> None:
    straight = make_trainer(tmp_path / "straight", density)
    straight.train()
    assert straight.losses == 8 + 6 + 2 * 8  # after steps 2 and 4, not after the last
    for step in (2, 3):
        resumed = make_trainer(tmp_path / "resumed", density)
        resumed.train(resume_from_checkpoint=str(tmp_path / "straight" / f"checkpoint-{step}"))
        check_equal(saved(resumed.model), saved(straight.model))
        check_equal(resumed.optimizer.state_dict(), straight.optimizer.state_dict())
    never = make_trainer(tmp_path / "never", density, None)
    never.train()
    assert all(
        max_difference(one, other) > 0.01 for one, other in zip(bases(never.model), bases(straight.model), strict=True)
    )


def test_a_trainer_refuses_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="refresh_every must be an integer of at least 1, found 0"):
        make_trainer(tmp_path, None, 0)
    with pytest.raises(ValueError, match="adapter 'default' has truncated bases"):
        SparseGradTrainer(model=uncalibrated_adapter(), args=arguments(tmp_path), train_dataset=rows(), refresh_every=2)
