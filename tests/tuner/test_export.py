"""A saved adapter as a LoRA adapter: the same logits at full rank, the announced error below it."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers import MLP_LINEARS, TINY_MODELS, logits, tiny_batch, tiny_model
from sparsegrad_peft import SparseGradConfig, calibrate_adapter
from sparsegrad_peft.tuner.export import export_lora
from sparsegrad_peft.tuner.layer import SparseGradLayer

KINDS = list(TINY_MODELS)


def tuner_layers(model: nn.Module) -> dict[str, SparseGradLayer]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, SparseGradLayer)
    }


def saved(kind: str, folder: Path, *, calibrated: bool = True, double: bool = False, **options: Any) -> PeftModel:
    """An adapter with random cores, in `folder`."""
    base = tiny_model(kind).double() if double else tiny_model(kind)
    model = get_peft_model(base, SparseGradConfig(**{"c": 0.5, "r": 0.25, **options}))
    data = {k: v.double() if double and v.is_floating_point() else v for k, v in tiny_batch(kind).items()}
    if calibrated:
        calibrate_adapter(model, [data], n_steps=3, training=False, progress=False)
    for layer in tuner_layers(model).values():
        nn.init.normal_(layer.sparsegrad_S["default"], std=0.5)
    model.save_pretrained(folder)
    return model.eval()


def differs(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"shared": True}, {}, {"calibrated": False}], ids=["shared", "own", "uncalibrated"]
)
def test_full_rank_is_the_same_model(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    data = tiny_batch(kind)
    expected = logits(saved(kind, tmp_path / "adapter", **options), data)
    errors = export_lora(tmp_path / "adapter", tmp_path / "lora", "full", fan_in_fan_out=kind == "gpt2")
    assert len(errors) == MLP_LINEARS[kind]
    assert max(errors.values()) < 1e-6
    loaded = PeftModel.from_pretrained(tiny_model(kind), str(tmp_path / "lora"), torch_device="cpu").eval()
    assert isinstance(loaded.peft_config["default"], LoraConfig)
    assert differs(logits(loaded, data), logits(tiny_model(kind), data)) > 1e-3  # the adapter does something
    assert differs(logits(loaded, data), expected) < 1e-5


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_full_rank_in_float64(kind: str, tmp_path: Path) -> None:
    data = tiny_batch(kind)
    expected = logits(saved(kind, tmp_path / "adapter", double=True), data)
    export_lora(tmp_path / "adapter", tmp_path / "lora", "full", fan_in_fan_out=kind == "gpt2")
    loaded = PeftModel.from_pretrained(tiny_model(kind).double(), str(tmp_path / "lora")).eval()
    assert expected.dtype == torch.float64
    assert differs(logits(loaded, data), expected) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_error_is_the_true_one(kind: str, tmp_path: Path) -> None:
    """Compared with the matrices that PEFT merges, whose best approximation an SVD of the whole gives."""
    model = saved(kind, tmp_path / "adapter")
    before: dict[str, float] = {}
    for rank in (1, 2, 4):
        errors = export_lora(tmp_path / "adapter", tmp_path / "lora", rank)
        lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
        for name, layer in tuner_layers(model).items():
            delta = layer.get_delta_weight("default").detach().double()
            delta = delta.T if kind == "gpt2" else delta  # Conv1D
            A, B = (lora[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
            assert A.shape == (rank, layer.in_features)
            assert B.shape == (layer.out_features, rank)
            found = float((delta - B @ A).norm() / delta.norm())
            best = torch.linalg.svdvals(delta)
            assert errors[name] == pytest.approx(found, rel=1e-4, abs=1e-6)
            assert errors[name] == pytest.approx(float(best[rank:].norm() / best.norm()), rel=1e-4, abs=1e-6)
            assert errors[name] < before.get(name, 1.0)
        before = errors


def test_smaller_ranks_are_padded(tmp_path: Path) -> None:
    """One rank for all layers; where an update has not as many directions, the rest is zero."""
    saved("llama", tmp_path / "adapter", c=4)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    cores = [name for name in weights if "sparsegrad_S" in name]
    left, right = torch.randn(len(weights[cores[0]]), 2), torch.randn(2, 4)
    weights[cores[0]] = left @ right  # rank 2, and rounding
    weights[cores[1]].zero_()  # has learnt nothing
    save_file(weights, tmp_path / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    errors = export_lora(tmp_path / "adapter", tmp_path / "lora", "full")
    assert max(errors.values()) < 1e-6
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for core, rank in zip(cores[:3], (2, 0, 4), strict=True):
        layer = core.removesuffix(".sparsegrad_S")
        A, B = lora[f"{layer}.lora_A.weight"], lora[f"{layer}.lora_B.weight"]
        assert len(A) == B.shape[1] == 4
        assert not A[rank:].any()
        assert not B[:, rank:].any()
        assert A[:rank].any(1).all()
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora")).eval()
    original = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "adapter")).eval()
    assert differs(logits(loaded, tiny_batch("llama")), logits(original, tiny_batch("llama"))) < 1e-5


def test_adapter_that_has_learnt_nothing(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("llama"), SparseGradConfig())
    model.save_pretrained(tmp_path / "adapter")
    errors = export_lora(tmp_path / "adapter", tmp_path / "lora", "full")
    assert set(errors.values()) == {0.0}
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora")).eval()
    assert loaded.peft_config["default"].r == 1
    assert differs(logits(loaded, tiny_batch("llama")), logits(tiny_model("llama"), tiny_batch("llama"))) == 0


MIXTURES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"intermediate_size": 24, "num_key_value_heads": 2, "n_shared_experts": 1, "n_routed_experts": 3,
                    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "kv_lora_rank": 8,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    "qwen3_moe": {"intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8, "num_experts": 3,
                  "decoder_sparse_step": 2},
}  # fmt: skip
"Models of two blocks: one with a dense MLP, one with fused experts (DeepSeek: and a shared expert)."


@pytest.mark.parametrize("experts", [True, False], ids=["experts", "linears"])
@pytest.mark.parametrize("kind", MIXTURES)
def test_linears_beside_fused_experts(
    kind: str, experts: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT would take them for experts. Without adapted experts, the config of the base model tells."""
    torch.manual_seed(0)
    common = {"vocab_size": 60, "hidden_size": 16, "moe_intermediate_size": 8, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 16}  # fmt: skip
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **common, **MIXTURES[kind])).eval()
    for name, parameter in base.named_parameters():
        if ".experts." in name:
            nn.init.normal_(parameter, std=0.3)
    if not experts:
        base.config.save_pretrained(tmp_path / "base")
        base.name_or_path = str(tmp_path / "base")
    targets = {} if experts else {"target_modules": ["gate_proj", "up_proj", "down_proj"]}
    config = SparseGradConfig(narrow=4, wide=11, init_weights=False, **targets)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    model.save_pretrained(tmp_path / "adapter")
    errors = export_lora(tmp_path / "adapter", tmp_path / "lora", "full")
    linears = 6 if kind == "deepseek_v3" else 3
    assert len(errors) == linears + 2 * experts
    assert f"PEFT would take LoRA on {linears} linear layers, such as model.layers.0.mlp.down_proj" in caplog.text
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "lora")).eval()
    data = tiny_batch("llama")
    assert differs(logits(loaded, data), logits(base, data)) > 1e-3
    assert differs(logits(loaded, data), logits(model, data)) < 1e-5


@pytest.mark.parametrize("tokens", [None, [1, 5], {"word_embeddings": [1, 5]}])
def test_head_and_tokens_are_carried_over(tokens: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_batch("bert")
    data["input_ids"][:, 0] = 5
    model = get_peft_model(
        tiny_model("bert"), SparseGradConfig(task_type="SEQ_CLS", c=0.5, r=0.5, trainable_token_indices=tokens)
    )
    calibrate_adapter(model, [data], n_steps=2, training=False, progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:  # cores, head, and tokens
            nn.init.normal_(parameter, std=0.1)
    expected = logits(model.eval(), data)
    model.save_pretrained(tmp_path / "adapter")
    with caplog.at_level(logging.WARNING, "sparsegrad_peft"):
        export_lora(str(tmp_path / "adapter"), str(tmp_path / "lora"), "full")
    assert "the adapter also holds" in caplog.text
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path / "lora")).eval()
    assert loaded.peft_config["default"].task_type == "SEQ_CLS"
    assert differs(logits(loaded, data), expected) < 1e-5


@pytest.mark.parametrize("options", [{"layers_to_transform": [0, 2]}, {"exclude_modules": r".*\.1\..*"}])
def test_only_the_adapted_layers(options: dict[str, Any], tmp_path: Path) -> None:
    """Names and not endings: other layers like the adapted ones get no LoRA matrices."""
    model = saved("llama", tmp_path / "adapter", **options)
    export_lora(tmp_path / "adapter", tmp_path / "lora", "full")
    loaded = PeftModel.from_pretrained(tiny_model("llama"), str(tmp_path / "lora"))
    found = {name.rpartition(".lora_A")[0] for name in loaded.state_dict() if ".lora_A" in name}
    assert found == {f"base_model.model.{name}" for name in tuner_layers(model)}
    assert len(found) == 6


def test_what_servers_read(tmp_path: Path) -> None:
    """What vLLM, TGI and llama.cpp's converter go by: names of tensors, r, alpha, and a list of layers."""
    saved("llama", tmp_path / "adapter", task_type="CAUSAL_LM")
    export_lora(tmp_path / "adapter", tmp_path / "lora", 3)
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    layers = [f"model.layers.{i}.mlp.{which}" for i in range(3) for which in ("down_proj", "gate_proj", "up_proj")]
    with safe_open(tmp_path / "lora" / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == {f"base_model.model.{name}.lora_{s}.weight" for name in layers for s in "AB"}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (3, 3, "LORA")
    assert config["target_modules"] == layers
    assert config["modules_to_save"] is None
    assert not any((config["use_rslora"], config["use_dora"], config["rank_pattern"], config["fan_in_fan_out"]))
    assert (config["task_type"], config["inference_mode"]) == ("CAUSAL_LM", True)


def test_again_gives_the_same(tmp_path: Path) -> None:
    saved("bert", tmp_path / "adapter", task_type="SEQ_CLS")
    configs, tensors = [], []
    for rank in ("full", 2, "full"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", rank)  # type: ignore[arg-type]
        configs.append((tmp_path / "lora" / "adapter_config.json").read_bytes())
        tensors.append(load_file(tmp_path / "lora" / "adapter_model.safetensors"))
    assert configs[0] == configs[2] != configs[1]
    assert tensors[0].keys() == tensors[2].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[2][name]) for name in tensors[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "lora"]  # nothing temporary is left


def test_into_an_empty_or_new_folder(tmp_path: Path) -> None:
    saved("bert", tmp_path / "adapter")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "new" / "deep"):
        export_lora(tmp_path / "adapter", out, 1)
        assert (out / "adapter_model.safetensors").is_file()


def test_foreign_folders_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved("bert", tmp_path / "adapter")
    get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "trained")
    (tmp_path / "trained" / "README.md").unlink()  # the same two files as an export
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("adapter", "trained", "notes"):
        with pytest.raises(FileExistsError, match=r"holds .*, and is no earlier export"):
            export_lora(tmp_path / "adapter", tmp_path / name, 2)
    with pytest.raises(FileExistsError, match="is a file"):
        export_lora(tmp_path / "adapter", tmp_path / "file", 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    export_lora(tmp_path / "adapter", tmp_path / "lora", 2)
    before = {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("sparsegrad_peft.tuner.export.save_file", full)
    with pytest.raises(OSError, match="no space"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "lora").iterdir()} == before  # the former one is whole
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_rank_above_what_there_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved("bert", tmp_path / "adapter")  # cores (8, 8) and (4, 16)
    with caplog.at_level(logging.WARNING, "sparsegrad_peft"):
        export_lora(tmp_path / "adapter", tmp_path / "lora", 64)
    assert "no layer's update has a rank above 8; exported at that rank instead of 64" in caplog.text
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 8


@pytest.mark.parametrize("rank", [0, -1, True, 2.0, "all"])
def test_bad_rank(rank: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'rank must be a count of at least 1, or "full", found '):
        export_lora(tmp_path, tmp_path / "lora", rank)


def test_damaged_adapters(tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "lora"
    with pytest.raises(FileNotFoundError, match=r"not a saved adapter: it has no adapter_config\.json"):
        export_lora(adapter, out, 2)
    saved("bert", adapter)
    config, weights = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    good_config, good_weights = json.loads(config.read_text()), weights.read_bytes()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, weights, metadata={"format": "pt"})

    for length in (4, 100, len(good_weights) - 10):
        weights.write_bytes(good_weights[:length])
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged or cut off"):
            export_lora(adapter, out, 2)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no adapter_model\.safetensors"):
        export_lora(adapter, out, 2)
    weights.write_bytes(good_weights)
    tensors = load_file(weights)
    layer = "base_model.model.bert.encoder.layer.0.intermediate.dense"
    change({name: value for name, value in tensors.items() if "sparsegrad_basis.V" not in name})
    with pytest.raises(ValueError, match=r"expected S, U and V of shapes .*None"):
        export_lora(adapter, out, 2)
    change({name: value for name, value in tensors.items() if name != f"{layer}.sparsegrad_S"})
    with pytest.raises(ValueError, match=r"no core S for bert\.encoder\.layer\.0\.intermediate\.dense"):
        export_lora(adapter, out, 2)
    change({**tensors, "base_model.model.other.sparsegrad_S": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="no entry in its configuration for other"):
        export_lora(adapter, out, 2)
    change({**tensors, f"{layer}.sparsegrad_S": torch.full((8, 8), torch.nan)})
    with pytest.raises(ValueError, match=r"layer\.0\.intermediate\.dense\.sparsegrad_S is damaged: 64 of its 64 numb"):
        export_lora(adapter, out, 2)
    change(tensors)
    config.write_text(json.dumps({**good_config, "exponent": 1.5}))
    with pytest.raises(ValueError, match=r"of another form than the adapter's config: neurons=False, exponent=1\.5"):
        export_lora(adapter, out, 2)
    config.write_text(json.dumps({**good_config, "exponent": "1.5"}))
    with pytest.raises(ValueError, match=r"config is damaged: exponent must be a number, found '1\.5'"):
        export_lora(adapter, out, 2)
    config.write_text(json.dumps({**good_config, "modules_to_save": ["classifier"]}))
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\], and its weights hold none of them"):
        export_lora(adapter, out, 2)
    config.write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        export_lora(adapter, out, 2)
    config.write_text(json.dumps({**good_config, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="is not a SparseGrad adapter: its peft_type is 'LORA', expected 'SPARSEGRAD'"):
        export_lora(adapter, out, 2)
    assert not out.exists()


def test_damaged_core_shapes(tmp_path: Path) -> None:
    adapter, out, layer = tmp_path / "adapter", tmp_path / "lora", "bert.encoder.layer.0.intermediate.dense"
    saved("bert", adapter)
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    shapes = config["core_shapes"]
    for damaged, message in (
        ([1], "core_shapes .* is damaged: expected a table"),
        ({**shapes, layer: ["x", 8, 8]}, rf"core_shapes .* is damaged: {layer} has \['x', 8, 8\], expected \[group"),
        ({**shapes, layer: [*shapes[layer], 2]}, rf"{layer} has a number of experts, and is not in target_parameters"),
        ({}, "the adapter has bases, and no core_shapes in its configuration"),
        (None, "the adapter has bases, and no core_shapes in its configuration"),
    ):
        path.write_text(json.dumps(config | {"core_shapes": damaged}))
        with pytest.raises(ValueError, match=message):
            export_lora(adapter, out, "full")
    assert not out.exists()


def test_a_module_that_is_listed_twice(tmp_path: Path) -> None:
    """As in the config of an adapter that was loaded and saved again."""
    saved("bert", tmp_path / "adapter", task_type="SEQ_CLS")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["score", "classifier", "score"]}))
    export_lora(tmp_path / "adapter", tmp_path / "lora", "full")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "score"]


def test_half_precision_cores(tmp_path: Path) -> None:
    """Exact from a core in bfloat16 too; the LoRA matrices are float32, for rounding them would lose something."""
    base = tiny_model("llama")
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(c=0.5, r=0.25))
    calibrate_adapter(model, [tiny_batch("llama")], n_steps=2, progress=False)
    for layer in tuner_layers(model).values():
        core = torch.randn_like(layer.sparsegrad_S["default"]) * 0.1
        layer.sparsegrad_S["default"] = nn.Parameter(core.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "adapter")
    assert max(export_lora(tmp_path / "adapter", tmp_path / "lora", "full").values()) < 1e-6
    lora = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in tuner_layers(model).items():
        core, basis = layer.core_and_basis("default")
        A, B = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert A.dtype == B.dtype == torch.float32
        assert differs(B @ A, basis.from_basis(core.detach().float())) < 1e-6
