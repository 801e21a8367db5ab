"""Step 5: SparseAdam on the selected entries, AdamW on everything else, in one optimizer (paper: SparseAdam).

    G_tilde = V G Uᵀ  ──► largest_positions ──► SparseAdam's rule on k entries ──► S, or W ← W + Vᵀ Δ U

Selection happens once, here, on the final gradient: after micro-batches have been added up, processes averaged, and the
gradient unscaled and clipped. The union of selections made on the parts would have more than `k` entries, and not all
of the right ones. Every gradient in `.grad` is dense, so accumulation, DDP, clipping and `GradScaler` work unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from .basis import Basis
from .precision import HALF_PRECISION, at_least_float32
from .processes import is_sharded, own_shard
from .products import add_chain
from .selection import coo_from_flat, flat_from_coo, largest_positions, resolve_k
from .sharded import check_row_sharded, select_from_shards, shard_group, step_shard
from .sides import cast
from .sparse_adam import match_dtype, step_selected

FUSED_ON = {"cuda"}
"""Devices on which AdamW is one kernel for all parameters of a group. Its rounding is not that of the other forms."""


class SparseGradAdamW(Optimizer):
    """SparseAdam on the largest gradient entries of some parameters, AdamW on the other parameters.

    Groups carry an explicit flag:

    - `{"params": cores, "sparse": True, "density": 0.01}` (or `"k": 1000`, per parameter): in each step, the `k`
      entries with the largest gradient move by SparseAdam's rule, and the others do not move. No weight decay.
      A gradient that arrives as COO (`LiteralSparseGradLinear`) is already selected and takes no `k`.
    - `{"params": rest}`: PyTorch's own AdamW.

    With `bases`, a `sparse` parameter may be an ordinary weight in the original space. Its gradient is taken into the
    basis and selected there, and the change is brought back, `W ← W + Vᵀ Δ U`. That is the method itself on plain
    `nn.Linear` layers: forward and backward are those of regular fine-tuning.

    The state takes 12 bytes for each entry that was ever selected (its position, and two moments in float32; 20 bytes
    in float64) and nothing for the others. Dense Adam takes 8 bytes for every entry. `touched` counts the entries.

    Parameters that FSDP2 (`fully_shard`) has cut into rows are selected from as a whole: the same entries as on one
    process, and exactly `k` (`sharded.py`). Their moments are held for every entry of a process's rows.

    Args:
        params: parameters, or groups as above.
        lr: learning rate. The best rate for selected entries differs from that for dense updates, so tune it again.
        betas: decay of the first and second moments.
        eps: added to the root of the second moment: before bias correction in `sparse` groups (SparseAdam), after it in
            the others (AdamW).
        weight_decay: decoupled, for groups without `sparse`.
        bases: the basis of each parameter in the original space, from `weight_bases`. Its sides are in the order of the
            parameter's: `V` for the rows, `U` for the columns.

    Raises:
        ValueError, TypeError: a group's flags contradict each other, numbers are out of range, or a weight with a basis
            is in half precision. The message names the group.
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
        self._given: set[int] = set()
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "sparse": False, "k": None, "density": None,
        }  # fmt: skip
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Include the bases, for copies and pickles."""
        return {**super().__getstate__(), "bases": self.bases}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give groups saved by another optimizer, such as AdamW, the flags that they lack."""
        super().__setstate__(state)
        self._given = {id(parameter) for group in self.param_groups for parameter in group["params"]}
        for group in self.param_groups:
            for name in ("sparse", "k", "density"):
                group.setdefault(name, self.defaults[name])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and check it."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1], len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        where = f"parameter group {number}"
        beta1, beta2 = group["betas"]
        for name in ("lr", "eps", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise ValueError(f"{where}: {name} must be at least 0 and finite, found {group[name]}")
        if not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ValueError(f"{where}: betas must lie in [0, 1), found {group['betas']}")
        if not isinstance(group["sparse"], bool):
            raise TypeError(f"{where}: sparse is a flag, True or False, found {group['sparse']!r}")
        if _selects(group) and not group["sparse"]:
            raise ValueError(
                f'{where}: k and density need "sparse": True, found k={group["k"]}, density={group["density"]}'
            )
        for parameter in group["params"]:
            basis = self.bases.get(parameter)
            if basis is not None and not basis.is_rotation:
                raise ValueError(
                    f"{where}: a weight needs a basis of directions without scales, found {basis.extra_repr()}; "
                    "calibrate with neurons=False and exponent=0, or use SparseGradLinear"
                )
            if basis is not None and not group["sparse"]:
                raise ValueError(f'{where}: a parameter with a basis needs "sparse": True')
            if basis is not None and parameter.dtype in HALF_PRECISION:
                raise ValueError(
                    f"{where}: a weight in {parameter.dtype} would round its changes away; keep it in float32, and use "
                    "autocast for products in half precision"
                )
            self._given.add(id(parameter))
            if _selects(group):
                self._check_selectable(parameter, where)
                shape = _selection_shape(parameter, basis)
                try:
                    resolve_k(math.prod(shape), group["k"], group["density"])
                except (TypeError, ValueError) as error:
                    raise type(error)(f"{where}, parameter of shape {tuple(parameter.shape)}: {error}") from None

    def _check_selectable(self, parameter: Tensor, where: str) -> None:
        """Raise ValueError if an engine has cut the parameter in a way that hides which entries are the largest."""
        flat = None
        if (id(parameter) not in self._given and not isinstance(parameter, nn.Parameter)) or hasattr(
            parameter, "ds_id"
        ):
            flat = "DeepSpeed ZeRO"
        elif getattr(parameter, "_fsdp_flattened", False):
            flat = "FSDP1 (FullyShardedDataParallel)"
        if flat is not None:
            raise ValueError(
                f"{where}: k and density select the largest entries of whole parameters, found parts made by {flat}; "
                "train the cores whole (k=None, density=None), or use DDP or FSDP2 (fully_shard)"
            )
        if is_sharded(parameter):
            if parameter in self.bases:
                raise ValueError(f"{where}: a weight with a basis cannot be sharded; train it with DDP")
            check_row_sharded(parameter)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step. `closure`, if given, evaluates the model and returns the loss.

        Raises:
            ValueError: a gradient does not fit its group, or, in a `sparse` group, is not finite. No parameter and no
                state has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        # Select everywhere before anything moves: selection refuses gradients that overflow in the basis.
        selected = [
            (parameter, group, *self._select(parameter, group, number))
            for number, group in enumerate(self.param_groups)
            if group["sparse"]
            for parameter in group["params"]
            if parameter.grad is not None and not is_sharded(parameter)
        ]
        shards = self._select_shards()
        for parameter, group, positions, values in selected:
            self._sparse_step(parameter, group, positions, values)
        for parameter, group, positions, values in shards:
            step_shard(
                parameter, self.state[parameter], positions, values, float(group["lr"]), group["betas"], group["eps"]
            )
        for group in self.param_groups:
            if not group["sparse"]:
                self._dense_step(group)
        return loss

    def _check_gradients(self) -> None:
        """Raise if a gradient has a layout that its group cannot take."""
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is None:
                    continue
                where = f"parameter group {number}, gradient of shape {tuple(parameter.shape)}"
                if _selects(group):
                    self._check_selectable(parameter, where)
                if not grad.is_sparse:
                    if group["sparse"] and not _selects(group):
                        raise ValueError(
                            f'{where}: a "sparse" group needs k or density for a dense gradient, found neither'
                        )
                elif not group["sparse"]:
                    raise ValueError(f'{where}: a COO gradient needs a group with "sparse": True')
                elif parameter in self.bases:
                    raise ValueError(
                        f"{where}: a parameter with a basis is selected from its dense gradient, found a COO gradient"
                    )
                elif grad.sparse_dim() != 2 or grad.dense_dim() != 0:
                    raise ValueError(
                        f"{where}: expected a dense gradient, or a COO matrix of single entries; found COO with "
                        f"{grad.sparse_dim()} sparse and {grad.dense_dim()} dense dimensions (an nn.Embedding with "
                        "sparse=True gives whole rows: make it with sparse=False)"
                    )

    def _select(self, parameter: nn.Parameter, group: dict[str, Any], number: int) -> tuple[Tensor, Tensor]:
        """Return the flat positions (k,), ascending, and the values (k,) of the selected gradient entries."""
        assert parameter.grad is not None
        wide = at_least_float32(parameter.dtype)
        if parameter.grad.is_sparse:
            positions, values = flat_from_coo(parameter.grad)
            entries = values = values.to(wide)
        else:
            grad, basis = parameter.grad.to(wide), self.bases.get(parameter)
            entries = (grad if basis is None else basis.to_basis(grad)).reshape(-1)  # G_tilde
        if not bool(entries.isfinite().all()):
            raise ValueError(
                f"parameter group {number}: the gradient of a parameter of shape {tuple(parameter.shape)} holds "
                "entries that are NaN or infinite, so the largest are not defined; look for a loss that is not finite, "
                "and check the gradients before the step"
            )
        if not parameter.grad.is_sparse:
            positions = largest_positions(entries.abs(), resolve_k(entries.numel(), group["k"], group["density"]))
            values = entries[positions]
        return positions, values

    def _select_shards(self) -> list[tuple[Any, dict[str, Any], Tensor, Tensor]]:
        """Select from all parameters that are sharded over the same processes at once."""
        found: dict[dist.ProcessGroup | None, list[tuple[Any, dict[str, Any], Tensor, int]]] = {}
        for group in self.param_groups:
            for parameter in group["params"] if group["sparse"] else ():
                if is_sharded(parameter) and parameter.grad is not None:
                    entries = own_shard(parameter.grad).reshape(-1).to(at_least_float32(parameter.dtype))
                    k = resolve_k(parameter.numel(), group["k"], group["density"])
                    found.setdefault(shard_group(parameter), []).append((parameter, group, entries, k))
        selected = []
        for processes, members in found.items():
            chosen = select_from_shards([entries for _, _, entries, _ in members], [k for *_, k in members], processes)
            selected += [(member[0], member[1], *one) for member, one in zip(members, chosen, strict=True)]
        return selected

    def _sparse_step(self, parameter: nn.Parameter, group: dict[str, Any], positions: Tensor, values: Tensor) -> None:
        change = step_selected(
            self.state[parameter], positions, values, float(group["lr"]), group["betas"], group["eps"]
        )
        basis = self.bases.get(parameter)
        if basis is None:
            # reshape would copy a parameter that is not contiguous, and the change would be lost
            rows = torch.div(positions, parameter.shape[-1], rounding_mode="floor")
            index = (rows, positions % parameter.shape[-1]) if parameter.dim() == 2 else (positions,)
            parameter[index] += change.to(parameter.dtype)
        else:
            shape = _selection_shape(parameter, basis)
            parameter.copy_(_add_from_basis(parameter.to(values.dtype), basis, positions, change, shape))

    def _dense_step(self, group: dict[str, Any]) -> None:
        params = [p for p in group["params"] if p.grad is not None]
        for parameter in params:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            match_dtype(state, parameter.dtype)
        fused = all(_can_fuse(parameter, self.state[parameter]) for parameter in params)
        for parameter in params if fused else ():
            self.state[parameter]["step"] = self.state[parameter]["step"].to(parameter.device)
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params],
            [self.state[p]["exp_avg"] for p in params],
            [self.state[p]["exp_avg_sq"] for p in params],
            [],
            [self.state[p]["step"] for p in params],
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            amsgrad=False, maximize=False, fused=fused or None,
        )  # fmt: skip

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do what `Optimizer.load_state_dict` does, and keep positions as integers and moments as wide as saved.

        Raises:
            ValueError: the saved groups differ in `sparse`, `k` or `density`, which would replace those of this
                optimizer; they are of an AdamW with `amsgrad` or `maximize`, which this optimizer does not have; or a
                parameter has other entries than when it was saved. Nothing has been loaded then.
        """
        for number, (own, saved) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            for name in ("density", "k", "sparse"):
                there = saved.get(name, self.defaults[name])  # the groups of other optimizers select nothing
                if own.get(name) != there:
                    raise ValueError(
                        f"parameter group {number} was saved with {name}={there}, found {name}={own.get(name)} here; "
                        "go on with the saved setting, or start a new run"
                    )
            if option := next((name for name in ("amsgrad", "maximize") if saved.get(name)), None):
                raise ValueError(
                    f"parameter group {number} was saved with {option}=True, expected False: this optimizer cannot "
                    "go on with it; start a new run, or use torch.optim.AdamW"
                )
            for parameter, saved_id in zip(own["params"], saved["params"], strict=False):
                self._check_positions(parameter, state_dict["state"].get(saved_id, {}), number)
        super().load_state_dict(state_dict)
        # The base class casts state to the type of its parameter: float positions, half-precision moments.
        for group, saved_group in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for parameter, saved_id in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(saved_id, {}) if group["sparse"] else {}
                for name in {"positions", "exp_avg", "exp_avg_sq"} & saved.keys():
                    self.state[parameter][name] = saved[name].to(parameter.device, copy=True)

    def _check_positions(self, parameter: nn.Parameter, saved: Mapping[str, Any], number: int) -> None:
        """Raise `ValueError` if the saved state of a parameter has positions that it does not have."""
        positions = saved.get("positions")
        if not isinstance(positions, Tensor) or not positions.numel():
            return
        entries = math.prod(_selection_shape(parameter, self.bases.get(parameter)))
        if int(positions.max()) >= entries:
            raise ValueError(
                f"parameter group {number}: the saved state has the entry {int(positions.max())} of a parameter of "
                f"shape {tuple(parameter.shape)}, which has {entries}; it belongs to a core of another size"
            )

    def touched(self, parameter: nn.Parameter) -> int:
        """Return how many entries of a `sparse` parameter were ever selected; of a sharded one, on this process."""
        state = self.state.get(parameter)
        if not state:
            return 0
        if "positions" not in state:
            return int(own_shard(state["exp_avg_sq"]).count_nonzero())
        return int(state["positions"].numel())


def _can_fuse(parameter: nn.Parameter, state: dict[str, Any]) -> bool:
    """True if PyTorch's fused AdamW takes a parameter, its gradient and its moments."""
    like = [tensor for tensor in (parameter.grad, state["exp_avg"], state["exp_avg_sq"]) if tensor is not None]
    return (
        parameter.device.type in FUSED_ON
        and parameter.is_floating_point()
        and not is_sharded(parameter)  # one call takes either only these or only others
        and all(tensor.dtype == parameter.dtype and tensor.stride() == parameter.stride() for tensor in like)
    )


def _selects(group: Mapping[str, Any]) -> bool:
    return group["k"] is not None or group["density"] is not None


def _selection_shape(parameter: Tensor, basis: Basis | None) -> tuple[int, ...]:
    if basis is None:
        if parameter.dim() not in (1, 2):
            raise ValueError(f'a "sparse" parameter must be a matrix or a vector, found shape {tuple(parameter.shape)}')
        return tuple(parameter.shape)
    if parameter.dim() != 2:
        raise ValueError(f"a parameter with a basis must be a matrix (out, in), found shape {tuple(parameter.shape)}")
    return basis.core_shape(parameter.shape[0], parameter.shape[1])


def _add_from_basis(weight: Tensor, basis: Basis, positions: Tensor, change: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `W + Vᵀ Δ U` for a `Δ` (r, c) of few entries. The first product is sparse by dense, the second dense."""
    (r, c), U, V = shape, cast(basis.U, weight.dtype), cast(basis.V, weight.dtype)
    delta = coo_from_flat(positions, change, (r, c))
    # The dense product costs out·c·in after Vᵀ Δ, and out·r·in after Δ U.
    if V is not None and (U is None or c <= r):
        return add_chain(weight, torch.sparse.mm(delta.T, V).T, U, in_place=True)
    if U is not None:
        return add_chain(weight, None if V is None else V.T, torch.sparse.mm(delta, U), in_place=True)
    return weight.add_(delta)
