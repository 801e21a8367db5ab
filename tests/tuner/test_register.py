"""The contact with PEFT's registry: what transformers and PEFT read of a method."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from sparsegrad_peft import SparseGradConfig
from sparsegrad_peft.tuner.model import SparseGradModel
from sparsegrad_peft.tuner.register import NAME, PREFIX, ensure_peft_type, register


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
