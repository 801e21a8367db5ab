"""PyTorch's own encoder layers: in eval mode they read weights and do not call the layers inside them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparsegrad_peft import SparseGradLinear, calibrate, group_linears, replace_linears, restore_linears


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def an_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def test_what_was_learnt_counts_in_eval_mode() -> None:
    torch.manual_seed(0)
    model, x = an_encoder(), torch.randn(3, 5, 16)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    groups = group_linears(model, ["linear1", "linear2"])
    bases = calibrate(model, [x], groups=groups, loss_fn=loss, n_steps=2, progress=False).bases(c=0.5, r=0.5)
    before = model.eval()(x, src_key_padding_mask=padding)[~padding]
    replace_linears(model, groups, bases)
    for module in model.modules():
        if isinstance(module, SparseGradLinear):
            nn.init.normal_(module.core, std=0.3)
    expected = model.train()(x, src_key_padding_mask=padding)[~padding]
    assert not torch.allclose(expected, before, atol=1e-2)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x, src_key_padding_mask=padding)[~padding], expected)
        restore_linears(model)
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], expected)


def test_a_layer_that_is_never_called_is_no_target() -> None:
    model = an_encoder()
    names = [name for names in group_linears(model, shared=False).values() for name in names]
    assert names == [f"layers.{block}.linear{number}" for block in (0, 1) for number in (1, 2)]
    assert group_linears(nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))) == {"1": ["1"]}
    with pytest.raises(ValueError, match="matches no linear layer"):
        group_linears(model, ["out_proj"])
