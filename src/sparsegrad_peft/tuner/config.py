"""SparseGradConfig: what a SparseGrad adapter is, in PEFT's manner."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from ..method.costs import Prefer
from ..method.sizes import DEFAULT_NARROW, DEFAULT_WIDE, Rows, Sizes, check_rows
from .peft_private import ensure_peft_type


def dtype_of_bases(sizes: Sizes) -> torch.dtype:
    """The type that bases are kept in unless one is asked for."""
    return torch.float32 if sizes.complete else torch.bfloat16


_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class SparseGradConfig(PeftConfig):
    """Configuration of a SparseGrad adapter, for `get_peft_model`.

    The adapter starts as a no-op. `calibrate_adapter` gives it its bases, and `S` its size (r, c). Until then it trains
    the whole of `S` in the original space, and warns; with `original_space=True` that is what you want.

    The defaults are those that the measurements support (`docs/results.md`, dev sets). With as many trained entries as
    LoRA of rank 3 they are 0.85 points above it, over five GLUE tasks and three seeds of MiniLM (95 % interval -0.4 to
    +2.1: not beyond chance), 0.41 above the published method, and 0.77 below training all MLP weights. On a ViT they
    are level with LoRA (98.0 and 98.1), on a small LLaMA a little behind (loss 3.374 against 3.367). Bases of each
    layer were ahead of shared ones on all of these (98.0 against 97.3, 3.374 against 3.379, and 81.9 against 81.7 on
    three GLUE tasks). On these three, in one seed: gradients along a trajectory gave 81.9, along one of four times the
    length 82.5, at the start 81.2; of five shapes of the block the default's was the best, by 0.1 to 0.5; and a block
    trained whole was as good as selecting anew in each step from all of the gradient (81.9 and 81.7). These are hints:
    the default's own three seeds lie further apart (81.9, 81.3 and 80.1). Time and memory beside LoRA's:
    `docs/performance.md`.

    Args:
        narrow: rows of the basis of a layer's smaller side, the hidden size: "full", a count, a fraction, or
            "energy:SHARE". A direction of this side costs a fraction of one of the wide side.
        wide: rows of the basis of its larger side, likewise. The defaults train 1 % of a layer's entries.
        c: rows of `U`, the input side, of every layer, in place of those two.
        r: rows of `V`, the output side, of every layer, likewise. This is no rank.
        shared: one pair of bases for all layers with the same role and shape (the paper), or one for each layer, which
            scores better and takes more room: 24 MB for BERT-base with the defaults. For models of billions of
            parameters share them.
        basis_dtype: type that the bases are kept in, in memory and in the file: "bfloat16", "float32" or "float64".
            None: bfloat16 (products in half precision round them to that anyway), but float32 for complete bases, which
            lose nothing. They are rounded once, before training, so that nothing is lost afterwards.
        original_space: train in the original space on purpose, without bases: MeProp's rule, if the optimizer selects.
            the sizes above and `shared` then mean nothing.
        prefer: "memory" saves the projected input for backward, "speed" whatever costs the fewest multiply-adds.
        target_modules: which layers, as in PEFT: name endings, a regular expression, or "all-linear". None: the MLP
            linears of the architecture.
        exclude_modules: layers to leave out.
        layers_to_transform: numbers of the blocks to adapt; None adapts all.
        layers_pattern: name of the list of blocks, where `layers_to_transform` needs it.
        init_weights: True starts as a no-op; False with random values, for tests.
        modules_to_save: other modules to train and save whole, such as the head.
        trainable_token_indices: tokens whose embeddings are trained, see PEFT.
        core_shapes: written by calibration: layer name -> [group, r, c, out, in]; empty before.
    """

    narrow: Rows = field(default=DEFAULT_NARROW, metadata={"help": "rows of the basis of a layer's smaller side"})
    wide: Rows = field(default=DEFAULT_WIDE, metadata={"help": "rows of the basis of a layer's larger side"})
    c: Rows | None = field(default=None, metadata={"help": "rows of U (input side), in place of those"})
    r: Rows | None = field(default=None, metadata={"help": "rows of V (output side), in place of those; no rank"})
    shared: bool = field(default=False, metadata={"help": "one pair of bases a group of layers, or one a layer"})
    basis_dtype: str | None = field(default=None, metadata={"help": "type that the bases are kept in"})
    original_space: bool = field(default=False, metadata={"help": "no bases, on purpose: MeProp's rule"})
    prefer: Prefer = field(default="memory", metadata={"help": '"memory" or "speed"'})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to adapt; None: the MLPs"})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "layers to leave out"})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "numbers of the blocks"})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "name of the list of blocks"})
    init_weights: bool = field(default=True, metadata={"help": "start as a no-op"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "other modules to train whole"})
    trainable_token_indices: Any = field(default=None, metadata={"help": "tokens whose embeddings are trained"})
    core_shapes: dict[str, list[Any]] = field(default_factory=dict, metadata={"help": "written by calibration"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, found None")
        if self.prefer not in ("memory", "speed"):
            raise ValueError(f'prefer must be "memory" or "speed", found {self.prefer!r}')
        if self.basis_dtype not in (None, *_DTYPES):
            raise ValueError(f"basis_dtype must be one of {', '.join(_DTYPES)}, or None; found {self.basis_dtype!r}")
        for name in ("narrow", "wide", "c", "r"):
            rows = getattr(self, name)
            if rows is not None or name in ("narrow", "wide"):
                check_rows(rows, None, name)  # the layers' own sizes are not known before calibration

    @classmethod
    def paper(cls, **overrides: Any) -> SparseGradConfig:
        """The paper's bases: complete, one pair for all layers of a role. The rest of its recipe is not the adapter's:

        - 30 steps of calibration before training: `calibrate_adapter(model, batches, n_steps=30)`;
        - the largest 1 % of each layer's gradient in each step, by SparseAdam:
          `SparseGradAdamW(param_groups(model, density=0.01), lr=...)`;
        - on GLUE, the rest of the model trained by AdamW. The file of an adapter does not hold that, but for
          `modules_to_save`; `replace_linears` on the model itself is made for it.

        `S` has as many entries as the layers' weights, and so have its gradient and checkpoint. By `prefer="speed"`
        the weight with the update in it is held from forward to backward, in place of being made twice.

        Args:
            overrides: fields of the configuration, such as `task_type`.
        """
        return cls(**{"c": "full", "r": "full", "shared": True, "prefer": "speed", **overrides})

    @property
    def sizes(self) -> Sizes:
        """Rows of the bases, by the shape of a layer."""
        return Sizes(self.narrow, self.wide, self.c, self.r)

    @property
    def dtype_of_bases(self) -> torch.dtype:
        """`basis_dtype`, or what None stands for."""
        return dtype_of_bases(self.sizes) if self.basis_dtype is None else _DTYPES[self.basis_dtype]

    @property
    def calibrated(self) -> bool:
        """Whether the adapter has its bases."""
        return bool(self.core_shapes)
