"""SparseGradLinear: a frozen linear layer and a small trained core in the basis.

    y = x (W + Vᵀ S U)ᵀ + b        W (out, in) frozen,  U (c, in) and V (r, out) shared,  S (r, c) trained

At the start `S = 0`, so the layer computes what the original did. With a complete basis (c = in, r = out) training `S`
is the paper's training of `W_tilde = V W Uᵀ`, written as its difference from the start; with a truncated one it is an
adapter of `r · c` entries. `W` stays in its own basis: rotating every token is where the time of the published form
(`literal.py`) goes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .basis import Basis, HoldsBasis
from .function import Prefer, SparseGradFunction, dense_core, form_weight, output_without_grad


def autocast_kind(device: torch.device) -> str:
    """The device type to ask autocast about: it knows nothing of some, such as "meta", and raises."""
    return device.type if torch.amp.is_autocast_available(device.type) else "cpu"


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """The type a linear layer computes in: autocast's where it is on (float64 is exempt), else the weight's."""
    kind = autocast_kind(x.device)
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def apply_core(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    core: Tensor,
    positions: Tensor | None,
    basis: Basis,
    prefer: Prefer,
) -> Tensor:
    """`y = x (W + Vᵀ S U)ᵀ + b` for any leading dimensions, under autocast or not.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,) or None.
        core: `S` (r, c), or packed values (k).
        positions: (k,) of the packed values, or None.
        basis: which fits the weight.
        prefer: see `function.py`.

    Returns:
        (..., out).
    """
    out_features, in_features = weight.shape
    dtype, kind = compute_dtype(x, weight), autocast_kind(x.device)
    flat = x.reshape(-1, in_features)  # (T, in)
    if torch.is_autocast_enabled(kind):
        flat = flat.to(dtype)
    U, V = basis.U, basis.V
    core_shape = (out_features if V is None else V.shape[0], in_features if U is None else U.shape[0])
    operands = (flat, weight, None if bias is None else bias.to(dtype), core, positions, U, V, core_shape, prefer)
    with torch.autocast(kind, enabled=False):
        compute = SparseGradFunction.apply if torch.is_grad_enabled() else output_without_grad
        y = compute(*operands)  # (T, out)
    return y.view(*x.shape[:-1], out_features)


class SparseGradLinear(HoldsBasis):
    """Linear layer trained in the basis. Make one with `from_linear`.

    The trained core is an ordinary dense parameter, in one of two forms:

    - the block `S` (r, c), with the largest entries of its gradient selected in the optimizer's step
      (`SparseGradAdamW`, group flag `sparse`), or every entry trained by AdamW where the block is small;
    - packed `values` (k) at the flat row-major `positions` (k, int32) of `S`: a 1 % adapter that is 1 % in memory, in
      the checkpoint and in any count of trainable parameters. See `pack`.

    Attributes:
        weight: (out, in), frozen, the original's storage.
        bias: (out,) or None, the original's parameter, trained or not as before.
        basis: the shared `Basis`.
        S: (r, c) or None where packed; float32 for half precision weights.
        conv1d: the class of a GPT-2 `Conv1D` that this layer took the place of, for `restore_linears`; else None.
        values, positions: (k) and (k), or None where not packed.
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
        dtype = core_dtype or torch.promote_types(weight.dtype, torch.float32)
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
        """Take over an `nn.Linear` or a GPT-2 `Conv1D`; the original's weight storage is shared, not copied.

        Args:
            linear: the layer to replace.
            basis: of the layer's group; complete or truncated, or `Basis.identity()`.
            positions: (k,) flat row-major positions in (r, c): train these entries only, packed.
            core_dtype: of the trained core; None is float32, or float64 for a float64 layer.
            prefer: "memory" saves for backward the projected input; "speed" what costs the fewest multiply-adds.

        Raises:
            TypeError: `linear` is no linear layer.
            ValueError: the basis or the positions do not fit the layer.
        """
        weight, bias = weight_and_bias(linear)
        layer = cls(weight, bias, basis.to(weight.device), core_dtype=core_dtype, prefer=prefer)
        layer.conv1d = type(linear) if is_conv1d(linear) else None
        if positions is not None:
            layer.pack(positions)
        return layer.train(linear.training)

    @property
    def core(self) -> nn.Parameter:
        """What is trained: `S` or `values`."""
        core = self.S if self.S is not None else self.values
        assert core is not None
        return core

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return apply_core(x, self.weight, self.bias, self.core, self.positions, self.basis, self.prefer)

    def trained_cores(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this layer trains in the basis, and how: ("block", S) or ("packed", values)."""
        yield ("block" if self.S is not None else "packed"), self.core

    @torch.no_grad()
    def dense_core(self) -> Tensor:
        """The core as a block (r, c), whichever form it is held in; a copy if packed."""
        return dense_core(self.core.detach(), self.positions, self.core_shape)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """`Vᵀ S U` (out, in): what training has added to the weight."""
        return self.basis.from_basis(self.dense_core().to(torch.promote_types(self.core.dtype, torch.float32)))

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """A plain `nn.Linear` with the trained weight `W + Vᵀ S U`; this layer is left as it is."""
        weight = form_weight(self.weight, self.dense_core(), self.basis.U, self.basis.V)
        return plain_linear(weight, self.bias).train(self.training)

    @torch.no_grad()
    def pack(self, positions: Tensor) -> None:
        """Train only the entries of `S` at `positions`, held as a vector `values`; the parameter `S` is gone.

        Args:
            positions: (k,) integers, flat and row-major in (r, c); put in ascending order here.

        Raises:
            ValueError: positions out of range or repeated; `S` holds learnt entries elsewhere (`fold` them first).
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
        """Hold the core as a block `S` again; the parameter `values` is gone."""
        if self.values is not None:
            self.S = nn.Parameter(self.dense_core(), requires_grad=self.values.requires_grad)
            self.values = self.positions = None

    @torch.no_grad()
    def fold(self) -> None:
        """Put what was learnt into the weight, `W ← W + Vᵀ S U`, and set the core to zero; the output stays.

        The weight storage is replaced, not written, so a model that shares it is left alone. After this the core alone
        is no longer the difference from the original layer.
        """
        folded = form_weight(self.weight, self.dense_core(), self.basis.U, self.basis.V)
        self.weight = nn.Parameter(folded.clone(), requires_grad=self.weight.requires_grad)
        self.core.zero_()

    def extra_repr(self) -> str:
        """Shapes and form of the core, for `print(model)`."""
        core = f"S={self.core_shape}" if self.S is not None else f"values={self.core.numel()} of {self.core_shape}"
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {core}"


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's `Conv1D`, a linear layer with its weight as (in, out); transformers is not imported for it."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def weight_and_bias(linear: nn.Module) -> tuple[Tensor, nn.Parameter | None]:
    """Weight as (out, in) and bias of an `nn.Linear` or a GPT-2 `Conv1D`; views, no copies.

    Raises:
        TypeError: another kind of module, or a weight that is not floating point.
    """
    if not (isinstance(linear, nn.Linear) or is_conv1d(linear)):
        raise TypeError(f"expected a torch.nn.Linear or a Conv1D, found {type(linear).__name__}")
    weight, bias = linear.weight, linear.bias
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point() or weight.dim() != 2:
        raise TypeError(
            f"expected a floating point weight (out, in), found {weight.dtype} of shape {tuple(weight.shape)}"
        )
    return (weight.T if is_conv1d(linear) else weight), bias  # type: ignore[return-value]


def plain_linear(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    """An `nn.Linear` that owns copies of a weight (out, in) and a bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def as_conv1d(linear: nn.Linear, conv1d: type[nn.Module]) -> nn.Module:
    """The same layer with its weight as (in, out), as GPT-2's classes and their checkpoints have it."""
    with torch.device("meta"):
        layer = conv1d(linear.out_features, linear.in_features)
    layer.weight = nn.Parameter(linear.weight.detach().T.contiguous(), requires_grad=linear.weight.requires_grad)
    layer.bias = linear.bias
    return layer.train(linear.training)


def check_positions(positions: Tensor, numel: int) -> Tensor:
    """Positions ascending as int32, which halves their bytes; a layer has fewer than 2³¹ entries.

    Raises:
        TypeError, ValueError: not a vector of integers, empty, out of range, or repeated.
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
