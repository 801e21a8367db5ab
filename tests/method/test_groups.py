"""Which layers are targets and which share a basis, on the layer names of real transformers models."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, GPT2Config, GPT2Model

from sparsegrad_peft import Basis, SparseGradLinear, group_linears
from sparsegrad_peft.method.groups import linear_shape

INTERMEDIATE = [f"encoder.layer.{i}.intermediate.dense" for i in range(2)]
OUTPUT = [f"encoder.layer.{i}.output.dense" for i in range(2)]
MLP = {"encoder.layer.*.intermediate.dense": INTERMEDIATE, "encoder.layer.*.output.dense": OUTPUT}


@pytest.fixture(scope="module")
def bert() -> BertModel:
    return BertModel(
        BertConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100)
    )


@pytest.fixture(scope="module")
def gpt2() -> GPT2Model:
    return GPT2Model(
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=16, bos_token_id=0, eos_token_id=0)
    )


def test_a_regular_expression_is_for_the_whole_name(bert: BertModel) -> None:
    """`attention.output.dense` ends like the MLP's `output.dense`. A regular expression can tell them apart."""
    groups = group_linears(bert, r"encoder\.layer\.\d+\.(intermediate|output)\.dense")
    assert groups == MLP
    assert list(groups) == list(MLP)
    with pytest.raises(ValueError, match="matches no linear layer"):
        group_linears(bert, r"intermediate\.dense")  # a part of names only


def test_endings_are_whole_parts_of_a_name(bert: BertModel) -> None:
    assert group_linears(bert, ["intermediate.dense"]) == {"encoder.layer.*.intermediate.dense": INTERMEDIATE}
    # Both `output.dense` end so; the one in attention is another role.
    groups = group_linears(bert, ["intermediate.dense", "output.dense"])
    assert groups == {
        "encoder.layer.*.attention.output.dense": [f"encoder.layer.{i}.attention.output.dense" for i in range(2)],
        **MLP,
    }
    assert group_linears(bert, ("pooler.dense",)) == {"pooler.dense": ["pooler.dense"]}  # a whole name
    with pytest.raises(ValueError, match="matches no linear layer"):
        group_linears(bert, ["ooler.dense"])
    # One block alone, by its number: still the role's name.
    assert group_linears(bert, ["layer.1.output.dense"]) == {"encoder.layer.*.output.dense": [OUTPUT[1]]}


def test_none_takes_every_linear_layer(bert: BertModel) -> None:
    groups = group_linears(bert)
    found = [name for names in groups.values() for name in names]
    expected = [name for name, module in bert.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(found) == sorted(expected)
    assert len(found) == len(set(found)) == 2 * 6 + 1
    assert len(groups) == 6 + 1
    assert groups["encoder.layer.*.attention.self.query"] == [f"encoder.layer.{i}.attention.self.query" for i in (0, 1)]


def test_not_shared_is_a_group_a_layer_in_the_order_of_the_model(bert: BertModel) -> None:
    groups = group_linears(bert, r".*\d\.(intermediate|output)\.dense", shared=False)
    expected = [name for pair in zip(INTERMEDIATE, OUTPUT, strict=True) for name in pair]
    assert groups == {name: [name] for name in expected}
    assert list(groups) == expected


def test_conv1d_is_out_in(gpt2: GPT2Model) -> None:
    """GPT-2 stores (in, out); the shape is still given as (out, in)."""
    groups = group_linears(gpt2, ["mlp.c_fc", "mlp.c_proj"])
    assert groups == {f"h.*.mlp.{part}": [f"h.{i}.mlp.{part}" for i in range(2)] for part in ("c_fc", "c_proj")}
    fc, proj = gpt2.get_submodule("h.0.mlp.c_fc"), gpt2.get_submodule("h.0.mlp.c_proj")
    assert fc.weight.shape == (32, 128)
    assert linear_shape(fc, "c_fc") == (128, 32)
    assert linear_shape(proj, "c_proj") == (32, 128)
    assert len(group_linears(gpt2)) == 4


def test_one_role_of_two_shapes_is_two_groups() -> None:
    """A basis fits one shape. Models whose blocks grow in width have one role in several shapes."""
    blocks = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(in_, 8)}) for in_ in (4, 6, 4)])
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(8, 2)})
    assert group_linears(model) == {
        "blocks.*.fc (8x4)": ["blocks.0.fc", "blocks.2.fc"],
        "blocks.*.fc (8x6)": ["blocks.1.fc"],
        "head": ["head"],
    }
    # (4, 6) and (6, 4) have equal numbers of entries and are two shapes.
    turned = nn.ModuleList([nn.Linear(4, 6), nn.Linear(6, 4)])
    assert group_linears(turned) == {"* (6x4)": ["0"], "* (4x6)": ["1"]}


def test_only_whole_numbers_are_block_numbers() -> None:
    """`fc1` and `fc2` are two roles: a digit inside a name is no block number."""
    model = nn.ModuleList([nn.ModuleDict({"fc1": nn.Linear(4, 4), "fc2": nn.Linear(4, 4)}) for _ in range(11)])
    groups = group_linears(model)
    assert list(groups) == ["*.fc1", "*.fc2"]
    assert groups["*.fc1"] == [f"{i}.fc1" for i in range(11)]  # 10 after 9, not after 1


def test_sparsegrad_layers_are_linear_layers() -> None:
    """A refresh calibrates a model whose layers have been replaced."""
    layer = SparseGradLinear.from_linear(nn.Linear(3, 5), Basis.identity())
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(5, 3))
    assert group_linears(model) == {"0": ["0"], "2": ["2"]}
    assert linear_shape(layer, "0") == (5, 3)


def test_nothing_found_names_what_there_is(bert: BertModel) -> None:
    with pytest.raises(ValueError, match=r"target_modules=\['fc1'\] matches no linear layer; .*\.self\.query, .*key"):
        group_linears(bert, ["fc1"])
    with pytest.raises(ValueError, match="matches no linear layer; the model has: none at all"):
        group_linears(nn.Sequential(nn.ReLU()))


def test_shape_of_what_is_not_linear() -> None:
    with pytest.raises(TypeError, match=r"conv: expected a torch\.nn\.Linear or a Conv1D, found Conv1d"):
        linear_shape(nn.Conv1d(2, 2, 1), "conv")  # torch's convolution, not GPT-2's layer
    with pytest.raises(TypeError, match=r"emb: .*found Embedding"):
        linear_shape(nn.Embedding(3, 3), "emb")
    assert linear_shape(nn.Linear(3, 5, device=torch.device("meta")), "meta") == (5, 3)


def test_numbers_inside_a_sequential_are_no_block_numbers() -> None:
    """Two square layers of one `Sequential` have different roles; two layers in a `ModuleList` have the same."""
    model = nn.ModuleDict({
        "blocks": nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(2)),
        "experts": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)),
    })  # fmt: skip
    assert group_linears(model) == {
        "blocks.*.0": ["blocks.0.0", "blocks.1.0"],
        "blocks.*.2": ["blocks.0.2", "blocks.1.2"],
        "experts.*": ["experts.0", "experts.1", "experts.2"],
    }
    assert group_linears(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == {"0": ["0"], "1": ["1"]}
