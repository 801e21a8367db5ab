"""Layers of a model are replaced and restored; refusals leave the model as it was; the optimizer gets its groups."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from helpers import orthogonal, tiny_batch, tiny_model, train
from sparsegrad_peft import (
    Basis,
    LiteralSparseGradLinear,
    SparseGradAdamW,
    SparseGradLinear,
    calibrate,
    group_linears,
    param_groups,
    replace_linears,
    restore_linears,
    weight_bases,
)
from sparsegrad_peft.method.groups import linear_shape

MLP = r".*layer\.\d+\.(intermediate|output)\.dense"
HIDDEN, INNER, LAYERS = 16, 24, 3
F32 = torch.float32
KINDS = pytest.mark.parametrize("kind", ["complete", "truncated", "packed", "literal"])


@pytest.fixture
def bert() -> BertForSequenceClassification:
    """A small BERT with random weights and no dropout."""
    config = BertConfig(
        vocab_size=50, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=INNER,
        max_position_embeddings=16, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def bases_for(model: nn.Module, groups: dict[str, list[str]], rows: int | None = None) -> dict[str, Basis]:
    bases = {}
    for group, names in groups.items():
        out, in_ = linear_shape(model.get_submodule(names[0]), names[0])
        bases[group] = Basis(orthogonal(in_, rows, F32), orthogonal(out, rows, F32))
    return bases


def surgery(model: nn.Module, kind: str, layers: str = MLP) -> dict[str, nn.Module]:
    groups = group_linears(model, layers)
    bases = bases_for(model, groups, 5 if kind == "truncated" else None)
    if kind == "literal":
        return replace_linears(model, groups, bases, LiteralSparseGradLinear.from_linear, density=0.05)
    if kind == "packed":
        return replace_linears(model, groups, bases, positions=torch.arange(0, 380, 19))
    return replace_linears(model, groups, bases)


def batch(size: int = 4) -> dict[str, Tensor]:
    """A batch with padding in half of the rows."""
    mask = torch.ones(size, 7, dtype=torch.long)
    mask[::2, 5:] = 0
    return {
        "input_ids": torch.randint(50, (size, 7)),
        "attention_mask": mask,
        "labels": torch.randint(3, (size,)),
    }


def batches(steps: int = 4) -> Iterator[dict[str, Tensor]]:
    return (batch() for _ in range(steps))


def logits(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def picture(model: nn.Module) -> dict[str, tuple[int, type, bool]]:
    """Return the identities of the modules and parameters that a model consists of."""
    objects: dict[str, Any] = dict(model.named_modules()) | dict(model.named_parameters())
    return {name: (id(what), type(what), getattr(what, "requires_grad", False)) for name, what in objects.items()}


# replace_linears


@KINDS
def test_replacing_leaves_the_output(bert: nn.Module, kind: str) -> None:
    """Equal to the bit, except for the literal form, which rotates the weight there and back."""
    given = batch()
    before = logits(bert, given)
    surgery(bert, kind)
    after = logits(bert, given)
    if kind == "literal":
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    else:
        assert torch.equal(after, before)


@KINDS
def test_the_layers_of_a_group_share_one_basis_module(bert: nn.Module, kind: str) -> None:
    groups = group_linears(bert, MLP)
    assert [len(names) for names in groups.values()] == [LAYERS, LAYERS]
    made = surgery(bert, kind)
    assert list(made) == [name for names in groups.values() for name in names]
    shared = []
    for names in groups.values():
        for name in names:
            assert bert.get_submodule(name) is made[name]
            assert made[name].basis is made[names[0]].basis  # type: ignore[comparison-overlap]
        shared.append(made[names[0]].basis)
    assert shared[0] is not shared[1]


def test_a_shared_basis_stays_shared_when_the_model_is_moved_or_copied(bert: nn.Module) -> None:
    surgery(bert, "complete")
    for model in (copy.deepcopy(bert), bert.to(torch.float64), bert.half()):
        layers = [module for module in model.modules() if isinstance(module, SparseGradLinear)]
        assert len(layers) == 2 * LAYERS
        assert len({id(layer.basis) for layer in layers}) == 2
        assert {layer.basis.U.dtype for layer in layers} == {torch.float32}


def test_a_shared_basis_is_saved_once(bert: nn.Module) -> None:
    """The state dict is complete: a model with other weights and bases becomes equal by loading it."""
    config, given = bert.config, batch()
    surgery(bert, "complete")
    train(bert, SparseGradAdamW(param_groups(bert, k=9), lr=1e-2), batches())
    state = bert.state_dict()
    assert sum(name.endswith("basis.U") for name in state) == sum(name.endswith("basis.V") for name in state) == 2
    other = BertForSequenceClassification(config)
    surgery(other, "complete")
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other, given), logits(bert, given))


def test_a_shared_basis_is_saved_when_the_layer_that_saved_it_is_removed(bert: nn.Module) -> None:
    """Pruned models lose their first blocks, which hold the bases of all."""
    config, given = bert.config, batch()
    other = BertForSequenceClassification(config)
    for model in (bert, other):
        surgery(model, "complete")
    train(bert, SparseGradAdamW(param_groups(bert, k=9), lr=1e-2), batches())
    for model in (bert, other):
        del model.bert.encoder.layer[0]
    state = bert.state_dict()
    assert sum(name.endswith("basis.U") for name in state) == 2
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other, given), logits(bert, given))


def test_nothing_else_of_the_model_changes(bert: nn.Module) -> None:
    before = picture(bert)
    made = surgery(bert, "complete")
    after = picture(bert)
    for name, what in before.items():
        if name in made or name.rpartition(".")[0] in made:
            continue
        assert after[name] == what, name
    for name in made:
        assert after[f"{name}.bias"] == before[f"{name}.bias"]


@pytest.mark.parametrize("change", ["missing", "extra", "renamed"])
def test_groups_and_bases_must_match(bert: nn.Module, change: str) -> None:
    groups = group_linears(bert, MLP)
    bases = bases_for(bert, groups)
    first = next(iter(bases))
    if change != "extra":
        basis = bases.pop(first)
    if change != "missing":
        bases["other"] = basis if change == "renamed" else Basis.identity()
    before = picture(bert)
    with pytest.raises(ValueError, match=r"expected a basis for each group, found groups \[.*\] and bases \["):
        replace_linears(bert, groups, bases)
    assert picture(bert) == before


def test_layers_of_a_group_on_two_devices() -> None:
    """Each device has a copy of the basis, as with `device_map`; `meta` stands for a second GPU."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    model[2:].to("meta")
    basis = Basis(torch.eye(8)[:3], torch.eye(8)[:2])
    new = replace_linears(model, {"g": [*"0123"]}, {"g": basis})
    assert [layer.basis.U.device.type for layer in new.values()] == ["cpu", "cpu", "meta", "meta"]
    assert len({id(layer.basis) for layer in new.values()}) == 2


def test_the_bases_of_plain_weights_on_two_devices() -> None:
    """As after a calibration with `gram_device="cpu"`; `meta` stands for a GPU."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    model[1:].to("meta")
    basis = Basis(torch.eye(8)[:3], torch.eye(8)[:2])
    first, *others = weight_bases(model, {"g": [*"012"]}, {"g": basis}).values()
    assert first is basis
    assert others[0] is others[1]
    assert others[0].U.device.type == "meta"


def test_a_shared_basis_in_data_parallel_is_refused() -> None:
    """`nn.DataParallel` copies registered modules to the other GPUs, and no references."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    first, second = replace_linears(model, {"g": ["0", "1"]}, {"g": Basis(torch.eye(4)[:3], torch.eye(4)[:2])}).values()
    assert first._replicate_for_data_parallel() is not first
    with pytest.raises(NotImplementedError, match=r"share a basis in torch\.nn\.DataParallel"):
        second._replicate_for_data_parallel()


def test_a_layer_that_is_not_there(bert: nn.Module) -> None:
    groups = {"g": ["bert.encoder.layer.0.intermediate.dense", "bert.encoder.layer.9.intermediate.dense", "nowhere"]}
    before = picture(bert)
    with pytest.raises(ValueError, match=r"no modules named bert\.encoder\.layer\.9\.intermediate\.dense, nowhere"):
        replace_linears(bert, groups, {"g": Basis.identity()})
    assert picture(bert) == before


def test_a_layer_in_two_groups(bert: nn.Module) -> None:
    name = "bert.encoder.layer.0.intermediate.dense"
    before = picture(bert)
    with pytest.raises(
        ValueError, match=f"expected each layer once in the groups, found it several times: {name}, {name}"
    ):
        replace_linears(bert, {"a": [name], "b": [name]}, {"a": Basis.identity(), "b": Basis.identity()})
    assert picture(bert) == before


@pytest.mark.parametrize("fails_at", [1, 3, 2 * LAYERS])
def test_a_make_that_fails_leaves_the_model_as_it_was(bert: nn.Module, fails_at: int) -> None:
    calls = 0

    def make(linear: nn.Module, basis: Basis, **options: Any) -> nn.Module:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("out of memory")
        return SparseGradLinear.from_linear(linear, basis, **options)

    groups, given, before = group_linears(bert, MLP), batch(), picture(bert)
    output = logits(bert, given)
    with pytest.raises(RuntimeError, match="out of memory"):
        replace_linears(bert, groups, bases_for(bert, groups), make)
    assert calls == fails_at
    assert picture(bert) == before
    assert torch.equal(logits(bert, given), output)


@pytest.mark.parametrize(
    ("layer", "options", "error", "words"),
    [
        ("LayerNorm", {}, TypeError, "expected a torch.nn.Linear or a Conv1D, found LayerNorm"),
        ("dense", {"positions": torch.tensor([10**6])}, ValueError, "expected positions between 0 and"),
        ("dense", {"prefer": "nothing"}, ValueError, "prefer must be"),
    ],
)
def test_a_layer_that_cannot_be_made_leaves_the_model_as_it_was(
    bert: nn.Module, layer: str, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    """The first of the two layers can be made."""
    names = ["classifier", f"bert.encoder.layer.0.output.{layer}"]
    before = picture(bert)
    with pytest.raises(error, match=words):
        replace_linears(
            bert, {"a": names[:1], "b": names[1:]}, {"a": Basis.identity(), "b": Basis.identity()}, **options
        )
    assert picture(bert) == before


def test_a_replaced_layer_is_not_replaced_again(bert: nn.Module) -> None:
    surgery(bert, "complete")
    before = picture(bert)
    with pytest.raises(TypeError, match="found SparseGradLinear"):
        surgery(bert, "complete")
    assert picture(bert) == before


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class SameForward(nn.Linear):
    """A subclass with the forward of its parent, as other libraries have it."""


def unusual(kind: str) -> nn.Linear:
    linear = Doubled(4, 3) if kind == "subclass" else nn.Linear(4, 3)
    if kind == "wrapped":  # as accelerate's hooks do
        forward = linear.forward
        linear.forward = lambda x: 2 * forward(x)
    elif kind == "parametrized":
        nn.utils.parametrizations.weight_norm(linear)
    elif kind == "pruned":
        prune.l1_unstructured(linear, "weight", 0.5)
    elif kind == "state dict hook":
        linear.register_state_dict_post_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("subclass", "0: expected a plain linear layer, found a Doubled with a forward of its own"),
        ("wrapped", "0: expected a plain linear layer, found a Linear with a forward of its own"),
        ("parametrized", "0: expected a ParametrizedLinear with a weight of its own, found one that is computed"),
        ("pruned", "0: expected a Linear with a weight of its own, found one that is computed"),
        ("state dict hook", "0: expected a Linear without hooks on its state dict"),
    ],
)
@pytest.mark.parametrize("make", [SparseGradLinear.from_linear, LiteralSparseGradLinear.from_linear])
def test_a_layer_that_does_more_is_refused(kind: str, words: str, make: Callable[..., nn.Module]) -> None:
    model = nn.Sequential(unusual(kind))
    x, linear = torch.randn(2, 4), model[0]
    output = model(x)
    options = {"k": 1} if make != SparseGradLinear.from_linear else {}
    with pytest.raises(TypeError, match=words):
        replace_linears(model, {"g": ["0"]}, {"g": Basis(torch.eye(4), torch.eye(3))}, make, **options)
    assert model[0] is linear
    assert torch.equal(model(x), output)


def test_a_subclass_with_its_parents_forward_is_replaced() -> None:
    model = nn.Sequential(SameForward(4, 3))
    x = torch.randn(2, 4)
    output = model(x)
    replace_linears(model, {"g": ["0"]}, {"g": Basis.identity()})
    assert torch.equal(model(x), output)


def test_hooks_of_a_replaced_layer_stay() -> None:
    """Forward, forward-pre and backward hooks, with keywords and always called. Their handles still remove them."""
    model = nn.Sequential(nn.Linear(4, 3))
    called: list[str] = []
    handles = [
        model[0].register_forward_pre_hook(lambda module, args: (2 * args[0],)),
        model[0].register_forward_hook(lambda module, args, kwargs, output: output + 1, with_kwargs=True),
        model[0].register_forward_hook(lambda *_: called.append("always"), always_call=True),
        model[0].register_full_backward_pre_hook(lambda *_: called.append("backward pre")),
        model[0].register_full_backward_hook(lambda module, grad_input, grad_output: (3 * grad_input[0],)),
    ]

    def run() -> tuple[Tensor, Tensor, list[str]]:
        called.clear()
        x = torch.ones(2, 4, requires_grad=True)
        y = model(x)
        y.sum().backward()
        assert x.grad is not None
        return y.detach(), x.grad, list(called)

    expected = run()
    assert expected[2] == ["always", "backward pre"]
    for change in (
        lambda: replace_linears(model, {"g": ["0"]}, {"g": Basis.identity()}),
        lambda: restore_linears(model),
    ):
        change()
        found = run()
        torch.testing.assert_close(found[:2], expected[:2])
        assert found[2] == expected[2]
    for handle in handles:
        handle.remove()
    found = run()
    torch.testing.assert_close(found[0], functional.linear(torch.ones(2, 4), model[0].weight, model[0].bias).detach())
    assert found[2] == []


def test_a_model_that_is_itself_the_layer() -> None:
    """No module holds the layer, so it cannot be replaced in place."""
    linear = nn.Linear(4, 3)
    with pytest.raises(ValueError, match="the model is itself the layer"):
        replace_linears(linear, group_linears(linear), {"": Basis.identity()})
    layer = SparseGradLinear.from_linear(linear, Basis.identity())
    with pytest.raises(ValueError, match="the model is itself the layer"):
        restore_linears(layer)
    assert [name for name, _ in layer.named_children()] == ["basis"]
    assert not list(linear.children())


# restore_linears


@KINDS
def test_restoring_gives_the_plain_model_back(bert: nn.Module, kind: str) -> None:
    """After training: the trained model's output, and the original's classes, names and shapes."""
    original = copy.deepcopy(bert)
    surgery(bert, kind)
    given = batch()
    untrained = logits(bert, given)
    density = None if kind in ("packed", "literal") else 0.1
    train(bert, SparseGradAdamW(param_groups(bert, density=density), lr=1e-2), batches())
    trained = logits(bert, given)
    assert not torch.allclose(trained, untrained, atol=1e-3)

    assert restore_linears(bert) == 2 * LAYERS
    assert [(name, type(module)) for name, module in bert.named_modules()] == [
        (name, type(module)) for name, module in original.named_modules()
    ]
    torch.testing.assert_close(logits(bert, given), trained, rtol=0, atol=1e-5)
    state = bert.state_dict()
    assert list(state) == list(original.state_dict())
    original.load_state_dict(state, strict=True)
    assert torch.equal(logits(original, given), logits(bert, given))
    assert restore_linears(bert) == 0


def test_restoring_keeps_train_and_eval_mode(bert: nn.Module) -> None:
    surgery(bert, "complete")
    bert.eval()
    restore_linears(bert)
    assert not any(module.training for module in bert.modules())


@KINDS
def test_restoring_gives_gpt2_its_own_layers_back(kind: str, tmp_path: Path) -> None:
    """Plain linear layers would be saved with weights as (out, in), which GPT-2 cannot load."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=30, n_positions=16, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    surgery(model, kind, r".*mlp\.c_(fc|proj)")
    for layer in model.modules():
        for _, core in getattr(layer, "trained_cores", tuple)():
            core.data.add_(torch.randn_like(core), alpha=0.1)
    tokens = torch.arange(10)[None]
    trained = model(tokens).logits
    assert restore_linears(model) == 4
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    torch.testing.assert_close(model(tokens).logits, trained, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(GPT2LMHeadModel.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


class Tied(nn.Module):
    """One linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def test_a_layer_under_two_names_stays_one_layer() -> None:
    """Replaced under one name only, its other use would keep the frozen weight."""
    model = Tied()
    linear = model.first
    x = torch.randn(3, 4)
    output = model(x)
    replace_linears(model, group_linears(model), {"first": Basis(orthogonal(4, dtype=F32), orthogonal(4, dtype=F32))})
    assert model.first is model.second
    assert torch.equal(model(x), output)
    with torch.no_grad():
        model.first.S.normal_()
    trained = model(x)
    assert not torch.allclose(trained, output, atol=1e-2)
    assert restore_linears(model) == 1
    assert model.first is model.second
    assert type(model.first) is nn.Linear
    assert model.first is not linear
    torch.testing.assert_close(model(x), trained, rtol=0, atol=1e-5)


# param_groups


def flags(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def cores(model: nn.Module) -> list[nn.Parameter]:
    return [
        module.W_tilde if isinstance(module, LiteralSparseGradLinear) else module.core
        for module in model.modules()
        if isinstance(module, SparseGradLinear | LiteralSparseGradLinear)
    ]


@pytest.mark.parametrize(
    ("kind", "how", "expected"),
    [
        ("complete", {"k": 9}, {"sparse": True, "k": 9, "density": None}),
        ("complete", {"density": 0.1}, {"sparse": True, "k": None, "density": 0.1}),
        ("truncated", {"k": 9}, {"sparse": True, "k": 9, "density": None}),
        ("truncated", {}, {}),
        ("packed", {}, {}),
        ("packed", {"density": 0.1}, {}),
        ("literal", {}, {"sparse": True}),
        ("literal", {"density": 0.1}, {"sparse": True}),
    ],
)
@pytest.mark.parametrize("lr", [None, 3e-3])
def test_two_groups(
    bert: nn.Module, kind: str, how: dict[str, Any], expected: dict[str, Any], lr: float | None
) -> None:
    """The cores with the flags of their kind, and the other trained parameters. Each is in exactly one group."""
    bert.bert.embeddings.requires_grad_(False)
    surgery(bert, kind)
    core_group, rest = param_groups(bert, lr=lr, **how)
    assert flags(core_group) == expected | ({} if lr is None else {"lr": lr})
    assert flags(rest) == {}
    assert [id(p) for p in core_group["params"]] == [id(p) for p in cores(bert)]
    found = [id(p) for p in core_group["params"] + rest["params"]]
    assert len(found) == len(set(found))
    assert set(found) == {id(p) for p in bert.parameters() if p.requires_grad}
    frozen = {id(p) for p in bert.bert.embeddings.parameters()}
    frozen |= {id(m.weight) for m in bert.modules() if isinstance(m, SparseGradLinear)}
    assert not frozen & set(found)
    optimizer = SparseGradAdamW([core_group, rest], lr=0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 if lr is None else lr, 0.5]


def test_all_kinds_in_one_model() -> None:
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    basis = Basis(orthogonal(6, dtype=F32), orthogonal(6, dtype=F32))
    replace_linears(model, {"b": ["0"]}, {"b": basis})
    replace_linears(model, {"p": ["1"]}, {"p": basis}, positions=torch.tensor([0, 7]))
    replace_linears(model, {"l": ["2"]}, {"l": basis}, LiteralSparseGradLinear.from_linear, k=4)
    replace_linears(model, {"f": ["3"]}, {"f": basis})
    model[3].S.requires_grad_(False)  # a core that was frozen is in no group
    block, literal, packed, rest = param_groups(model, k=5, lr=1e-2, rest_lr=1e-4, rest_weight_decay=0.01)
    assert [block["params"], literal["params"], packed["params"]] == [
        [model[0].S],
        [model[2].W_tilde],
        [model[1].values],
    ]
    assert flags(block) == {"sparse": True, "k": 5, "density": None, "lr": 1e-2}
    assert flags(literal) == {"sparse": True, "lr": 1e-2}
    assert flags(packed) == {"lr": 1e-2}
    assert flags(rest) == {"lr": 1e-4, "weight_decay": 0.01}
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in rest["params"]] == ["0.bias", "1.bias", "2.bias", "3.bias", "4.weight", "4.bias"]

    whole, rest = param_groups(model)[-2:]
    assert {names[id(p)] for p in whole["params"]} == {"0.S", "1.values"}
    assert flags(whole) == {}
    assert flags(rest) == {}


def test_without_a_rest() -> None:
    """There are no empty groups."""
    model = nn.Sequential(nn.Linear(4, 3))
    model.requires_grad_(False)
    replace_linears(model, {"g": ["0"]}, {"g": Basis.identity()})
    (only,) = param_groups(model, k=2, rest_lr=1e-3)
    assert only["params"] == [model[0].S]


@KINDS
def test_a_step_moves_what_the_groups_say(bert: nn.Module, kind: str) -> None:
    """Exactly `k` entries of each core and every other trainable parameter move; nothing frozen does."""
    bert.bert.pooler.requires_grad_(False)
    surgery(bert, kind)
    optimizer = SparseGradAdamW(param_groups(bert, **({} if kind in ("packed", "literal") else {"k": 11})), lr=1e-2)
    before = {name: p.detach().clone() for name, p in bert.named_parameters()}
    train(bert, optimizer, batches(1))
    names = {id(p): name for name, p in bert.named_parameters()}
    core_names = {names[id(core)] for core in cores(bert)}
    assert len(core_names) == 2 * LAYERS
    count = {"packed": 20, "literal": int(0.05 * HIDDEN * INNER)}.get(kind, 11)
    for name, parameter in bert.named_parameters():
        moved = int((parameter.detach() != before[name]).sum())
        if name in core_names:
            assert moved == count, name
        elif parameter.requires_grad:
            assert moved > 0, name
        else:
            assert moved == 0, name


def test_a_model_without_trainable_cores_is_refused(bert: nn.Module) -> None:
    surgery(bert, "complete")
    for core in cores(bert):
        core.requires_grad_(False)
    with pytest.raises(ValueError, match=r"all \d+ cores .* are frozen; load a PEFT adapter with is_trainable=True"):
        param_groups(bert, k=3)
    restore_linears(bert)
    with pytest.raises(ValueError, match="no SparseGrad layers; call replace_linears or, for a PEFT adapter,"):
        param_groups(bert, k=3)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"k": 3, "density": 0.1}, "exactly one of k"),
        ({"k": 10**6}, "k must be between 1"),
        ({"density": 2.0}, "density"),
    ],
)
def test_numbers_are_checked_by_the_optimizer(bert: nn.Module, how: dict[str, Any], words: str) -> None:
    surgery(bert, "complete")
    with pytest.raises(ValueError, match=f"parameter group 0, parameter of shape .*{words}"):
        SparseGradAdamW(param_groups(bert, **how))


@pytest.mark.parametrize(("kind", "square"), [("bert", "attention.output.dense"), ("gpt2", "attn.c_proj")])
def test_the_bases_of_plain_weights(kind: str, square: str) -> None:
    """GPT-2 stores its weights as (in, out), which a square one does not show."""
    model, batch = tiny_model(kind), tiny_batch(kind)
    groups = group_linears(model, [square])
    bases = calibrate(model, [batch], groups=groups, n_steps=1, training=False, progress=False).bases()
    found = weight_bases(model, groups, bases)
    model(**batch).loss.backward()
    for group, names in groups.items():
        for name in names:
            layer = model.get_submodule(name)
            G = layer.weight.grad
            expected = bases[group].to_basis(G if kind == "bert" else G.T.contiguous())
            G_tilde = found[layer.weight].to_basis(G)
            torch.testing.assert_close(G_tilde if kind == "bert" else G_tilde.T, expected)
            assert not torch.allclose(bases[group].to_basis(G.T.contiguous()), bases[group].to_basis(G))
    with pytest.raises(ValueError, match="expected a basis for each group"):
        weight_bases(model, groups, {})


def blocks(n: int = 3) -> nn.Module:
    return nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4)) for _ in range(n))


def basis_keys(model: nn.Module) -> list[str]:
    return [name for name in model.state_dict() if name.endswith("basis.U")]


def test_a_shared_basis_is_saved_when_its_first_layer_is_restored() -> None:
    model = blocks()
    groups = group_linears(model)
    bases = [Basis(orthogonal(4), orthogonal(6)), Basis(orthogonal(6), orthogonal(4))]
    replace_linears(model, groups, dict(zip(groups, bases, strict=True)))
    assert basis_keys(model) == ["0.0.basis.U", "0.1.basis.U"]
    restore_linears(model.get_submodule("0"))
    assert basis_keys(model) == ["1.0.basis.U", "1.1.basis.U"]


def test_a_basis_is_saved_once_if_its_layers_are_replaced_one_by_one() -> None:
    model, basis = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), Basis(orthogonal(4), orthogonal(4))
    for name in ("0", "1", "2"):
        replace_linears(model, {"all": [name]}, {"all": basis})
    assert basis_keys(model) == ["0.basis.U"]


def test_a_layer_that_is_never_called_is_refused() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    with pytest.raises(TypeError, match=r"attention\.out_proj: torch\.nn\.MultiheadAttention reads its weight"):
        replace_linears(model, {"all": ["attention.out_proj"]}, {"all": Basis(orthogonal(4), orthogonal(4))})


@pytest.mark.parametrize("cast", [True, False])
def test_cores_in_half_precision_are_named(cast: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4).to(torch.bfloat16))
    replace_linears(model, {"all": ["0"]}, {"all": Basis(orthogonal(4), orthogonal(4))})
    param_groups(model.to(torch.bfloat16) if cast else model)
    assert ("cores are torch.bfloat16, in which small steps change nothing" in caplog.text) is cast


@pytest.mark.parametrize("trained", [True, False])
def test_a_restored_weight_trains_if_it_did_before(trained: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).requires_grad_(trained)
    replace_linears(model, {"all": ["0"]}, {"all": Basis(orthogonal(4), orthogonal(4))})
    restore_linears(model)
    assert model[0].weight.requires_grad is model[0].bias.requires_grad is trained
