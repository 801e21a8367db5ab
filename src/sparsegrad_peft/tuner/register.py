"""The one place that touches PEFT's registry.

PEFT has no entry point for methods from other packages: its registry takes only members of the `PeftType` enum. So
the member is made here, once, by hand; when a later PEFT has a SPARSEGRAD of its own, that one stays, and this file
can go.
Tried with peft 0.21.2; `tests/tuner/test_register.py` proves what it relies on.
"""

from __future__ import annotations

import logging

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

logger = logging.getLogger(__name__)

NAME = "SPARSEGRAD"
PREFIX = "sparsegrad_"  # transformers derives it from the name, so it must be the name in lower case


def ensure_peft_type() -> PeftType:
    """The member of `PeftType`, made if there is none.

    A plain string in its place works for `get_peft_model`, but not for transformers, which reads `.value`.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        type.__setattr__(PeftType, NAME, member)  # from Python 3.12 on members are attributes of their class
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
    return PeftType[NAME]


def register(config_cls: type, model_cls: type) -> None:
    """Make `get_peft_model` and the loaders know the method; harmless if called again."""
    known = PEFT_TYPE_TO_TUNER_MAPPING.get(ensure_peft_type())
    if known is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
    elif known is not model_cls:
        logger.warning(
            "PEFT already has a method %s (%s.%s); it stays, and this package's is not registered",
            NAME, known.__module__, known.__qualname__,
        )  # fmt: skip
