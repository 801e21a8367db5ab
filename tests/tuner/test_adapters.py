"""Adapters inside another model: found, calibrated and trained wherever they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import CosineSimilarityLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from test_trainer_trl import tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from helpers import MLP_LINEARS, cores, logits, max_difference, tiny_batch, tiny_model
from sparsegrad_peft import (
    CalibrationConfig,
    SparseGradAdamW,
    SparseGradConfig,
    SparseGradTrainerMixin,
    calibrate_adapter,
    param_groups,
)
from sparsegrad_peft.tuner.adapters import config_of, uncalibrated


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(()))

    def forward(self, **data: Tensor) -> Tensor:
        return self.inner(**data).loss * self.scale


@pytest.mark.parametrize("injected", [False, True])
def test_calibration_of_a_wrapper(injected: bool, tmp_path: Path) -> None:
    inner = tiny_model("llama")
    if injected:
        inner.add_adapter(SparseGradConfig())
    else:
        inner = get_peft_model(inner, SparseGradConfig())
    model = Wrapper(inner)
    calibrate_adapter(model, [tiny_batch("llama")], loss_fn=lambda m, data: m(**data), n_steps=2, progress=False)
    assert model.scale.grad is None
    assert inner.peft_config["default"].calibrated
    assert config_of(model, "default") is inner.peft_config["default"]
    assert next(iter(inner.peft_config["default"].core_shapes)) == "model.layers.0.mlp.gate_proj"
    inner.save_pretrained(tmp_path)
    assert PeftModel.from_pretrained(tiny_model("llama"), tmp_path).peft_config["default"].calibrated


def test_a_model_without_an_adapter() -> None:
    with pytest.raises(ValueError, match="no SparseGrad adapter named 'default'; make one with get_peft_model"):
        calibrate_adapter(Wrapper(tiny_model("llama")), [tiny_batch("llama")])


class Dual(nn.Module):
    """Two towers with an adapter each, such as a query and a document encoder."""

    def __init__(self, query: nn.Module, doc: nn.Module) -> None:
        super().__init__()
        self.query, self.doc = query, doc

    def forward(self, **data: Tensor) -> Tensor:
        return self.query(**data).loss + self.doc(**data).loss


def _calibrate(model: nn.Module) -> None:
    calibrate_adapter(model, [tiny_batch("bert")], loss_fn=lambda m, data: m(**data), n_steps=2, progress=False)


def test_both_towers_of_a_dual_encoder(tmp_path: Path) -> None:
    model = Dual(*(get_peft_model(tiny_model("bert"), SparseGradConfig()) for _ in range(2)))
    assert uncalibrated(model) == ["default"]
    _calibrate(model)
    assert not uncalibrated(model)
    batch = tiny_batch("bert")
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    model(**batch).backward()
    optimizer.step()
    model.eval()
    for name, tower in (("query", model.query), ("doc", model.doc)):
        shapes = tower.peft_config["default"].core_shapes
        assert len(shapes) == MLP_LINEARS["bert"]
        assert all(group.startswith(name) for group, *_ in shapes.values())
        tower.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny_model("bert"), tmp_path / name).eval()
        assert torch.equal(loaded(**batch).logits, tower(**batch).logits)


def test_layers_whose_names_end_like_those_of_another_adapter() -> None:
    """The layers "query...." and "doc.query....", each with its own adapter."""
    towers = [get_peft_model(tiny_model("bert"), SparseGradConfig(), adapter_name=name) for name in ("one", "two")]
    model = Dual(towers[0], nn.ModuleDict({"query": towers[1]}))
    calibrate_adapter(
        model, [tiny_batch("bert")], loss_fn=lambda m, data: m.query(**data).loss, n_steps=1, progress=False,
        adapter_name="one",
    )  # fmt: skip
    assert uncalibrated(model) == ["two"]


def test_towers_of_different_forms_are_calibrated_each_alone() -> None:
    model = Dual(*(get_peft_model(tiny_model("bert"), SparseGradConfig(narrow=n)) for n in (4, 8)))
    with pytest.raises(ValueError, match=r"'default' of query and doc have different forms: .*'narrow': 4.* and .*: 8"):
        _calibrate(model)
    for tower in (model.query, model.doc):
        calibrate_adapter(tower, [tiny_batch("bert")], n_steps=1, progress=False)
    assert not uncalibrated(model)


def test_a_part_with_another_method_does_not_hide_the_adapter() -> None:
    lora = get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"]))
    model = Dual(lora, get_peft_model(tiny_model("bert"), SparseGradConfig()))
    _calibrate(model)
    assert model.doc.peft_config["default"].calibrated


class SentenceTrainer(SparseGradTrainerMixin, SentenceTransformerTrainer):
    pass


def test_sentence_transformers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=60, max_position_embeddings=32, **sizes)).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = SentenceTransformer(modules=[Transformer(str(tmp_path / "base")), Pooling(16)], device="cpu")
    model.add_adapter(SparseGradConfig(c=0.5, r=0.5))
    args = SentenceTransformerTrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    first, second = [f"w{i} w{i + 1}" for i in range(24)], [f"w{i + 2} w{i}" for i in range(24)]
    data = Dataset.from_dict({"first": first, "second": second, "score": [float(i % 2) for i in range(24)]})
    trainer = SentenceTrainer(
        model=model, args=args, train_dataset=data, loss=CosineSimilarityLoss(model),
        calibration=CalibrationConfig.paper(n_steps=4),
    )  # fmt: skip
    trainer.train()
    config = config_of(model, "default")
    assert config.calibrated
    assert set(config.core_shapes or {}) == {
        f"encoder.layer.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")
    }
    assert all(bool(core.any()) for core in cores(model))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")  # PEFT's, of two adapters
def test_lora_on_attention_and_sparsegrad_on_the_mlp(tmp_path: Path) -> None:
    """As docs/faq.md says: two adapters of one model, calibrated, trained, saved and loaded."""
    model, data = tiny_model("llama"), tiny_batch("llama")
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]), "lora")
    model.add_adapter(SparseGradConfig(), "mlp")
    model.set_adapter(["lora", "mlp"])
    calibrate_adapter(model, [data], n_steps=3, adapter_name="mlp", progress=False)
    optimizer = SparseGradAdamW(param_groups(model), lr=1e-2)
    for _ in range(3):
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {"S" if "sparsegrad_S" in name else name.rsplit(".", 3)[1] for name in trained} == {"S", "lora_A", "lora_B"}
    assert all(bool(p.any()) for p in trained.values())
    expected = logits(model, data)
    loaded = tiny_model("llama")
    for name in ("lora", "mlp"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        loaded.load_adapter(str(tmp_path / name), name)
    loaded.set_adapter(["lora", "mlp"])
    assert max_difference(logits(loaded, data), expected) < 1e-6
