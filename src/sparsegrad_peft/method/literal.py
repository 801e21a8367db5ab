"""The layer as published, kept for comparison (paper: SparseGradLinear): `W_tilde` in place of `W`, COO gradients.

    forward     y = (x Uᵀ) W_tildeᵀ V + b
    backward    δ_tilde = δ Vᵀ,  G_tilde = δ_tildeᵀ x_tilde,  ∂L/∂x = δ_tilde W_tilde U,  ∂L/∂b = Σ δ

Every token is multiplied by the square `U` and `V` in forward and in backward. This takes 1.4 to 2 times as long as the
exact form that computes the same (`SparseGradAdamW` with `bases`). Selection happens in backward, and the gradient of
`W_tilde` is a COO tensor of `k` entries. Gradients of micro-batches or processes would add up to the union of their
selections, and clipping, DDP and FSDP do not accept COO gradients: use it on one device, without accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .basis import Basis, HoldsBasis
from .function import refuse_double_backward
from .plain import check_replaceable, is_conv1d, plain_linear, weight_and_bias
from .precision import at_least_float32, compute_dtype, without_autocast
from .selection import compressed_product, resolve_k, topk_magnitude

Products = Literal["regular", "sparse"]
Select = Callable[[Tensor, int], Tensor]


class LiteralFunction(torch.autograd.Function):
    """Forward and backward of `LiteralSparseGradLinear`, in the order of the paper."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (T, in)
        W_tilde: Tensor,  # (out, in), basis
        bias: Tensor | None,  # (out,), original space
        U: Tensor,  # (in, in)
        V: Tensor,  # (out, out)
        k: int,
        products: Products,
        select: Select,
    ) -> Tensor:  # (T, out)
        x_tilde = x @ U.T.to(x.dtype)
        y = (x_tilde @ W_tilde.T.to(x.dtype)) @ V.to(x.dtype)
        ctx.save_for_backward(x_tilde, W_tilde, U, V)  # x_tilde (T, in), basis
        ctx.k, ctx.products, ctx.select = k, products, select
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward()
        (delta,) = grads  # (T, out), original space
        x_tilde, W_tilde, U, V = ctx.saved_tensors
        U, V, W = (matrix.to(delta.dtype) for matrix in (U, V, W_tilde))
        with without_autocast(delta.device):  # backward may be called inside an autocast that forward was not in
            if ctx.products == "sparse":
                # Tokens without gradient are zero rows of δ and of every product that follows. Drop them once, here.
                rows, delta_tilde = compressed_product(delta, V.T)  # (rows, out)
                G_tilde = delta_tilde.T @ x_tilde[rows]
                grad_x = delta.new_zeros(delta.shape[0], U.shape[1])
                grad_x[rows] = delta_tilde @ W @ U
            else:
                delta_tilde = delta @ V.T
                G_tilde = delta_tilde.T @ x_tilde
                grad_x = delta_tilde @ W @ U
        grad_W = ctx.select(G_tilde.to(W_tilde.dtype), ctx.k) if ctx.needs_input_grad[1] else None
        grad_bias = delta.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_W, grad_bias, None, None, None, None, None


class LiteralSparseGradLinear(HoldsBasis):
    """Linear layer in the published form, trained through `W_tilde` (out, in) with a COO gradient.

    Attributes:
        W_tilde: `V W Uᵀ`, trained by a `sparse` group of `SparseGradAdamW` or by `torch.optim.SparseAdam`.
        bias: (out,) or None, the original's parameter.
        basis: complete on both sides.
        k: entries of the gradient kept in each backward pass.
        conv1d: the class of the GPT-2 `Conv1D` that this layer replaces, for `restore_linears`; else None.
    """

    bias: nn.Parameter | None
    conv1d: type[nn.Module] | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        basis: Basis,
        k: int,
        products: Products,
        select: Select,
    ) -> None:
        super().__init__()
        if products not in ("regular", "sparse"):
            raise ValueError(f'products must be "regular" or "sparse", found {products!r}')
        self.out_features, self.in_features = weight.shape
        basis.core_shape(self.out_features, self.in_features)
        if basis.U is None or basis.V is None or not basis.is_complete or not basis.is_rotation:
            raise ValueError(
                f"the published form needs a complete basis, U ({self.in_features}, {self.in_features}) and V "
                f"({self.out_features}, {self.out_features}), found {basis.extra_repr()}; use SparseGradLinear for it"
            )
        self.W_tilde = nn.Parameter(basis.to_basis(weight.detach().to(basis.U.dtype)).to(weight.dtype))
        self.register_parameter("bias", bias)
        self.hold_basis(basis, register=True)
        self.k, self.products, self.select = k, products, select

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        basis: Basis,
        *,
        k: int | None = None,
        density: float | None = None,
        products: Products = "regular",
        select: Select = topk_magnitude,
    ) -> LiteralSparseGradLinear:
        """Make a layer from an `nn.Linear` or `Conv1D`, as the paper does.

        Args:
            linear: the layer to replace.
            basis: complete on both sides.
            k: entries kept in each backward pass.
            density: the same as a share of all entries (paper: 0.01).
            products: "regular" dense products, or the paper's "sparse"-by-dense products, equations (1) and (2).
            select: the selection rule; `topk_signed_threshold_as_published` is that of the authors' code.

        Raises:
            TypeError: `linear` is not a linear layer that can be replaced (see `check_replaceable`).
            ValueError: the basis is truncated or of another shape; `k` or `density` is out of range.
        """
        check_replaceable(linear)
        weight, bias = weight_and_bias(linear)
        k = resolve_k(weight.numel(), k, density)
        layer = cls(weight, bias, basis.to(weight.device), k, products, select)
        layer.conv1d = type(linear) if is_conv1d(linear) else None
        return layer.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        dtype = compute_dtype(x, self.W_tilde)
        bias = None if self.bias is None else self.bias.to(dtype)
        flat = x.reshape(-1, self.in_features).to(dtype)  # (T, in)
        with without_autocast(x.device):
            y = LiteralFunction.apply(
                flat, self.W_tilde, bias, self.basis.U, self.basis.V, self.k, self.products, self.select
            )
        return y.view(*x.shape[:-1], self.out_features)

    def trained_cores(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained parameter and its form: ("coo", W_tilde), whose gradient arrives already selected."""
        yield "coo", self.W_tilde

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain `nn.Linear` with the weight `Vᵀ W_tilde U`."""
        dtype = self.W_tilde.dtype
        weight = self.basis.from_basis(self.W_tilde.to(at_least_float32(dtype))).to(dtype)
        return plain_linear(weight, self.bias).train(self.training)

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, k={self.k}, products={self.products}"
