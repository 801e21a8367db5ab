"""SparseGradLinear: a frozen linear layer and a small trained core in the basis.

    y = x (W + Vᵀ S U)ᵀ + b        W (out, in) frozen,  U (c, in) and V (r, out) shared,  S (r, c) trained

`S` starts at zero, so the layer computes what the original did. With a complete basis (c = in, r = out), training `S`
is the paper's training of `W_tilde = V W Uᵀ`, written as the difference from its start. With a truncated basis it is an
adapter of `r · c` entries. `W` stays in the original space: the published form (`literal.py`) spends most of its time
on rotating every token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .basis import Basis, HoldsBasis
from .costs import Prefer
from .function import SparseGradFunction, dense_core, form_weight, output
from .plain import check_replaceable, is_conv1d, plain_linear, weight_and_bias
from .precision import at_least_float32, autocast_kind, compute_dtype, without_autocast
from .sides import scaled


def apply_core(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    positions: Tensor | None,
    basis: Basis,
    prefer: Prefer,
) -> Tensor:
    """Compute `y = x (W + Vᵀ S U)ᵀ + b` for any leading dimensions, with or without autocast.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        core: `S` (r, c), or packed values (k).
        positions: (k,) of the packed values, or None.
        basis: a basis that fits the weight.
        prefer: what to save for backward, see `costs.Prefer`.

    Returns:
        (..., out).

    Raises:
        ValueError: `x` has another number of features than the weight.
        RuntimeError: `x` has another type than the weight, without autocast.
    """
    out_features, in_features = weight.shape
    if x.shape[-1] != in_features:
        raise ValueError(f"expected inputs with {in_features} features, found shape {tuple(x.shape)}")
    dtype = compute_dtype(x, weight)
    flat = x.reshape(-1, in_features)  # (T, in)
    if torch.is_autocast_enabled(autocast_kind(x.device)):
        flat = flat.to(dtype)
    elif flat.dtype != dtype:  # as `torch.nn.functional.linear` does
        raise RuntimeError(f"expected input and weight to have the same dtype, but got: {flat.dtype} != {dtype}")
    bias = None if bias is None else bias.to(dtype)
    operands = (flat, weight, bias, core, positions, basis.U, basis.V, *basis.scales, prefer)
    with without_autocast(x.device):
        y = SparseGradFunction.apply(*operands) if torch.is_grad_enabled() else output(*operands)[0]  # (T, out)
    return y.view(*x.shape[:-1], out_features)


class SparseGradLinear(HoldsBasis):
    """Linear layer trained in the basis. Make one with `from_linear`.

    The trained core is an ordinary dense parameter, in one of two forms:

    - The block `S` (r, c). `SparseGradAdamW` selects the largest entries of its gradient in each step (group flag
      `sparse`), or AdamW trains every entry where the block is small.
    - Packed `values` (k) at the flat row-major `positions` (k, int32) of `S`. A 1 % adapter then takes 1 % in memory,
      in the checkpoint and in the count of trainable parameters. See `pack`.

    Attributes:
        weight: (out, in), frozen, the original's storage.
        bias: (out,) or None, the original's parameter, trained or frozen as before.
        basis: the shared `Basis`.
        S: (r, c), or None if packed; float32 for half-precision weights.
        conv1d: the class of the GPT-2 `Conv1D` that this layer replaces, for `restore_linears`; else None.
        values, positions: (k) and (k), or None if not packed.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    S: nn.Parameter | None
    values: nn.Parameter | None
    positions: Tensor | None
    conv1d: type[nn.Module] | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        basis: Basis,
        *,
        core_dtype: torch.dtype | None = None,
        prefer: Prefer = "memory",
    ) -> None:
        super().__init__()
        if prefer not in ("memory", "speed"):
            raise ValueError(f'prefer must be "memory" or "speed", found {prefer!r}')
        self.out_features, self.in_features = weight.shape
        self.core_shape = basis.core_shape(self.out_features, self.in_features)
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.register_parameter("bias", bias)
        self.hold_basis(basis, register=True)
        self.prefer = prefer
        dtype = core_dtype or at_least_float32(weight.dtype)
        self.S = nn.Parameter(torch.zeros(self.core_shape, dtype=dtype, device=weight.device))
        self.register_parameter("values", None)
        self.register_buffer("positions", None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        basis: Basis,
        *,
        positions: Tensor | None = None,
        core_dtype: torch.dtype | None = None,
        prefer: Prefer = "memory",
    ) -> SparseGradLinear:
        """Make a layer from an `nn.Linear` or a GPT-2 `Conv1D`. It shares the original's weight storage.

        Args:
            linear: the layer to replace.
            basis: of the layer's group; complete or truncated, or `Basis.identity()`.
            positions: (k,) flat row-major positions in (r, c): train these entries only, packed.
            core_dtype: type of the trained core; None is float32, or float64 for a float64 layer.
            prefer: "memory" saves the projected input for backward, "speed" whatever needs the fewest multiply-adds.

        Raises:
            TypeError: `linear` is not a linear layer that can be replaced (see `check_replaceable`).
            ValueError: the basis or the positions do not fit the layer.
        """
        check_replaceable(linear)
        weight, bias = weight_and_bias(linear)
        layer = cls(weight, bias, basis.to(weight.device), core_dtype=core_dtype, prefer=prefer)
        layer.conv1d = type(linear) if is_conv1d(linear) else None
        if positions is not None:
            layer.pack(positions)
        return layer.train(linear.training)

    @property
    def core(self) -> nn.Parameter:
        """The trained parameter: `S` or `values`."""
        core = self.S if self.S is not None else self.values
        assert core is not None
        return core

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return apply_core(x, self.weight, self.bias, self.core, self.positions, self.basis, self.prefer)

    def trained_cores(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameter and its form: ("block", S) or ("packed", values)."""
        yield ("block" if self.S is not None else "packed"), self.core

    @torch.no_grad()
    def dense_core(self) -> Tensor:
        """Return the core as a block (r, c), a copy if it is packed."""
        return dense_core(self.core.detach(), self.positions, self.core_shape)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Return the learnt update `Vᵀ S U` (out, in), in float32 at least."""
        return self.basis.from_basis(self.dense_core().to(at_least_float32(self.core.dtype)))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the weight `W + Vᵀ S U`; this layer does not change."""
        weight = form_weight(self.weight, scaled(self.dense_core(), self.basis.scales), self.basis.U, self.basis.V)
        return plain_linear(weight, self.bias).train(self.training)

    @torch.no_grad()
    def pack(self, positions: Tensor) -> None:
        """Train only the entries of `S` at `positions`, held as a vector `values` in place of `S`.

        Args:
            positions: (k,) integers, flat and row-major in (r, c), in any order.

        Raises:
            ValueError: positions are out of range or repeated, or `S` has learnt entries elsewhere (`fold` them first).
        """
        r, c = self.core_shape
        positions = check_positions(positions, r * c).to(self.weight.device)
        S = self.dense_core()
        left_out = int(S.count_nonzero() - S.reshape(-1)[positions.long()].count_nonzero())
        if left_out:
            raise ValueError(
                f"packing {positions.numel()} of {r * c} entries would drop {left_out} learnt ones; choose positions "
                "that contain them, or call fold() first to put what was learnt into the weight"
            )
        requires_grad = self.core.requires_grad
        self.values = nn.Parameter(S.reshape(-1)[positions.long()].clone(), requires_grad=requires_grad)
        self.positions = positions
        self.S = None

    @torch.no_grad()
    def unpack(self) -> None:
        """Hold the core as a block `S` again, in place of `values`."""
        if self.values is not None:
            self.S = nn.Parameter(self.dense_core(), requires_grad=self.values.requires_grad)
            self.values = self.positions = None

    @torch.no_grad()
    def fold(self) -> None:
        """Add the learnt update to the weight, `W ← W + Vᵀ S U`, and set the core to zero; the output stays.

        The weight gets new storage, so a model that shares the old one does not change. Afterwards the core alone is no
        longer the difference from the original layer.
        """
        self.check_frozen()
        self.set_weight(
            form_weight(self.weight, scaled(self.dense_core(), self.basis.scales), self.basis.U, self.basis.V)
        )
        self.core.zero_()

    def check_frozen(self) -> None:
        """Raise `ValueError` if the weight trains: an optimizer would keep the tensor that `set_weight` replaces."""
        if self.weight.requires_grad:
            raise ValueError(
                "the layer's weight trains (requires_grad), and an optimizer would keep the tensor that is replaced "
                "here; freeze it with layer.weight.requires_grad_(False)"
            )

    def set_weight(self, weight: Tensor) -> None:
        """Give the layer another frozen weight (out, in), rounded to the type of the old one."""
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)

    def extra_repr(self) -> str:
        """Shapes and form of the core, for `print(model)`."""
        core = f"S={self.core_shape}" if self.S is not None else f"values={self.core.numel()} of {self.core_shape}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {core}"


def check_positions(positions: Tensor, numel: int) -> Tensor:
    """Return positions ascending as int32, half the bytes of int64; a layer has fewer than 2³¹ entries.

    Raises:
        TypeError: not a vector of integers.
        ValueError: empty, out of range, or repeated.
    """
    if positions.dim() != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise TypeError(
            f"expected positions as a vector of integers, found {positions.dtype} of shape {tuple(positions.shape)}"
        )
    distinct = positions.unique()
    if not positions.numel() or int(distinct[0]) < 0 or int(distinct[-1]) >= numel or len(distinct) < len(positions):
        found = f"from {int(distinct[0])} to {int(distinct[-1])}" if positions.numel() else "none"
        raise ValueError(
            f"expected positions between 0 and {numel - 1}, each once; found {positions.numel()} "
            f"({len(distinct)} distinct), {found}"
        )
    return distinct.to(torch.int32)


def set_core(core: nn.Parameter, value: Tensor) -> None:
    """Write a value of any shape into a core. The parameter object stays the same."""
    core.grad = None
    if value.shape == core.shape and value.dtype == core.dtype and not core.is_meta:
        with torch.no_grad():
            core.copy_(value)  # autograd then refuses a graph that was made with the old value
        return
    if value.shape != core.shape:
        # A graph that is still alive, such as that of the last loss, keeps autograd's record of the old shape, by which
        # the next gradient would be refused. Autograd drops the record when the data type changes.
        core.data = core.new_empty(0, dtype=torch.float16 if core.dtype == torch.float32 else torch.float32)
    core.data = value
