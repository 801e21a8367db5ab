"""Adapters of a model that accelerate offloads to the CPU or to disk (`device_map="auto"`, `cpu_offload`, ...).

accelerate fetches a module's tensors when the module is called. The `ParameterDict` of a layer's cores and its bases
are never called, so `fetched` fetches them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from accelerate.utils import align_module_device, has_offloaded_params
from torch import nn

REMEDY = (
    "Load model and adapter into CPU memory first, then offload both with cpu_offload, disk_offload or dispatch_model "
    "of accelerate"
)


def is_offloaded(module: nn.Module) -> bool:
    """True while accelerate keeps the module's own tensors elsewhere."""
    if not has_offloaded_params(module):
        return False
    return any(tensor.is_meta for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


@contextmanager
def fetched(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Within the block, the modules' tensors are on the device that computes; afterwards they are offloaded again.

    Raises:
        RuntimeError: a tensor is not among the offloaded ones. PEFT writes an adapter that it loads onto a model on
            disk under names that are right for LoRA only.
    """
    with ExitStack() as stack:
        for module in modules:
            if is_offloaded(module):
                try:
                    stack.enter_context(align_module_device(module))
                except KeyError as error:
                    raise RuntimeError(
                        f"{error} is not among the tensors on disk: PEFT cannot load this adapter onto an offloaded "
                        f"model. {REMEDY}"
                    ) from error
        yield
