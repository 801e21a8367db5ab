"""Adapters of a model whose weights wait in the CPU's memory or on disk (`device_map="auto"`, accelerate's offloading).

accelerate fetches a module's tensors when the module is called. A core is held by a `ParameterDict`, and a basis by a
module that is only looked into: nobody calls them, so their hooks are called here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's own tensors elsewhere at the moment."""
    if not hasattr(module, "_hf_hook"):
        return False
    return any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


REMEDY = (
    "Load model and adapter into the CPU's memory first, then offload both: cpu_offload, disk_offload or "
    "dispatch_model of accelerate"
)


@contextmanager
def fetched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules' tensors are on the device that computes; afterwards they are away again.

    Raises:
        RuntimeError: they are nowhere to be found, since the base model was on disk when the adapter was loaded.
    """
    away = [module for module in modules if is_offloaded(module)]
    try:
        for module in away:
            _fetch(module)
        yield
    finally:
        for module in away:
            module._hf_hook.post_forward(module, torch.empty(0))  # type: ignore[operator, union-attr]


def _fetch(module: nn.Module) -> None:
    try:
        module._hf_hook.pre_forward(module)  # type: ignore[operator, union-attr]
    except KeyError as error:  # PEFT writes adapters to the disk under names that are right for LoRA alone
        raise RuntimeError(
            f"{error} is not among the tensors on disk: PEFT cannot load this adapter onto a model that is offloaded "
            f"already. {REMEDY}"
        ) from error
