"""The whole method, dense and slow, in the order of the paper's equations. Read it beside the paper.

Nothing in the library imports this file; the tests compare every fast form with it. It uses no autograd, no shared work
and no compact storage. Shapes: `W` (out, in), `x` (T, in), `delta = ∂L/∂y` (T, out), `U` (in, in) or (c, in), `V` (out,
out) or (r, out), with one basis vector per row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# 1. Calibration: the stack of weight gradients, D_out x D_in x (n_steps · n_blocks)  (paper: preliminary phase)


def weight_gradient(x: Float[Tensor, "T in"], delta: Float[Tensor, "T out"]) -> Float[Tensor, "out in"]:
    """`G = δᵀ x`."""
    return delta.T @ x


def grams(
    gradients: Float[Tensor, "n out in"], normalize: bool = False
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    """`Σ GᵀG` and `Σ GGᵀ`, added up gradient by gradient."""
    _, out, in_ = gradients.shape
    gram_in, gram_out = gradients.new_zeros(in_, in_), gradients.new_zeros(out, out)
    for G in gradients:
        if normalize and G.norm() > 0:
            G = G / G.norm()
        gram_in = gram_in + G.T @ G
        gram_out = gram_out + G @ G.T
    return gram_in, gram_out


def pair_grams(
    gradients: Float[Tensor, "layers n out in"], normalize: bool = False
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    """`Σ G_sᵀ G_t` and `Σ G_s G_tᵀ` over pairs of different steps of a layer, and over layers (not in the paper)."""
    _, n, out, in_ = gradients.shape
    gram_in, gram_out = gradients.new_zeros(in_, in_), gradients.new_zeros(out, out)
    for of_layer in gradients:
        steps = [G / G.norm() if normalize and G.norm() > 0 else G for G in of_layer]
        for s in range(n):
            for t in range(n):
                if s != t:
                    gram_in = gram_in + steps[s].T @ steps[t]
                    gram_out = gram_out + steps[s] @ steps[t].T
    return gram_in, gram_out


def half_grams(
    gradients: Float[Tensor, "layers n out in"], normalize: bool = False
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"]]:
    """The pairs of an even and an odd step alone: `(M₁ᵀM₂ + M₂ᵀM₁) / 2` and `(M₁M₂ᵀ + M₂M₁ᵀ) / 2` (not in the paper).

    `M₁` and `M₂` are the sums of every other gradient of a layer. The products are added up over layers.
    """
    _, _, out, in_ = gradients.shape
    gram_in, gram_out = gradients.new_zeros(in_, in_), gradients.new_zeros(out, out)
    for of_layer in gradients:
        M = [torch.zeros_like(of_layer[0]), torch.zeros_like(of_layer[0])]
        for step, G in enumerate(of_layer):
            M[step % 2] = M[step % 2] + (G / G.norm() if normalize and G.norm() > 0 else G)
        gram_in = gram_in + (M[0].T @ M[1] + M[1].T @ M[0]) / 2
        gram_out = gram_out + (M[0] @ M[1].T + M[1] @ M[0].T) / 2
    return gram_in, gram_out


def common_shares(
    gradients: Float[Tensor, "layers n out in"], rows: Float[Tensor, "k in"], normalize: bool = False
) -> Float[Tensor, " k"]:
    """Mean product of two different steps along each row, over the mean square of one step (not in the paper)."""
    n = gradients.shape[1]
    shares = []
    for u in rows:
        pairs = squares = 0.0
        for of_layer in gradients:
            along = [(G / G.norm() if normalize and G.norm() > 0 else G) @ u for G in of_layer]
            squares += sum(float(v @ v) for v in along) / n
            pairs += sum(float(along[s] @ along[t]) for s in range(n) for t in range(n) if s != t) / (n * (n - 1))
        shares.append(min(max(pairs / squares, 0.0), 1.0))
    return gradients.new_tensor(shares)


# 2. HOSVD of the stack: left singular vectors of its unfoldings  (paper: preliminary phase)


def hosvd(
    gradients: Float[Tensor, "n out in"],
) -> tuple[Float[Tensor, "in in"], Float[Tensor, "out out"], Float[Tensor, " k_in"], Float[Tensor, " k_out"]]:
    """`U`, `V` and the squared singular values of both unfoldings, by SVD as in the paper."""
    n, out, in_ = gradients.shape
    unfolded_in = gradients.permute(2, 0, 1).reshape(in_, n * out)
    unfolded_out = gradients.permute(1, 0, 2).reshape(out, n * in_)
    left_in, singular_in, _ = torch.linalg.svd(unfolded_in, full_matrices=True)
    left_out, singular_out, _ = torch.linalg.svd(unfolded_out, full_matrices=True)
    return left_in.T, left_out.T, singular_in**2, singular_out**2


# 2b. Coordinates in place of directions, and scales  (not in the paper)


def strongest_features(gram: Float[Tensor, "n n"], k: int) -> Float[Tensor, "k n"]:
    """The `k` features with the most gradient energy as rows of the identity, in ascending order."""
    energies = gram.diagonal().tolist()
    order = sorted(range(len(energies)), key=lambda i: (-energies[i], i))
    return torch.eye(len(energies), dtype=gram.dtype)[sorted(order[:k])]


def scales(shares: Float[Tensor, " k"], exponent: float) -> Float[Tensor, " k"]:
    """`σ^q` for common shares `σ²`, with a root mean square of 1."""
    sigma = shares.sqrt()
    return sigma**exponent / (sigma**exponent).square().mean().sqrt()


def scaled_update(
    S: Float[Tensor, "r c"],
    U: Float[Tensor, "c in"],
    V: Float[Tensor, "r out"],
    scale_in: Float[Tensor, " c"],
    scale_out: Float[Tensor, " r"],
) -> Float[Tensor, "out in"]:
    """`Vᵀ diag(scale_out) S diag(scale_in) U`."""
    return V.T @ torch.diag(scale_out) @ S @ torch.diag(scale_in) @ U


# 3. Selection  (paper: top-k of the gradient; sparse-by-dense product)


def topk_mask(G_tilde: Float[Tensor, "r c"], k: int) -> Bool[Tensor, "r c"]:
    """True at the `k` entries largest in magnitude; of equal entries, the first in row-major order."""
    entries = G_tilde.reshape(-1).abs().tolist()
    order = sorted(range(len(entries)), key=lambda i: (-entries[i], i))
    mask = torch.zeros(len(entries), dtype=torch.bool, device=G_tilde.device)
    mask[order[:k]] = True
    return mask.reshape(G_tilde.shape)


def sparse_dense_product(A: Float[Tensor, "b c"], B: Float[Tensor, "c d"]) -> Float[Tensor, "b d"]:
    """Equations (1) and (2), computed entry by entry."""
    rows = [i for i in range(A.shape[0]) if any(A[i, j] != 0 for j in range(A.shape[1]))]
    cols = [j for j in range(A.shape[1]) if any(A[i, j] != 0 for i in range(A.shape[0]))]
    C = A.new_zeros(A.shape[0], B.shape[1])
    for i in rows:
        for j in range(B.shape[1]):
            for l in cols:  # noqa: E741
                C[i, j] += A[i, l] * B[l, j]
    return C


# 4. SparseGradLinear  (paper: SparseGradLinear)


@dataclass
class Layer:
    """The published layer, with everything in the basis."""

    W_tilde: Float[Tensor, "r c"]
    "`V W Uᵀ`"
    bias: Float[Tensor, " out"] | None
    U: Float[Tensor, "c in"]
    V: Float[Tensor, "r out"]
    W_outside: Float[Tensor, "out in"]
    "the part of `W` outside the bases, frozen; 0 if they are complete"

    @classmethod
    def from_weight(
        cls,
        W: Float[Tensor, "out in"],
        bias: Float[Tensor, " out"] | None,
        U: Float[Tensor, "c in"],
        V: Float[Tensor, "r out"],
    ) -> Layer:
        """`W = Vᵀ W_tilde U + W_outside`."""
        W_tilde = V @ W @ U.T
        return cls(W_tilde, bias, U, V, W - V.T @ W_tilde @ U)

    def forward(self, x: Float[Tensor, "T in"]) -> Float[Tensor, "T out"]:
        """`y = (x Uᵀ) W_tildeᵀ V + b`."""
        x_tilde = x @ self.U.T
        y = x_tilde @ self.W_tilde.T @ self.V + x @ self.W_outside.T
        return y if self.bias is None else y + self.bias

    def backward(
        self, x: Float[Tensor, "T in"], delta: Float[Tensor, "T out"]
    ) -> tuple[Float[Tensor, "T in"], Float[Tensor, "r c"], Float[Tensor, " out"]]:
        """`∂L/∂x = δ_tilde W_tilde U`, `G_tilde = δ_tildeᵀ x_tilde`, and the sum of `δ` for the bias."""
        x_tilde = x @ self.U.T
        delta_tilde = delta @ self.V.T
        grad_x = delta_tilde @ self.W_tilde @ self.U + delta @ self.W_outside
        return grad_x, delta_tilde.T @ x_tilde, delta.sum(dim=0)

    def weight(self) -> Float[Tensor, "out in"]:
        """The weight in the original space."""
        return self.V.T @ self.W_tilde @ self.U + self.W_outside


# 5. Optimizer  (paper: SparseAdam)


@dataclass
class SparseAdam:
    """SparseAdam with dense moments. Entries outside the mask keep their weight and their moments."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    step_count: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None
    touched: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))

    def step(
        self, W_tilde: Float[Tensor, "r c"], G_tilde: Float[Tensor, "r c"], mask: Bool[Tensor, "r c"]
    ) -> Float[Tensor, "r c"]:
        """Return the new `W_tilde`."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(W_tilde), torch.zeros_like(W_tilde)
            self.touched = torch.zeros_like(mask)
        beta1, beta2 = self.betas
        self.step_count += 1
        self.touched = self.touched | mask
        self.exp_avg = torch.where(mask, beta1 * self.exp_avg + (1 - beta1) * G_tilde, self.exp_avg)
        self.exp_avg_sq = torch.where(mask, beta2 * self.exp_avg_sq + (1 - beta2) * G_tilde**2, self.exp_avg_sq)
        correction1, correction2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        change = self.lr * math.sqrt(correction2) / correction1 * self.exp_avg / (self.exp_avg_sq.sqrt() + self.eps)
        return torch.where(mask, W_tilde - change, W_tilde)


@dataclass
class AdamW:
    """AdamW with decoupled weight decay, for every parameter without selection."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    step_count: int = 0
    exp_avg: Tensor | None = None
    exp_avg_sq: Tensor | None = None

    def step(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the new parameter."""
        if self.exp_avg is None or self.exp_avg_sq is None:
            self.exp_avg, self.exp_avg_sq = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = self.betas
        self.step_count += 1
        self.exp_avg = beta1 * self.exp_avg + (1 - beta1) * gradient
        self.exp_avg_sq = beta2 * self.exp_avg_sq + (1 - beta2) * gradient**2
        corrected = self.exp_avg / (1 - beta1**self.step_count)
        root = (self.exp_avg_sq / (1 - beta2**self.step_count)).sqrt() + self.eps
        return parameter - self.lr * self.weight_decay * parameter - self.lr * corrected / root


# Refresh: from one pair of bases into another


def rotate(
    S: Float[Tensor, "r c"],
    U: Float[Tensor, "c in"],
    V: Float[Tensor, "r out"],
    U_new: Float[Tensor, "c2 in"],
    V_new: Float[Tensor, "r2 out"],
) -> Float[Tensor, "r2 c2"]:
    """Rewrite a matrix given in (U, V) in (U_new, V_new)."""
    return V_new @ (V.T @ S @ U) @ U_new.T


# Fused experts: the experts of a layer as one matrix  (not in the paper)


def stacked(W: Float[Tensor, "E out in"], by_outputs: bool) -> Float[Tensor, "all_out all_in"]:
    """The experts' matrices below each other (E · out, in), or side by side (out, E · in)."""
    return torch.cat(list(W), dim=0 if by_outputs else 1)


def unstacked(W: Float[Tensor, "all_out all_in"], experts: int, by_outputs: bool) -> Float[Tensor, "E out in"]:
    """The inverse of `stacked`."""
    return torch.stack(W.chunk(experts, dim=0 if by_outputs else 1))
