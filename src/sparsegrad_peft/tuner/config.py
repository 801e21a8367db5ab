"""SparseGradConfig: the configuration of a SparseGrad adapter, in PEFT's manner."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from peft import PeftConfig

from ..method.costs import Prefer
from ..method.sizes import DEFAULT_SHARE, Rows, Sizes, check_rows, default_form
from .peft_private import ensure_peft_type

_LOADING = """**Import `sparsegrad_peft.tuner` before you load this adapter.** It is in the package sparsegrad-peft.
Without it, PEFT raises `KeyError: 'SPARSEGRAD'`.
"""
"Begins the model card that PEFT writes."

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass
class SparseGradConfig(PeftConfig):
    """Configuration of a SparseGrad adapter, for `get_peft_model`.

    A new adapter does not change the model's output. Its bases are data-free, and it trains like any PEFT method.
    `calibrate_adapter`, or one of the trainers, replaces them by bases computed from the model's gradients. Without
    this step the adapter learns less.

    By default an update is `ΔW[neurons] = S U` for the up- and gate-projections of an MLP, and `ΔW[:, neurons] = Vᵀ S`
    for the down-projection: a thirty-second of the hidden side as directions (from 64 to 128), and as many
    neurons as make 1 % of the layer's entries. docs/results.md compares this with other settings and methods.

    Args:
        narrow: rows of the basis of a layer's smaller side (the hidden size): "full", a count, a fraction, or
            "energy:SHARE". A share of energy is known after calibration; until then the default size holds. None: a
            thirty-second of the side, but from 64 to 128. With directions on both sides: as many as make the two bases
            of a layer equally large. At most about a third in both cases.
        wide: rows of the basis of a layer's larger side, likewise. None: as many as make `trained_share`.
        trained_share: share of a layer's entries that train, where `wide` is None.
        neurons: the larger side selects features, the neurons on which the gradients of different steps agree most,
            and rotates nothing. Such a basis is a list of indices. None: True, but False with `shared`, `c` or `r`.
        exponent: how much less the noisy directions move. 0: all entries move alike. None: 1.5, but 0 with `c` or `r`.
            Entry (i, j) of a core has the scale `(σ_i τ_j)^exponent`; docs/method.md defines σ and τ.
        c: rows of `U` (input side) of every layer, together with `r` in place of `narrow` and `wide`. This is the
            paper's form: directions on both sides, without scales.
        r: rows of `V` (output side) of every layer, likewise. Not a LoRA rank: `trained_share` sets how much trains.
        shared: one pair of bases for all layers with the same role and shape (the paper), or one for each layer.
            Both sides then have directions. The file is smaller, and a step takes more multiply-adds.
        basis_dtype: "bfloat16", "float32" or "float64", in memory and in the file. None: bfloat16, or float32 for
            complete bases. Bases are rounded once, before training.
        original_space: train the whole core in the original space, without bases (MeProp, if the optimizer selects).
            The sizes and `shared` then have no effect.
        prefer: "memory" saves the projected input for backward; "speed" saves what costs the fewest multiply-adds. It
            has no effect on the default form (neurons), and on weights in half precision only if `c` is "full".
        target_modules: layers to adapt, as in PEFT: name endings, a regular expression, or "all-linear". None: the MLP
            linears of the architecture, or none if `target_parameters` is given.
        target_parameters: fused experts to adapt, as in PEFT: names of parameters (experts, ., .), or their endings.
            None: all of the model, if `target_modules` is None too. []: none.
        exclude_modules: layers and modules of fused experts to leave out.
        layers_to_transform: numbers of the blocks to adapt; None adapts all.
        layers_pattern: name of the list of blocks, if `layers_to_transform` needs it.
        init_weights: True starts as a no-op; False starts with random cores, for tests.
        modules_to_save: other modules to train and save whole, such as the head.
        trainable_token_indices: tokens whose embeddings are trained, see PEFT.
        core_shapes: written by the library when the adapter is made: layer name -> [group, r, c, out, in], and the
            number of experts at the end for fused experts. Layers of a group share a basis. None for a new adapter.
        data_free: written by the library: the bases are not calibrated.

    Raises:
        ValueError: values out of range, or that exclude each other: c without r, neurons with shared, ...
        TypeError: a value of a wrong type.
    """

    narrow: Rows | None = None
    wide: Rows | None = None
    trained_share: float = DEFAULT_SHARE
    neurons: bool | None = None
    exponent: float | None = None
    c: Rows | None = None
    r: Rows | None = None
    shared: bool = False
    basis_dtype: str | None = None
    original_space: bool = False
    prefer: Prefer = "memory"
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True
    modules_to_save: list[str] | None = None
    trainable_token_indices: Any = None
    core_shapes: dict[str, list[Any]] | None = None
    data_free: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = ensure_peft_type()
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters must be a list of names or None, found {self.target_parameters!r}")
        if self.target_parameters and self.target_modules is None:
            self.target_modules = []
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, list) else value)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform, found None")
        if self.prefer not in ("memory", "speed"):
            raise ValueError(f'prefer must be "memory" or "speed", found {self.prefer!r}')
        if self.basis_dtype not in (None, *_DTYPES):
            raise ValueError(f"basis_dtype must be one of {', '.join(_DTYPES)}, or None; found {self.basis_dtype!r}")
        if self.core_shapes == {} and not self.original_space:  # a file of an early version, without calibration
            self.c, self.r, self.core_shapes = "full", "full", None
        for name in ("narrow", "wide", "c", "r"):
            rows = getattr(self, name)
            if rows is not None:
                check_rows(rows, None, name)  # against the layers' sizes: when the adapter is made
        if (self.c is None) != (self.r is None) and not self.core_shapes and not self.original_space:
            given = f"c={self.c!r}" if self.r is None else f"r={self.r!r}"
            raise ValueError(
                f"found {given} alone; expected c and r, the rows of U and of V, or neither. They are no LoRA rank: "
                "trained_share sets the share of the entries that train"
            )
        if self.c is not None and (self.narrow, self.wide) != (None, None) and not self.core_shapes:
            raise ValueError(
                f"found c={self.c!r} and r={self.r!r} beside narrow={self.narrow!r} and wide={self.wide!r}; expected "
                "one of the two pairs"
            )
        self._resolve_form()
        self.core_shapes = check_core_shapes(self.core_shapes)

    def _resolve_form(self) -> None:
        """Put the defaults of `neurons` and `exponent` in their place, and check both."""
        for name in ("neurons", "shared", "original_space", "init_weights", "data_free"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "neurons" and value is None):
                raise TypeError(f"{name} must be True or False, found {value!r}")
        # A trained adapter without these fields is of an early version, which had neither.
        plain = self.c is not None or self.r is not None or self.original_space or bool(self.core_shapes)
        self.neurons, self.exponent = default_form(self.neurons, self.exponent, plain=plain, shared=self.shared)
        if self.neurons and self.shared:
            raise ValueError(
                "found neurons=True and shared=True; expected one of them, since the neurons of different layers have "
                "nothing in common"
            )
        for name in ("exponent", "trained_share"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, found {value!r}")
        if not 0 <= self.exponent <= 2:
            raise ValueError(f"exponent must be between 0 and 2, found {self.exponent}")
        if not 0 < self.trained_share <= 1:
            raise ValueError(f"trained_share must be above 0 and at most 1, found {self.trained_share}")

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the configuration, as PEFT does, and put how to load the adapter into the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)
        path = Path(save_directory) / "README.md"
        if path.is_file() and _LOADING not in path.read_text(encoding="utf-8"):
            card = ModelCard.load(path)
            card.text = f"\n{_LOADING}\n{card.text.lstrip()}"
            card.save(path)

    @classmethod
    def paper(cls, **overrides: Any) -> SparseGradConfig:
        """Return the paper's bases: complete, one pair for all layers of a role.

        The rest of the paper's recipe is not part of an adapter:

        - 30 steps of calibration before training, all at the pretrained weights:
          `calibrate_adapter(model, batches, config=CalibrationConfig.paper())`;
        - the largest 1 % of each layer's gradient in each step, by SparseAdam:
          `SparseGradAdamW(param_groups(model, density=0.01), lr=...)`;
        - on GLUE, AdamW for the rest of the model. An adapter's file holds only `modules_to_save` of it; use
          `replace_linears` on the model itself instead.

        `S`, its gradient and its checkpoint are as large as the layers' weights. `prefer="speed"` holds the weight plus
        update from forward to backward, instead of forming it twice.

        Args:
            overrides: fields of the configuration, such as `task_type`.
        """
        return cls(
            **{
                "c": "full",
                "r": "full",
                "shared": True,
                "neurons": False,
                "exponent": 0.0,
                "prefer": "speed",
                **overrides,
            }
        )

    @property
    def sizes(self) -> Sizes:
        """Rows of the bases, by the shape of a layer."""
        return Sizes(self.narrow, self.wide, self.c, self.r, self.trained_share, bool(self.neurons))

    @property
    def form(self) -> dict[str, Any]:
        """What decides how the adapter is calibrated: the fields that are not about which layers it adapts."""
        names = ("narrow", "wide", "c", "r", "trained_share", "neurons", "exponent", "shared", "original_space")
        return {name: getattr(self, name) for name in names} | {"basis_dtype": self.dtype_of_bases}

    @property
    def complete(self) -> bool:
        """True if the bases of all layers span the whole space."""
        shapes = [shape[1:5] for shape in (self.core_shapes or {}).values()]
        return all((r, c) == (out, in_) for r, c, out, in_ in shapes) if shapes else self.sizes.complete

    @property
    def dtype_of_bases(self) -> torch.dtype:
        """The data type of the bases: `basis_dtype`, or its default, float32 for complete ones and bfloat16 else."""
        default = "float32" if self.complete else "bfloat16"
        return _DTYPES[self.basis_dtype or default]

    @property
    def calibrated(self) -> bool:
        """True if the adapter has bases from calibration."""
        return bool(self.core_shapes) and not self.data_free

    def forget_bases(self) -> None:
        """Make this the configuration of a new adapter, if it was that of an existing one."""
        self.core_shapes, self.data_free = None, False


def uncompiled_name(name: str) -> str:
    """Return the name of a layer without the parts that `torch.compile` puts into it where it wraps a module."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def check_core_shapes(shapes: Any) -> dict[str, list[Any]] | None:
    """Return `core_shapes`, by uncompiled names. Refuse damaged ones before anything of their sizes is allocated.

    Raises:
        ValueError: they are no table, or an entry is damaged.
    """
    if not isinstance(shapes, dict | None):
        raise ValueError(f"core_shapes of the adapter's config is damaged: expected a table, found {shapes!r:.80}")
    for layer, shape in (shapes or {}).items():
        _check_core_shape(layer, shape)
    return shapes and {uncompiled_name(layer): shape for layer, shape in shapes.items()}


def _check_core_shape(layer: str, shape: Any) -> None:
    valid = isinstance(shape, list) and len(shape) in (5, 6) and isinstance(shape[0], str)
    valid = valid and all(isinstance(n, int) and not isinstance(n, bool) for n in shape[1:])
    if not valid or not (1 <= shape[1] <= shape[3] and 1 <= shape[2] <= shape[4] and shape[-1] >= 1):
        raise ValueError(
            f"core_shapes of the adapter's config is damaged: {layer} has {shape!r}, expected [group, r, c, out, in] "
            "with 1 <= r <= out and 1 <= c <= in"
        )
