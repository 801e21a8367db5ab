"""A few tokens at a time give what many give; what is kept for it is never older than the adapter."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups
from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.tuner.decoding import FEW, apply_folded, folded
from sparsegrad_peft.tuner.layer import SparseGradTunerLinear


def orthogonal_rows(rows: int, size: int) -> Tensor:
    return torch.linalg.qr(torch.randn(size, rows, dtype=torch.float64))[0].T.contiguous()


@pytest.mark.parametrize(("out", "in_", "r", "c"), [(5, 123, 2, 9), (123, 5, 40, 3), (16, 12, 4, 4), (7, 11, 1, 1)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 1, 4)])
def test_the_same_in_float64(out: int, in_: int, r: int, c: int, bias: bool, shape: tuple[int, ...]) -> None:
    U, V, S = orthogonal_rows(c, in_), orthogonal_rows(r, out), torch.randn(r, c, dtype=torch.float64)
    weight, x = torch.randn(out, in_, dtype=torch.float64), torch.randn(*shape, in_, dtype=torch.float64)
    b = torch.randn(out, dtype=torch.float64) if bias else None
    matrices = folded(None, S, Basis(U, V), x.dtype)
    assert matrices is not None
    assert matrices.down.shape == (min(r, c), in_)
    assert matrices.up.shape == (out, min(r, c))
    expected = nn.functional.linear(x, weight + V.T @ S @ U, b)
    torch.testing.assert_close(apply_folded(x, weight, b, matrices), expected, rtol=0, atol=1e-12)


def test_not_where_it_would_be_larger() -> None:
    """Complete bases: two matrices of the layer's own size would take the place of three."""
    U, V = orthogonal_rows(4, 4), orthogonal_rows(6, 6)
    assert folded(None, torch.randn(6, 4, dtype=torch.float64), Basis(None, None), torch.float64) is None
    small = folded(None, torch.randn(6, 4, dtype=torch.float64), Basis(U, V), torch.float64)
    assert small is not None
    assert small.down.numel() + small.up.numel() < 4 * 4 + 6 * 4 + 6 * 6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(32, 16), torch.randn(32, 16)


@pytest.fixture
def adapted(batch: tuple[Tensor, Tensor]) -> PeftModel:
    model = get_peft_model(Net(), SparseGradConfig(target_modules=["up", "down"], narrow=8, wide=8))  # type: ignore[arg-type]
    calibrate_adapter(model, [batch], n_steps=2, loss_fn=loss_fn, progress=False)
    step(model, batch)
    return model


def step(model: PeftModel, batch: tuple[Tensor, Tensor]) -> None:
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-1)
    loss_fn(model, batch).backward()
    optimizer.step()


def layers(model: nn.Module) -> list[SparseGradTunerLinear]:
    return [module for module in model.modules() if isinstance(module, SparseGradTunerLinear)]


def decoded(model: nn.Module, x: Tensor) -> Tensor:
    """Row by row, each call of one token; and that it did go this way."""
    with torch.no_grad():
        found = torch.cat([model(row) for row in x.split(1)])
    assert all(layer._folded for layer in layers(model))
    return found


def expected(model: nn.Module, x: Tensor) -> Tensor:
    assert len(x) > FEW
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


def test_never_older_than_the_adapter(adapted: PeftModel, batch: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    x = batch[0]
    adapted.eval()
    first = decoded(adapted, x)
    torch.testing.assert_close(first, expected(adapted, x))
    kept = [layer._folded["default"] for layer in layers(adapted)]
    decoded(adapted, x)
    assert all(layer._folded["default"] is old for layer, old in zip(layers(adapted), kept, strict=True))

    # A step while the model stays in eval mode: the cores count their changes.
    step(adapted, batch)
    second = decoded(adapted, x)
    assert (second - first).abs().max() > 1e-2
    torch.testing.assert_close(second, expected(adapted, x))

    # Weights that are loaded, a core that is another tensor, another type.
    adapted.save_pretrained(tmp_path)
    for layer in layers(adapted):
        layer.sparsegrad_S["default"].data = torch.zeros_like(layer.sparsegrad_S["default"])
    with adapted.disable_adapter():
        base = expected(adapted, x)
    torch.testing.assert_close(decoded(adapted, x), base)
    adapted.load_adapter(str(tmp_path), "again")
    adapted.set_adapter("again")
    adapted.eval()
    torch.testing.assert_close(decoded(adapted, x), second)
    adapted.double()
    third = decoded(adapted, x.double())
    torch.testing.assert_close(third, expected(adapted, x.double()))

    # Training drops it; a copy has its own; a state dict knows nothing of it.
    assert not [name for name in adapted.state_dict() if "folded" in name]
    other = pickle.loads(pickle.dumps(copy.deepcopy(adapted)))
    step(other, (x.double(), batch[1].double()))
    other.eval()
    torch.testing.assert_close(decoded(other, x.double()), expected(other, x.double()))
    torch.testing.assert_close(decoded(adapted, x.double()), third)
    adapted.train()
    assert not any(layer._folded for layer in layers(adapted))


def test_training_and_merging_do_not_use_it(adapted: PeftModel, batch: tuple[Tensor, Tensor]) -> None:
    x = batch[0][:1]
    adapted(x)
    adapted.eval()
    adapted(x)  # with gradients
    assert not any(layer._folded for layer in layers(adapted))
    before = decoded(adapted, batch[0])
    adapted.merge_adapter()
    with torch.no_grad():
        torch.testing.assert_close(adapted(batch[0]), before)
    with torch.inference_mode():
        adapted.unmerge_adapter()
        torch.testing.assert_close(adapted(x), before[:1])
    torch.testing.assert_close(decoded(adapted, batch[0]), before)  # what inference mode left is good elsewhere
