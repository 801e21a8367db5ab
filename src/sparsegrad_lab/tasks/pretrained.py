"""Read configs and tokenizers of pretrained models; build a model without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from .library_logs import suppress_library_logs
from .model_folder import check_model_folder, model_path


class NeedsWeightsError(ValueError):
    """The model's constructor reads parameter values, so it cannot be built on the meta device."""


def load_tokenizer(model: str | Path) -> Any:
    """Load the model's tokenizer; without a padding token of its own it pads with the end-of-text token.

    Raises:
        ValueError: the model has no tokenizer, or it is not readable.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(str(model)))
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):
            # transformers invents a tokenizer for some model types that have no tokenizer files.
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: expected a tokenizer (tokenizer.json, ...) in the model's folder, found none that can be read "
            f"({first_line(error)}); save the tokenizer there"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_length(tokenizer: Any, max_length: int) -> None:
    """Raise ValueError if `max_length` exceeds the model's limit."""
    limit = tokenizer.model_max_length  # a huge number if unknown
    if max_length > limit:
        raise ValueError(f"data.max_length: expected at most {limit} tokens (the model's limit), found {max_length}")


def load_config(name: str) -> PretrainedConfig:
    """Load the model's config; no weights, and no code that comes with the model.

    Raises:
        FileNotFoundError: there is no such model, or the folder has no config.json.
        ValueError: config.json is unreadable, or transformers does not know its model type.
    """
    folder = Path(name).expanduser()
    check_model_folder(name)
    try:
        return transformers.AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False
        )
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{name}: config.json cannot be read ({first_line(error)})") from None
        raise FileNotFoundError(
            f"{name}: no such folder here, and config.json could not be loaded from the Hugging Face Hub "
            f"({first_line(error)}); check the name. For a gated model, accept its licence on the hub, then run: "
            "hf auth login"
        ) from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name}: transformers {transformers.__version__} does not know the model type in config.json "
            f"({first_line(error)}); install a newer transformers, or choose another model"
        ) from None


def build_without_weights(config: PretrainedConfig, auto: Any = None) -> nn.Module:
    """Build a model on the meta device: its parameters have shapes and no storage.

    Args:
        config: the model's config.
        auto: an Auto class of transformers, which selects the head; None: the class that `config.architectures` names,
            or else the model without a head.

    Raises:
        NeedsWeightsError: the model cannot be built this way.
        ValueError: transformers has no such model.
    """
    architectures = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, architectures[0], None) if auto is None else None
    auto = auto or transformers.AutoModel
    try:
        with suppress_library_logs(), torch.device("meta"):
            found: nn.Module = auto.from_config(config) if named is None else named(config)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"transformers has no {auto.__name__} of type {config.model_type!r}") from None
    except (RuntimeError, NotImplementedError) as error:
        raise NeedsWeightsError(
            f"{config.model_type}: the model cannot be built without its weights ({first_line(error)})"
        ) from error
    return found


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def check_causal(model: str, config: Any) -> None:
    """Raise ValueError for a bidirectional model, which would see the words that it has to predict."""
    name = config.model_type
    both = name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and name in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if both and not getattr(config, "is_decoder", False):
        raise ValueError(
            f"{model} is a {name}, which sees the words that it has to predict; expected a causal language model, such "
            "as gpt2 or a LLaMA"
        )
