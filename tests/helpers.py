"""Helpers that several test files share: orthonormal rows, tiny models and their batches, a few steps of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


PROJECT: dict[str, Any] = read_toml(Path(__file__).parents[1] / "pyproject.toml")["project"]
"The table `project` of pyproject.toml."


def write_json(path: Path, content: Any) -> None:
    """A JSON file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def orthogonal(n: int, rows: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    """The first `rows` rows of a random orthogonal matrix (n, n); computed in float64, then cast."""
    return torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q[:rows].to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """One optimizer step a batch; returns the losses. Without `loss_fn`, the model's own loss of `model(**batch)`."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def all_chain_costs(dims: tuple[int, ...]) -> list[int]:
    """Multiply-adds of a matrix chain, for every parenthesization."""
    if len(dims) == 2:
        return [0]
    return [
        left + right + dims[0] * dims[s] * dims[-1]
        for s in range(1, len(dims) - 1)
        for left in all_chain_costs(dims[: s + 1])
        for right in all_chain_costs(dims[s:])
    ]


class _MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products as they are dispatched; refuses products that it does not know."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not {"bmm", "matmul", "einsum", "linear", "mv", "dot"} & {name}, name
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def multiply_adds_done(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the matrix products that a call computes."""
    with _MultiplyAdds() as counter:
        call(*args, **kwargs)
    return counter.total
