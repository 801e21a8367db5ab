"""Damaged adapters are refused in every way of loading; and so are adapters that were not loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers import TF32, logits, max_difference, tiny_batch, tiny_model, trained_adapter, tuner_layers
from sparsegrad_peft import SparseGradConfig, calibrate_adapter, export_lora
from sparsegrad_peft.tuner.checks import check_side

LAYER = "base_model.model.bert.encoder.layer.1.output.dense"
S, U, V = f"{LAYER}.sparsegrad_S", f"{LAYER}.sparsegrad_basis.U", f"{LAYER}.sparsegrad_basis.V"


def nan(value: Tensor) -> Tensor:
    value[0, 0] = torch.nan
    return value


def infinite(value: Tensor) -> Tensor:
    value[-1, -1] = torch.inf
    return value


def stretched(value: Tensor) -> Tensor:
    value[1] *= 1.2
    return value


def repeated(value: Tensor) -> Tensor:
    value[1] = value[0]
    return value


DAMAGES: dict[str, tuple[str, Callable[[Tensor], Tensor | None], str]] = {
    "S nan": (S, nan, "1 of its .* numbers are not finite"),
    "U inf": (U, infinite, "not finite"),
    "V nan": (V, nan, "not finite"),
    "U stretched": (U, stretched, "not orthonormal"),
    "V repeated": (V, repeated, "not orthonormal"),
    "U zero": (U, torch.zeros_like, "not orthonormal"),
    "S int": (S, lambda value: value.to(torch.int32), "expected a floating-point matrix, found torch.int32"),
    "S bool": (S, lambda value: value.bool(), "found torch.bool"),
    "U int": (U, lambda value: value.to(torch.int8), "found torch.int8"),
    "S flat": (S, lambda value: value.flatten().clone(), "of shape"),
    "S missing": (S, lambda _: None, "also has bert.encoder.layer.1.output.dense"),
    "U missing": (U, lambda _: None, "the weights hold V for bert.encoder.layer.1.output.dense"),
    "V missing": (V, lambda _: None, "the weights hold U for bert.encoder.layer.1.output.dense"),
    "S narrow": (S, lambda value: value[:, 1:].clone(), "the tensors of the file do not belong together"),
    "U short": (U, lambda value: value[1:].clone(), "the tensors of the file do not belong together"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    trained_adapter("bert")[0].save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(saved: Path, tmp_path: Path) -> Path:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def damage(folder: Path, kind: str) -> str:
    """Damage one tensor of the file; return what the error must say."""
    key, change, message = DAMAGES[kind]
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = change(tensors.pop(key))
    if changed is not None:
        tensors[key] = changed
    save_file(tensors, folder / "adapter_model.safetensors")
    return message


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_peft_refuses(kind: str, copy_of: Path) -> None:
    message = damage(copy_of, kind)
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        PeftModel.from_pretrained(tiny_model("bert"), copy_of)
    assert "layer.1.output.dense" in str(caught.value)
    other = get_peft_model(tiny_model("bert"), SparseGradConfig())
    before = [parameter.shape for parameter in other.parameters()]
    with pytest.raises((TypeError, ValueError)):
        other.load_adapter(str(copy_of), "default")
    assert [parameter.shape for parameter in other.parameters()] == before


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind not in ("S bool", "S int")])
def test_transformers_or_the_first_use_refuses(kind: str, copy_of: Path) -> None:
    """transformers' loader has no hook for the file; what it leaves wrong is found at the first use."""
    damage(copy_of, kind)
    model = tiny_model("bert")

    def load_and_use() -> None:
        model.load_adapter(str(copy_of))
        model(**tiny_batch("bert"))

    with pytest.raises((RuntimeError, TypeError, ValueError)):
        load_and_use()


@pytest.mark.parametrize("kind", list(DAMAGES))
def test_export_refuses(kind: str, copy_of: Path, tmp_path: Path) -> None:
    damage(copy_of, kind)
    with pytest.raises(ValueError, match=r"damaged|do not (belong together|fit)|expected a vector"):
        export_lora(copy_of, tmp_path / "lora", "full")


@pytest.mark.parametrize(
    "shape",
    [["x", 20_000_000, 8, 32, 16], ["x", 8, 17, 32, 16], ["x", 0, 8, 32, 16], ["x", True, 8, 32, 16], ["x", 8, 8], 3,
     [1, 8, 8, 32, 16], ["x", "8", 8, 32, 16]],
)  # fmt: skip
def test_sizes_in_the_config_are_checked_before_anything_is_allocated(shape: object, copy_of: Path) -> None:
    path = copy_of / "adapter_config.json"
    config = json.loads(path.read_text())
    config["core_shapes"]["bert.encoder.layer.0.intermediate.dense"] = shape
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"core_shapes of the adapter's config is damaged: bert.encoder.layer.0"):
        PeftModel.from_pretrained(tiny_model("bert"), copy_of)


def test_an_adapter_that_was_not_loaded_is_refused_in_every_use(saved: Path, tmp_path: Path) -> None:
    """The config of a saved adapter, taken for a new one."""
    config = SparseGradConfig.from_pretrained(saved)
    config.inference_mode = False
    model = get_peft_model(tiny_model("bert"), config)
    uses: list[Callable[[], object]] = [
        lambda: logits(model.eval(), tiny_batch("bert")),
        lambda: model.train()(**tiny_batch("bert")),
        lambda: logits(model.eval(), tiny_batch("bert"), adapter_names=["default"] * 4),
        lambda: model.save_pretrained(tmp_path),
        lambda: calibrate_adapter(model, [tiny_batch("bert")], progress=False),
        lambda: model.merge_adapter(),
    ]
    for use in uses:
        with pytest.raises(RuntimeError, match=r"'default' cannot be used: S is damaged.*not loaded.*forget_b"):
            use()
    model.load_adapter(str(saved), "default")
    expected = PeftModel.from_pretrained(tiny_model("bert"), saved).eval()
    assert max_difference(logits(model.eval(), tiny_batch("bert")), logits(expected, tiny_batch("bert"))) == 0
    config.forget_bases()
    calibrate_adapter(get_peft_model(tiny_model("bert"), config), [tiny_batch("bert")], n_steps=2, progress=False)


@pytest.mark.parametrize("name", ["copy", "get", "keys", "training", "a.b", "U", "scale_in"])
def test_names_that_pytorch_uses_itself(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        get_peft_model(tiny_model("bert"), SparseGradConfig(), adapter_name=name)
    model = get_peft_model(tiny_model("bert"), SparseGradConfig())
    with pytest.raises(ValueError, match="cannot be the name of an adapter"):
        model.add_adapter(name, SparseGradConfig())
    assert list(model.peft_config) == ["default"]
    assert all(list(layer.sparsegrad_S) == ["default"] for layer in tuner_layers(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "n"), [(1, 1), (8, 8), (300, 1024)])
def test_honest_bases_pass(rows: int, n: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check_side(torch.linalg.qr(torch.randn(n, rows))[0].T.to(dtype), "U")


def test_honest_bases_pass_where_tf32_is_allowed() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with TF32():
            check_side(torch.linalg.qr(torch.randn(40, 40))[0].T, "U")
    finally:
        torch.set_float32_matmul_precision("highest")
