"""A context after which a model is what it was before, bit for bit."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .basis import Basis
from .processes import own_shard


@contextmanager
def restored_state(model: nn.Module, keep_values_of: list[nn.Parameter]) -> Iterator[None]:
    """Restore the model and the random number generators when the block ends, also after an exception.

    Restored are gradients, `requires_grad`, train and eval modes, buffers, and the random number generators of PyTorch
    (CPU and CUDA), Python and NumPy. Parameter values are restored only for `keep_values_of`, from a copy on the CPU.
    Hooks on accumulated gradients do not run in the block: an optimizer step in one would change weights and moments.
    """
    parameters = list(model.parameters())
    flags = [(p, p.requires_grad, p.grad) for p in parameters]
    hooks = [(p, p._post_accumulate_grad_hooks) for p in parameters if p._post_accumulate_grad_hooks]
    modes = [(m, m.training) for m in model.modules()]
    # Bases are large buffers that no forward changes; other buffers are small (such as BatchNorm's statistics).
    of_bases = {id(b) for m in model.modules() if isinstance(m, Basis) for b in m.buffers()}
    buffers = [(b, b.detach().clone()) for b in model.buffers() if id(b) not in of_bases]
    places = [(m, name, buffer) for m in model.modules() for name, buffer in m._buffers.items()]
    unique = {id(t): t for t in keep_values_of}
    values = [(t, own_shard(t.detach()).to("cpu", copy=True)) for t in unique.values()]
    python_state = random.getstate()
    numpy_random = sys.modules["numpy"].random if "numpy" in sys.modules else None
    numpy_state = numpy_random.get_state() if numpy_random else None
    for parameter, _ in hooks:
        parameter._post_accumulate_grad_hooks = None  # type: ignore[assignment]  # as PyTorch sets it
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_available() else []):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in values:
                own_shard(tensor.detach()).copy_(value)
            for buffer, value in buffers:
                if not torch.equal(buffer, value):  # batch_norm writes without raising the buffer's version
                    buffer.copy_(value)
        for module, name, place in places:
            module._buffers[name] = place  # a forward may have put a new tensor there
        for parameter, requires_grad, grad in flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        for parameter, hook in hooks:
            parameter._post_accumulate_grad_hooks = hook
        for module, mode in modes:
            module.training = mode
        random.setstate(python_state)
        if numpy_random:
            numpy_random.set_state(numpy_state)
