"""Other names of settings, on the command line and in YAML files: short ones, and those of transformers and PEFT."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .settings import RunArguments, flat

ALIASES = {
    "model_name_or_path": "model",
    "model.load_in_4bit": "load_in_4bit",
    "torch_dtype": "dtype",
    "output_dir": "output",
    "seed": "seeds",
    "hub_model_id": "push_to_hub",
    "num_train_epochs": "training.epochs",
    "per_device_train_batch_size": "training.batch_size",
    "gradient_accumulation_steps": "training.gradient_accumulation",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "warmup_ratio": "training.warmup",
    "early_stopping_patience": "training.patience",
    "lora_r": "adapter.rank",
    "lora_rank": "adapter.rank",
    "layers_to_transform": "adapter.layers",
    "max_seq_length": "data.max_length",
    "max_train_samples": "data.train_rows",
    "max_eval_samples": "data.validation_rows",
    "text_column_name": "data.text",
    "label_column_name": "data.label",
}
"""Name in the scripts of transformers, PEFT or TRL -> this package's setting."""

INSTEAD = {
    "bf16": "--training.precision bf16",
    "fp16": "--training.precision fp16",
    "lora_alpha": "--training.learning_rate (LoRA's alpha equals its rank here)",
    "warmup_steps": "--training.warmup, a share of the steps",
    "max_steps": "--training.epochs",
    "per_device_eval_batch_size": "--training.batch_size",
    "group_by_length": "--training.batches by_length",
    "dataset_name": "--task",
    "test_file": "sparsegrad predict --file after the run (--validation_file selects the checkpoint)",
    "task_name": "--task, such as glue/rte",
    "r": "--adapter.r (directions) or --adapter.rank (LoRA)",
}
"""Name in those scripts -> what to write instead, where no setting means the same."""


def aliases_of(settings: Iterable[str]) -> dict[str, str]:
    """Return alias -> setting: `ALIASES`, and the last part of each dotted name (`epochs` for `training.epochs`).

    A last part is no alias if it is one letter, or if it is also another setting's name.
    """
    names = list(settings)
    ends = [name.rpartition(".")[2] for name in names]
    short = {
        end: name
        for end, name in zip(ends, names, strict=True)
        if end != name and len(end) > 1 and ends.count(end) == 1
    }
    return {**short, **{alias: name for alias, name in ALIASES.items() if name in names}}


def with_options(message: str, words: Iterable[str]) -> str:
    """Return a message that names the options that were typed: `data.text` becomes `data.text (--text)`.

    A name without a dot, such as "model", is a word too; it counts where a colon follows.

    Args:
        message: names settings as YAML files do, each line for itself.
        words: the command line.
    """
    aliases = aliases_of(flat(RunArguments().as_dict()))
    for option in dict.fromkeys(word.partition("=")[0].rstrip("+") for word in words if word.startswith("--")):
        setting = aliases.get(option[2:])
        if setting is not None:
            ends = r"(?![\w.]| \()" if "." in setting else "(?=:)"
            name = re.compile(rf'(?<![\w.-]){re.escape(setting)}"?{ends}')
            message = "\n".join(name.sub(rf"\g<0> ({option})", line, count=1) for line in message.split("\n"))
    return message


def check_given_once(names: Iterable[str], aliases: Mapping[str, str]) -> None:
    """Raise ValueError if two names of one setting are given.

    Args:
        names: of the settings that are given, aliases among them.
        aliases: alias -> setting.
    """
    given: dict[str, str] = {}
    for name in names:
        setting = aliases.get(name, name)
        if given.setdefault(setting, name) != name:
            raise ValueError(f"{given[setting]} and {name} are two names of one setting; give one of them")


def given_names(settings: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of nested settings, as they are written in a YAML file."""
    found = []
    for name, value in settings.items():
        inner = given_names(value, f"{prefix}{name}.") if isinstance(value, Mapping) else []
        found += inner or [f"{prefix}{name}"]
    return found
