"""Keep the bases out of DistributedDataParallel's broadcasts."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .basis import Basis
from .processes import check_equal_weights


def exclude_bases_from_ddp(model: nn.Module) -> None:
    """Tell `DistributedDataParallel` not to broadcast the bases in a model before each forward pass.

    Bases do not change in a step, and may be as large as the gradients. Call this on every process for the very
    module that DDP will wrap. `calibrate_adapter` and the trainers do it themselves.

    Raises:
        ValueError: the processes have different bases, and DDP would no longer make them equal.
    """
    bases = {id(buffer) for m in model.modules() if isinstance(m, Basis) for buffer in m.buffers()}
    named = {name: b for name, b in model.named_buffers(remove_duplicate=False) if id(b) in bases}
    check_equal_weights(named)
    ignored = {*named, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored))
