"""Step 5: SparseAdam on what was selected, AdamW on everything else, behind one optimizer (paper: SparseAdam).

    G_tilde = V G Uᵀ  ──► topk_magnitude ──► SparseAdam's rule on k entries ──► S, or W ← W + Vᵀ Δ U

Selection happens once, here, on the final gradient: after all micro-batches have been added up, after processes have
been averaged, after unscaling and clipping. The union of selections made on the parts has more than `k` entries, and
still not all of the right ones. Every gradient that reaches `.grad` is dense, so accumulation, DDP, clipping and
`GradScaler` need to know nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .basis import Basis
from .selection import flat_from_coo, resolve_k, topk_positions


def sparse_adam_update(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    values: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """SparseAdam's rule on selected entries: moves their moments in place and returns their change (all shapes (k,)).

    As `torch.optim.SparseAdam`: moments of entries that are not selected stand still, bias correction is by the global
    step, `eps` is added before the correction, and there is no weight decay.
    """
    exp_avg.lerp_(values, 1 - beta1)
    exp_avg_sq.lerp_(values.square(), 1 - beta2)
    step_size = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return exp_avg / exp_avg_sq.sqrt().add_(eps) * -step_size


class SparseGradAdamW(Optimizer):
    """SparseAdam on the largest entries of some parameters, AdamW on the others.

    Groups carry an explicit flag:

    - `{"params": cores, "sparse": True, "density": 0.01}` (or `"k": 1000`, per parameter): in each step, the `k`
      entries of the gradient that are largest in magnitude move by SparseAdam's rule and the others stand still. No
      weight decay.
      A gradient that arrives as COO (`LiteralSparseGradLinear`) has been selected already and takes no `k`.
    - `{"params": rest}`: AdamW, PyTorch's own.

    With `bases`, a `sparse` parameter may be an ordinary weight in the original space: its gradient is taken into the
    basis, selected there, and the change brought back, `W ← W + Vᵀ Δ U`. That is the method itself, exactly, on plain
    `nn.Linear` layers: forward and backward are those of regular fine-tuning.

    State, in bytes: 12 for each entry that was ever selected (its position, and two moments in float32; 20 in float64),
    and nothing for the others; dense Adam takes 8 for every entry. `touched` counts them. AdamW's state is PyTorch's.

    Args:
        params: parameters, or groups as above.
        lr: learning rate. That of full fine-tuning is for dense updates: search it anew for selected entries.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment: before bias correction in `sparse` groups (SparseAdam), after it in
            the others (AdamW).
        weight_decay: decoupled, for groups without `sparse`.
        bases: for parameters in the original space, their basis.

    Raises:
        ValueError, TypeError: a group that is neither one nor the other; numbers out of range; a weight with a basis
            in half precision. The message names the group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        bases: Mapping[nn.Parameter, Basis] | None = None,
    ) -> None:
        self.bases = dict(bases or {})
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "sparse": False, "k": None, "density": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """With the bases; for copies and pickles."""
        return {**super().__getstate__(), "bases": self.bases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As PyTorch's optimizers do: groups of another one, such as AdamW, get what they have not."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("sparse", "k", "density"):
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; checked here, before any training."""
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1], len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any], number: int) -> None:
        where = f"parameter group {number}"
        beta1, beta2 = group["betas"]
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{where}: {name} must be at least 0 and finite, found {group[name]}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"{where}: betas must lie in [0, 1), found {group['betas']}")
        selects = group["k"] is not None or group["density"] is not None
        if not isinstance(group["sparse"], bool):
            raise TypeError(f"{where}: sparse is a flag, True or False, found {group['sparse']!r}")
        if selects and not group["sparse"]:
            raise ValueError(
                f'{where}: k and density need "sparse": True, found k={group["k"]}, density={group["density"]}'
            )
        for parameter in group["params"]:
            basis = self.bases.get(parameter)
            if basis is not None and not group["sparse"]:
                raise ValueError(f'{where}: a parameter with a basis needs "sparse": True')
            if basis is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{where}: a weight in {parameter.dtype} would round its changes away; keep it in float32, and use "
                    "autocast for products in half precision"
                )
            if selects:
                shape = _selection_shape(parameter, basis)
                try:
                    resolve_k(math.prod(shape), group["k"], group["density"])
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}, parameter of shape {tuple(parameter.shape)}: {error}") from None

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step; `closure`, if given, evaluates the model anew and returns the loss.

        Raises:
            ValueError: a gradient that its group cannot take, or, in a `sparse` group, one that is not finite. Nothing
                has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        for group in self.param_groups:
            if group["sparse"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._sparse_step(parameter, group)
            else:
                self._dense_step(group)
        return loss

    def _check_gradients(self) -> None:
        """Before anything moves: a step that stops half-way would leave a model that no step count tells of."""
        finite: list[Tensor] = []  # one flag a gradient, read together: on a GPU, reading waits for all work before
        for group in self.param_groups:
            for parameter in group["params"]:
                grad, shape = parameter.grad, tuple(parameter.shape)
                if grad is None:
                    continue
                if not group["sparse"]:
                    if grad.is_sparse:
                        raise ValueError(
                            f'a COO gradient needs a group with "sparse": True, found one of shape {shape}'
                        )
                    continue
                if grad.is_sparse and parameter in self.bases:
                    raise ValueError(
                        "a parameter with a basis is selected from its dense gradient, found a COO gradient"
                    )
                if not grad.is_sparse and group["k"] is None and group["density"] is None:
                    raise ValueError(
                        f'a "sparse" group needs k or density for a dense gradient, found neither (shape {shape})'
                    )
                finite.append((grad._values() if grad.is_sparse else grad).isfinite().all())
        if finite and not bool(torch.stack([flag.to(finite[0].device) for flag in finite]).all()):
            raise ValueError(
                f"{sum(not bool(flag) for flag in finite)} of {len(finite)} gradients hold entries that are NaN or "
                "infinite, so the largest are not defined; look for a loss that is not finite, and check the gradients "
                "before the step"
            )

    def _sparse_step(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        basis = self.bases.get(parameter)
        shape = _selection_shape(parameter, basis)
        wide = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.grad.is_sparse:
            positions, values = flat_from_coo(parameter.grad)
            values = values.to(wide)
        else:
            grad = parameter.grad.to(wide)
            G_tilde = (basis.to_basis(grad) if basis is not None else grad).reshape(-1)
            positions = topk_positions(G_tilde.abs(), resolve_k(G_tilde.numel(), group["k"], group["density"]))
            values = G_tilde[positions]

        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["positions"] = positions.new_empty(0, dtype=torch.int32)  # ever selected, flat, ascending
            state["exp_avg"] = values.new_empty(0)
            state["exp_avg_sq"] = values.new_empty(0)
        state["step"] += 1
        slots = _slots(state, positions)
        exp_avg, exp_avg_sq = state["exp_avg"][slots], state["exp_avg_sq"][slots]
        lr, (beta1, beta2), eps = float(group["lr"]), group["betas"], group["eps"]
        change = sparse_adam_update(exp_avg, exp_avg_sq, values, state["step"], lr, beta1, beta2, eps)
        state["exp_avg"][slots] = exp_avg
        state["exp_avg_sq"][slots] = exp_avg_sq
        if basis is None:
            # reshape would copy a parameter that is not contiguous, and the change would be lost
            rows = torch.div(positions, parameter.shape[-1], rounding_mode="floor")
            index = (rows, positions % parameter.shape[-1]) if parameter.dim() == 2 else (positions,)
            parameter.index_put_(index, change.to(parameter.dtype), accumulate=True)
        else:
            parameter.copy_(_add_from_basis(parameter.to(wide), basis, positions, change, shape))

    def _dense_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, keeping positions integers and moments as wide as they were saved."""
        super().load_state_dict(state_dict)
        # The base class casts state to the type of its parameter: float positions, half precision moments.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for saved_id, parameter in zip(saved_ids, parameters, strict=True):
            saved = state_dict["state"].get(saved_id, {})
            if "positions" in saved:
                self.state[parameter] = {
                    name: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                    for name, value in saved.items()
                }

    def state_bytes(self) -> int:
        """Bytes that the optimizer keeps in tensors."""
        return sum(
            value.numel() * value.element_size()
            for state in self.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )

    def touched(self, parameter: nn.Parameter) -> int:
        """How many entries of a `sparse` parameter were ever selected."""
        return self.state[parameter]["positions"].numel() if self.state.get(parameter) else 0


def _selection_shape(parameter: Tensor, basis: Basis | None) -> tuple[int, ...]:
    if basis is None:
        if parameter.dim() not in (1, 2):
            raise ValueError(f'a "sparse" parameter must be a matrix or a vector, found shape {tuple(parameter.shape)}')
        return tuple(parameter.shape)
    if parameter.dim() != 2:
        raise ValueError(f"a parameter with a basis must be a matrix (out, in), found shape {tuple(parameter.shape)}")
    return basis.core_shape(parameter.shape[0], parameter.shape[1])


def _slots(state: dict[str, Any], positions: Tensor) -> Tensor:
    """Where the moments of `positions` (ascending) are kept; new ones get a place, with zero moments, in order."""
    known: Tensor = state["positions"]
    positions = positions.to(torch.int32)  # a layer has fewer than 2³¹ entries; half the bytes of int64
    slots = torch.searchsorted(known, positions)
    found = (
        known[slots.clamp_max(known.numel() - 1)] == positions
        if known.numel()
        else torch.zeros_like(slots, dtype=torch.bool)
    )
    new = positions[~found]
    if new.numel():
        order = torch.cat([known, new]).sort()
        state["positions"] = order.values
        for moment in ("exp_avg", "exp_avg_sq"):
            padded = torch.cat([state[moment], state[moment].new_zeros(new.numel())])
            state[moment] = padded[order.indices]
        slots = torch.searchsorted(order.values, positions)
    return slots


def _add_from_basis(weight: Tensor, basis: Basis, positions: Tensor, change: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`W + Vᵀ Δ U` for a `Δ` (r, c) of few entries; its product with one side is sparse, with the other dense."""
    r, c = shape
    U, V = (None if side is None else side.to(weight.dtype) for side in (basis.U, basis.V))
    index = torch.stack([torch.div(positions, c, rounding_mode="floor"), positions % c])
    delta = torch.sparse_coo_tensor(index, change, (r, c), is_coalesced=True, check_invariants=False)
    if V is None and U is None:
        return weight.index_put_((index[0], index[1]), change, accumulate=True)
    if V is None:
        return weight.add_(torch.sparse.mm(delta, U))
    if U is None:
        return weight.add_(torch.sparse.mm(delta.T, V).T)
    # What is left dense costs out·c·in after Vᵀ Δ, and out·r·in after Δ U.
    if c <= r:
        return weight.addmm_(torch.sparse.mm(delta.T, V).T, U)
    return weight.addmm_(V.T, torch.sparse.mm(delta, U))
