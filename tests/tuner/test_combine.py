"""What PEFT offers beyond the life of one adapter: weighted sums, hot swaps, compiled models."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from torch import Tensor, nn

from helpers import cores, logits, max_difference, tiny_batch, tiny_model, train_adapter, trained_adapter, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter
from sparsegrad_peft.method.sides import is_selected


def deltas(model: nn.Module, adapter: str) -> list[Tensor]:
    with torch.no_grad():
        return [layer.get_delta_weight(adapter) for layer in tuner_layers(model)]


def pair(kind: str = "bert", *, calibrated: bool = True) -> PeftModel:
    """Adapters "one" and "two", from the same statistics and trained apart."""
    options = {"c": 0.5, "r": 0.25, "shared": True, "original_space": not calibrated}
    model = get_peft_model(tiny_model(kind), SparseGradConfig(**options), "one")
    model.add_adapter("two", SparseGradConfig(**options))
    if calibrated:
        statistics = calibrate_adapter(model, [tiny_batch(kind)], adapter_name="one", n_steps=3, progress=False)
        calibrate_adapter(model, adapter_name="two", calibration=statistics)
    for name, lr in (("one", 0.02), ("two", 0.1)):
        model.set_adapter(name)
        train_adapter(model, tiny_batch(kind), 2, lr)
    return model.eval()


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("calibrated", [True, False])
def test_weighted_sum(kind: str, calibrated: bool, tmp_path: Path) -> None:
    data = tiny_batch(kind)
    model = pair(kind, calibrated=calibrated)
    before = logits(model, data)
    model.add_weighted_adapter(["one", "two"], [2.0, -0.5], "sum")
    assert model.active_adapters == ["two"]
    assert max_difference(logits(model, data), before) == 0
    for one, two, both in zip(*(deltas(model, name) for name in ("one", "two", "sum")), strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(both, 2 * one - 0.5 * two)
    assert not any(core.requires_grad for core in cores(model, "sum"))
    model.set_adapter("sum")
    expected = logits(model, data)
    assert max_difference(expected, before) > 1e-4
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "sum")).eval()
    assert max_difference(logits(loaded, data), expected) == 0
    model.delete_adapter("one")
    model.delete_adapter("two")
    assert max_difference(logits(model, data), expected) == 0
    train_adapter(model, data, 1)  # it is an adapter like any other
    assert max_difference(logits(model, data), expected) > 1e-5


def test_a_weighted_sum_has_bases_of_its_own() -> None:
    """Weights loaded into an adapter are copied into its bases; that must not reach another adapter."""
    model = pair()
    model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "sum")
    assert len({id(layer.sparsegrad_basis["sum"]) for layer in tuner_layers(model)}) == 2
    for layer in tuner_layers(model):
        mine, theirs = layer.sparsegrad_basis["sum"], layer.sparsegrad_basis["one"]
        assert torch.equal(mine.U, theirs.U)
        assert mine.U.data_ptr() != theirs.U.data_ptr()
    assert model.peft_config["sum"].core_shapes == model.peft_config["one"].core_shapes
    assert model.peft_config["sum"].core_shapes is not model.peft_config["one"].core_shapes


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("c", [0.25, 0.75])  # 0.75 of both is more than there is
def test_weighted_sum_of_adapters_with_bases_of_their_own(kind: str, shared: bool, c: float, tmp_path: Path) -> None:
    """Each calibrated by itself, as adapters for two tasks are."""
    model = get_peft_model(tiny_model(kind), SparseGradConfig(c=c, r=0.25, shared=True), "one")
    model.add_adapter("two", SparseGradConfig(c=c, r=0.5, shared=shared))
    data = tiny_batch(kind)
    for name, on in (("one", data), ("two", {key: value.flip(-1) for key, value in data.items()})):
        model.set_adapter(name)
        calibrate_adapter(model, [on], adapter_name=name, n_steps=3, training=False, progress=False)
        train_adapter(model, data, 2)
    model.eval().add_weighted_adapter(["one", "two"], [2.0, -0.5], "sum", combination_type="cat")
    for one, two, both in zip(*(deltas(model, name) for name in ("one", "two", "sum")), strict=True):
        assert one.abs().max() > 0
        assert two.abs().max() > 0
        torch.testing.assert_close(both, 2 * one - 0.5 * two, rtol=1e-4, atol=1e-6)
    for layer in tuner_layers(model):
        basis = layer.core_and_basis("sum")[1]
        rows = min(layer.in_features, 2 * round(c * layer.in_features))
        assert (len(basis.U), len(basis.V)) == (rows, round(0.75 * layer.out_features))
    bases = {id(layer.core_and_basis("sum")[1]) for layer in tuner_layers(model)}
    assert len(bases) == (2 if shared else len(tuner_layers(model)))

    model.set_adapter("sum")
    expected = logits(model, data)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "sum")).eval()
    assert max_difference(logits(loaded, data), expected) < 1e-6
    assert max_difference(logits(loaded.merge_and_unload(), data), expected) < 1e-5
    train_adapter(model, data, 1)  # it is an adapter like any other
    assert max_difference(logits(model, data), expected) > 1e-5


@pytest.mark.parametrize("neurons", [True, False])
def test_joined_neurons_stay_a_selection(neurons: bool, tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("bert"), SparseGradConfig(narrow=4, wide=6), "one")
    model.add_adapter("two", SparseGradConfig(narrow=3, wide=8, neurons=neurons))
    data = tiny_batch("bert")
    for name in ("one", "two"):
        model.set_adapter(name)
        calibrate_adapter(model, [data], adapter_name=name, n_steps=3, training=name == "one", progress=False)
        train_adapter(model, data, 2)
    model.eval().add_weighted_adapter(["one", "two"], [2.0, -0.5], "sum", combination_type="cat")
    for one, two, both in zip(*(deltas(model, name) for name in ("one", "two", "sum")), strict=True):
        torch.testing.assert_close(both, 2 * one - 0.5 * two, rtol=1e-4, atol=1e-6)
    for layer in tuner_layers(model):
        sides = [layer.core_and_basis(name)[1] for name in ("one", "two", "sum")]
        first, second, joined = (basis.V if layer.out_features > layer.in_features else basis.U for basis in sides)
        assert is_selected(joined) is neurons
        if neurons:
            assert joined.tolist() == sorted({*first.tolist(), *second.tolist()})
    model.set_adapter("sum")
    expected = logits(model, data)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "sum")).eval()
    assert max_difference(logits(loaded, data), expected) < 1e-6


def test_weighted_sums_that_are_refused() -> None:
    model = pair()
    model.add_adapter("other", SparseGradConfig(c=0.5, r=0.25))
    data = {key: value.flip(-1) for key, value in tiny_batch("bert").items()}
    model.set_adapter("other")
    calibrate_adapter(model, [data], adapter_name="other", n_steps=3, progress=False)
    model.add_adapter("bare", SparseGradConfig(original_space=True))
    model.add_adapter("fewer", SparseGradConfig(target_modules=["intermediate.dense"]))
    names = list(model.peft_config)
    for adapters, weights, words in (
        (
            ["one", "other"],
            [1, 1],
            r"'one' and 'other' have different bases in .*layer.0.intermediate.dense.*\"linear\" needs .*\"cat\"",
        ),
        (["one", "bare"], [1, 1], r"'one' and 'bare' have different bases"),
        (["one", "fewer"], [1, 1], r"'one' and 'fewer' adapt different layers, such as .*output.dense"),
        (["one", "none"], [1, 1], r"no adapter named none; there are one, two"),
        (["one"], [1, 1], r"expected adapters and as many finite weights"),
        (["one"], ["1"], r"expected adapters and as many finite weights, found \['one'\] and \['1'\]"),
        (["one"], [None], r"expected adapters and as many finite weights, found \['one'\] and \[None\]"),
        (["one"], 1.0, r"expected adapters and as many finite weights, found \['one'\] and 1.0"),
        (["one"], [10**400], r"expected adapters and as many finite weights"),
        (
            ["one", "two"],
            [1e39, 1.0],
            r"the sum with weights \[1e\+39, 1.0\] is not finite in .*intermediate.dense; exp",
        ),
        ([], [], r"expected adapters"),
        (["one"], [float("nan")], r"finite weights"),
    ):
        with pytest.raises(ValueError, match=words):
            model.add_weighted_adapter(adapters, weights, "sum")
    for name in ("", 3):
        with pytest.raises(ValueError, match=f"expected a text as the name of an adapter, found {name!r}"):
            model.add_weighted_adapter(["one"], [1.0], name)
    with pytest.raises(ValueError, match="already has an adapter named 'two'"):
        model.add_weighted_adapter(["one"], [1.0], "two")
    with pytest.raises(ValueError, match=r'combination_type must be "linear" or "cat", found .svd.'):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum", combination_type="svd")
    with pytest.raises(ValueError, match="'bare' has no bases, its cores are as large as the layers"):
        model.add_weighted_adapter(["one", "bare"], [1, 1], "sum", combination_type="cat")
    with pytest.raises(ValueError, match="'one' and 'fewer' adapt different layers"):
        model.add_weighted_adapter(["one", "fewer"], [1, 1], "sum", combination_type="cat")
    assert list(model.peft_config) == names
    assert all("sum" not in layer.sparsegrad_S for layer in tuner_layers(model))


def test_weighted_sum_with_a_head_is_refused() -> None:
    model, _ = trained_adapter("bert", task_type="SEQ_CLS")
    with pytest.raises(ValueError, match=r"modules that are trained whole \(.*classifier\) and cannot be summed"):
        model.add_weighted_adapter(["default"], [0.5], "sum")


def test_hotswap_is_refused_by_peft(tmp_path: Path) -> None:
    """PEFT swaps LoRA adapters only, and says so; loading into an adapter that is there swaps one of the same size."""
    model, _ = trained_adapter("bert", shared=True)
    other = pair()
    before = logits(model, tiny_batch("bert"))
    other.save_pretrained(tmp_path, selected_adapters=["two"])
    with pytest.raises(ValueError, match=r"Hotswapping only supports .* but SPARSEGRAD was passed"):
        hotswap_adapter(model, str(tmp_path / "two"), "default")
    assert max_difference(logits(model, tiny_batch("bert")), before) == 0
    held = cores(model)
    model.load_adapter(str(tmp_path / "two"), "default")
    assert all(a is b for a, b in zip(cores(model), held, strict=True))  # so nothing is compiled anew
    assert max_difference(logits(model, tiny_batch("bert")), logits(other, tiny_batch("bert"))) == 0


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own, while tracing
@pytest.mark.parametrize(("kind", "calibrated"), [("bert", True), ("bert", False), ("llama", True)])
def test_compiled(kind: str, calibrated: bool) -> None:
    """One graph without breaks, forward and backward, and the same numbers; the warning comes all the same."""
    model, _ = trained_adapter(kind, calibrated=calibrated, trained=2 * calibrated)
    data: dict[str, Any] = tiny_batch(kind)
    if kind == "llama":
        data["use_cache"] = False
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    results = []
    try:
        for run in (model, compiled):
            with nullcontext() if calibrated else pytest.warns(UserWarning, match="was not calibrated"):
                output = run.train()(**data)
            output.loss.backward()
            grads = [core.grad for core in cores(run)]
            results.append((output.logits.detach(), grads, logits(run.eval(), data)))
    finally:
        torch._dynamo.reset()
    (mine, mine_grads, mine_eval), (theirs, their_grads, their_eval) = results
    torch.testing.assert_close(theirs, mine)
    torch.testing.assert_close(their_eval, mine_eval)
    assert all(grad.abs().max() > 0 for grad in mine_grads)
    torch.testing.assert_close(their_grads, mine_grads, rtol=1e-4, atol=1e-6)


def test_compiled_and_never_loaded() -> None:
    """Refused when it is compiled, and not a NaN in each step. An export, which has no numbers, goes through."""
    model, base = trained_adapter("bert", trained=0)
    empty = get_peft_model(base, copy.deepcopy(model.peft_config["default"])).eval()
    data = {"input_ids": tiny_batch("bert")["input_ids"]}
    try:
        with pytest.raises(RuntimeError, match="adapter 'default' cannot be used: S is damaged"):
            torch.compile(empty, backend="eager")(**data)
        torch.export.export(empty, (), data)
    finally:
        torch._dynamo.reset()
