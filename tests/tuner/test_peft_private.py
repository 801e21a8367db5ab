"""What the adapter relies on inside PEFT: the registry, and the underscored methods that it overrides or calls."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from sparsegrad_peft import SparseGradConfig
from sparsegrad_peft.tuner.experts import SparseGradExperts
from sparsegrad_peft.tuner.layer import SparseGradLayer
from sparsegrad_peft.tuner.linear import SparseGradTunerLinear
from sparsegrad_peft.tuner.model import SparseGradModel
from sparsegrad_peft.tuner.peft_private import (
    HOOKS,
    NAME,
    PREFIX,
    ensure_peft_type,
    in_out_features,
    mistaken_for_experts,
    register,
)


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [(o, name, parameters) for o, hooks in HOOKS.items() for name, parameters in hooks.items()],
)
def test_upstream_hooks_are_unchanged(owner: type, name: str, parameters: tuple[str, ...]) -> None:
    assert tuple(inspect.signature(getattr(owner, name)).parameters) == parameters


def test_every_private_override_is_listed() -> None:
    for owner, own in ((BaseTuner, SparseGradModel), (BaseTunerLayer, SparseGradLayer)):
        classes = (own, SparseGradTunerLinear, SparseGradExperts) if own is SparseGradLayer else (own,)
        overridden = {name for cls in classes for name in vars(cls) if name.startswith("_") and hasattr(owner, name)}
        overridden = {
            name
            for name in overridden - set(vars(nn.Module))  # PyTorch's, not PEFT's
            if inspect.isroutine(getattr(owner, name)) and not name.startswith("__")
        }
        assert overridden <= set(HOOKS[owner])


def test_sizes_of_linear_layers() -> None:
    assert in_out_features(nn.Linear(3, 5)) == (3, 5)
    assert in_out_features(Conv1D(5, 3)) == (3, 5)


@pytest.mark.parametrize(
    ("model_type", "unknown", "mistaken"),
    [("deepseek_v3", False, True), ("qwen3_moe", False, True), ("llama", True, False), (None, False, False),
     (None, True, True)],
)  # fmt: skip
def test_linears_that_lora_takes_for_experts(model_type: str | None, unknown: bool, mistaken: bool) -> None:
    found = mistaken_for_experts(["a.up_proj", "a.q_proj"], model_type, unknown=unknown)
    assert found == (["a.up_proj"] if mistaken else [])


def test_member_behaves_as_those_of_the_enum() -> None:
    member = ensure_peft_type()
    assert member is PeftType("SPARSEGRAD") is PeftType[NAME] is PeftType.SPARSEGRAD
    assert isinstance(member, PeftType)
    assert member.value == member.name == NAME
    assert member in list(PeftType)
    assert copy.deepcopy(member) is pickle.loads(pickle.dumps(member)) is member
    assert json.dumps(member) == '"SPARSEGRAD"'
    assert len([m for m in PeftType if m == NAME]) == 1


def test_registered_once_under_the_prefix_that_transformers_derives() -> None:
    register(SparseGradConfig, SparseGradModel)  # again: harmless
    member = ensure_peft_type()
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is SparseGradConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is SparseGradModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == SparseGradModel.prefix == PREFIX == NAME.lower() + "_"


def test_a_method_of_the_same_name_stays(caplog: pytest.LogCaptureFixture) -> None:
    class Another(SparseGradModel):
        pass

    register(SparseGradConfig, Another)
    assert "PEFT already has a method SPARSEGRAD" in caplog.text
    assert PEFT_TYPE_TO_TUNER_MAPPING[ensure_peft_type()] is SparseGradModel
