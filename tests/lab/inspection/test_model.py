"""Models from configs, from folders, and models themselves; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    MixtralConfig,
)

from helpers import TINY_SIZES, parameter_count, tiny_model
from sparsegrad_lab.inspection.inspect import inspect


def test_folder_with_a_config_and_nothing_else(tmp_path: Path) -> None:
    BertForSequenceClassification(BertConfig(**TINY_SIZES, vocab_size=100, num_labels=3)).config.save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]
    inspection = inspect(str(tmp_path))
    assert inspection.model == str(tmp_path)
    assert inspection.model_class == "BertForSequenceClassification"
    assert inspection.model_type == "bert"
    assert inspection.parts.head == 64 * 64 + 64 + 3 * 64 + 3


def test_model_is_left_alone() -> None:
    model = tiny_model("gpt2")
    before = {name: (parameter, parameter.clone()) for name, parameter in model.named_parameters()}
    inspect(model)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_model_without_config() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(8, 24), nn.Linear(24, 8)

    model = nn.Sequential(nn.Linear(4, 8), nn.ModuleList([Block(), Block()]))
    inspection = inspect(model, r=1.0, c=1.0)
    assert inspection.model_type == ""
    assert inspection.parts.mlp == parameter_count(model[1])
    assert inspection.parts.other == parameter_count(model[0])
    assert inspection.entries == 4 * 8 * 24
    with pytest.raises(ValueError, match="none found by structure in this Sequential; please specify `target_modules`"):
        inspect(nn.Sequential(nn.Linear(4, 4)))
    chosen = inspect(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    assert (chosen.layers, chosen.parts.mlp) == (1, 20)
    with pytest.raises(ValueError, match=r"fused expert parameters, such as model\.layers\.0\.mlp\.experts"):
        inspect(MixtralConfig(**TINY_SIZES), task_type="CAUSAL_LM", c=0.5, r=0.5)
    mixtral = inspect(
        MixtralConfig(**TINY_SIZES), task_type="CAUSAL_LM", target_modules=["lm_head"]
    )  # experts are no linears
    assert mixtral.layers == 1
    assert mixtral.parts.head == 32000 * 64
    assert mixtral.parts.mlp == 2 * 8 * (3 * 64 * 256 + 64)  # experts and router


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BertConfig(**TINY_SIZES)
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        inspect(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        inspect(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"does not know the model type in config\.json"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-type"}')
    with pytest.raises(ValueError, match=r"does not know the model type in config\.json .* `no-such-type`"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        inspect(str(tmp_path))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    with pytest.raises(FileNotFoundError, match=r"^nobody/nothing: no such folder here, .* \(We couldn't connect"):
        inspect("nobody/nothing")

    with pytest.raises(ValueError, match="matches no linear layer; the model has: encoder"):
        inspect(config, target_modules=["nothing"])
    with pytest.raises(ValueError, match="transformers has no AutoModelForSeq2SeqLM of type 'llama'"):
        inspect(LlamaConfig(**TINY_SIZES), task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match=r"task_type must be one of SEQ_CLS, .* found 'poetry'"):
        inspect(config, task_type="poetry")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, found int8"):
        inspect(config, dtype="int8")
    with pytest.raises(ValueError, match=r"c, group encoder.*expected"):
        inspect(config, c=1000, r=4)
    with pytest.raises(ValueError, match=r"r = energy:0\.9: this size depends on the gradients"):
        inspect(config, c=4, r="energy:0.9")
    with pytest.raises(ValueError, match="density must be above 0"):
        inspect(config, density=0.0)
