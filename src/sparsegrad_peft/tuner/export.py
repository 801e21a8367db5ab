"""Export a saved SparseGrad adapter as a LoRA adapter, for servers that know only LoRA (vLLM, llama.cpp, TGI).

The adapter's folder is enough; no model is needed. `low_rank.py` has the mathematics.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PretrainedConfig

from ..method.sides import Side, as_matrix, check_selected, is_selected, scaled
from .adapters import ROOT
from .config import SparseGradConfig, check_core_shapes
from .fit import check_form
from .low_rank import ExpertFactors, Factors, decompose, decompose_experts
from .peft_private import NAME, PREFIX, mistaken_for_experts
from .weights import AdapterWeights

logger = logging.getLogger(__name__)

_MADE_BY = {"format": "pt", "made_by": "sparsegrad_peft.export_lora"}  # metadata that marks an earlier export
_MIXED = f"{CONFIG_NAME} and {SAFETENSORS_WEIGHTS_NAME} do not belong together; save or copy the adapter again"
_CARRIED = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save",
            "trainable_token_indices")  # fmt: skip

CARD = "README.md"
COMPANIONS = (
    "added_tokens.json", "chat_template.jinja", "merges.txt", "pixels.json", "preprocessor_config.json",
    "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "vocab.json", "vocab.txt",
)  # fmt: skip
"""Files of a tokenizer or an image processor; an export copies them."""


def export_lora(
    adapter: str | Path, out: str | Path, rank: int | Literal["full"], *, fan_in_fan_out: bool = False
) -> dict[str, float]:
    """Write a LoRA adapter that computes what a saved SparseGrad adapter does, or its best approximation of a rank.

    All layers get one rank and a scaling of 1, which every server accepts. The adapter's other tensors are copied:
    `modules_to_save` such as a new head, and trained tokens. (PEFT loads them; vLLM refuses them.) A tokenizer in the
    folder is copied too. For mixtures of experts, the config of the base model is read, if it is on this machine.

    Args:
        adapter: folder of a SparseGrad adapter, as `save_pretrained` wrote it.
        out: folder to write. It may exist if it is empty or an earlier export, which is replaced.
        rank: of all layers; "full" takes the largest rank of an update, and loses nothing.
        fan_in_fan_out: PEFT's flag for models of `Conv1D` layers (GPT-2). The matrices are the same for both, and PEFT
            corrects the flag with a warning when it loads the adapter.

    Returns:
        Layer name -> relative error of its update in the Frobenius norm: 0.1 means that a tenth of it is lost.

    Raises:
        FileNotFoundError: the folder or one of its two files is missing.
        FileExistsError: `out` is a file, or holds something that is no earlier export.
        ValueError: the rank is no positive count, the folder is no SparseGrad adapter, or its files are damaged.
    """
    if rank != "full" and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f'rank must be a count of at least 1, or "full", found {rank!r}')
    out = Path(out).resolve()
    _check_replaceable(out)
    config, tensors, weights = _read(Path(adapter))
    factors = _factors(config, weights)
    carried = {name: value for name, value in tensors.items() if f".{PREFIX}" not in name}
    if config.get("modules_to_save") and not carried:
        raise ValueError(
            f"{adapter}: its config has modules_to_save={config['modules_to_save']}, and its weights hold none of "
            f"them; {_MIXED}"
        )

    largest = max(1, *(layer.rank for layer in factors.values()))  # a rank of 0 is no LoRA adapter
    if rank != "full" and rank > largest:
        logger.warning("no layer's update has a rank above %d; exported at that rank instead of %d", largest, rank)
    chosen = largest if rank == "full" else min(rank, largest)
    fused = [name for name in config.get("target_parameters") or () if name in factors]
    paths, lora = _lora_paths(factors, fused), {}
    for name, layer in factors.items():
        prefix = f"{ROOT}{paths[name]}.lora_"
        lora[f"{prefix}B.weight"], lora[f"{prefix}A.weight"] = layer.lora(chosen)
    lora_config = _lora_config(config, chosen, fan_in_fan_out)
    lora_config.target_modules, lora_config.target_parameters = _targets(config, factors, fused)
    if carried:
        logger.warning(
            "the adapter also holds %d tensors of modules_to_save or trained tokens, such as %s; PEFT loads them with "
            "the LoRA adapter, a server may not", len(carried), next(iter(carried)),
        )  # fmt: skip
    companions = [path for name in COMPANIONS if (path := Path(adapter) / name).is_file()]
    _write(out, lora_config, lora | carried, companions)
    return {name: layer.error(chosen) for name, layer in factors.items()}


def _lora_config(config: dict[str, Any], rank: int, fan_in_fan_out: bool) -> LoraConfig:
    options: dict[str, Any] = {key: config.get(key) for key in _CARRIED}
    options["modules_to_save"] = sorted(set(options["modules_to_save"] or ())) or None
    options |= {"r": rank, "lora_alpha": rank, "fan_in_fan_out": fan_in_fan_out, "inference_mode": True}
    return LoraConfig(**options)


def _targets(
    config: dict[str, Any], factors: Iterable[str], fused: Sequence[str]
) -> tuple[list[str], list[str] | None]:
    """Return the names of layers as PEFT's LoRA finds them: `target_modules`, and `target_parameters`.

    They are whole names: bare endings (`down_proj`) may match layers that are not adapted. They are lists: servers do
    not read regular expressions. They are sorted: the same adapter gives the same file.
    """
    linears = sorted(set(factors) - set(fused))
    # Without the base model's type: a model with fused experts may be one of those whose linears PEFT mistakes.
    mistaken = mistaken_for_experts(linears, _model_type(config), unknown=bool(fused))
    if mistaken:
        logger.warning(
            "the base model is a mixture of experts, where PEFT would take LoRA on %d linear layers, such as %s, for "
            "LoRA on experts; they are written as target_parameters, which PEFT loads. A server may not: merge the "
            "adapter for it", len(mistaken), mistaken[0],
        )  # fmt: skip
    if fused:
        logger.warning(
            "the adapter holds %d parameters of fused experts, such as %s; PEFT loads their LoRA matrices "
            "(target_parameters), a server may not", len(fused), fused[0],
        )  # fmt: skip
    modules = [name for name in linears if name not in mistaken]
    return modules, [*fused, *(f"{name}.weight" for name in mistaken)] or None


def _model_type(config: dict[str, Any]) -> str | None:
    """Return the type of the adapter's base model, or None if its config is not on this machine."""
    if not config.get("base_model_name_or_path"):
        return None
    try:
        found, _ = PretrainedConfig.get_config_dict(
            config["base_model_name_or_path"], revision=config.get("revision"), local_files_only=True
        )
    except (OSError, ValueError):
        return None
    model_type: str | None = found.get("model_type")
    return model_type


def _lora_paths(factors: Iterable[str], fused: Sequence[str]) -> dict[str, str]:
    """Return the names of layers in PEFT's file. `fused` are the parameters of fused experts, in the model's order.

    PEFT wraps a module once for each of its parameters. The last parameter has the outermost wrapper.
    """
    paths, wrappers = {name: name for name in factors}, Counter[str]()
    for name in reversed(fused):
        module = name.rpartition(".")[0]
        paths[name] = module + ".base_layer" * wrappers[module]
        wrappers[module] += 1
    return paths


def _read(adapter: Path) -> tuple[dict[str, Any], dict[str, Tensor], AdapterWeights]:
    """Read configuration and tensors of a SparseGrad adapter, and its cores and bases, whose numbers are checked."""
    config_path, weights_path = adapter / CONFIG_NAME, adapter / SAFETENSORS_WEIGHTS_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{adapter} is not a saved adapter: it has no {path.name}")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{config_path} is damaged: {error}") from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != NAME:
        raise ValueError(f"{adapter} is not a SparseGrad adapter: its peft_type is {kind!r}, expected {NAME!r}")
    try:
        tensors = load_file(weights_path)
    except SafetensorError as error:
        raise ValueError(f"{weights_path} is damaged or cut off ({error}); save or copy the adapter again") from error
    try:
        weights = AdapterWeights.read(tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{weights_path}: {error}") from error
    return config, tensors, weights


@torch.no_grad()
def _factors(config: dict[str, Any], weights: AdapterWeights) -> dict[str, Factors | ExpertFactors]:
    """Return layer name -> SVD of its update."""
    core_shapes, form = _core_shapes(config, weights), _form(config)
    groups: dict[str, list[str]] = defaultdict(list)
    for layer in weights.cores:
        groups[core_shapes[layer][0] if core_shapes else layer].append(layer)
    factors: dict[str, Factors | ExpertFactors] = {}
    for members in groups.values():
        sides = weights.basis_of(members, shared=form.shared)
        for layer in members:
            S, U, V = weights.cores[layer], sides.get("U"), sides.get("V")  # None is the identity
            S = scaled(S, (sides.get("scale_out"), sides.get("scale_in")))
            if not core_shapes:  # in the original space
                factors[layer] = decompose(S, U, V)
                continue
            _, _, _, out_features, in_features, *experts = core_shapes[layer]
            _check_shapes(layer, core_shapes[layer], S, (U, V), data_free=form.data_free)
            if not form.data_free:
                check_form(layer, sides, form.sizes, form.exponent, (out_features, in_features))
            if experts:
                factors[layer] = decompose_experts(S, U, V, (out_features, in_features), experts[0])
            else:
                matrices = (as_matrix(side, n, S.dtype) if is_selected(side) else side
                            for side, n in ((U, in_features), (V, out_features)))  # fmt: skip
                factors[layer] = decompose(S, *matrices)
    return factors


def _form(config: dict[str, Any]) -> SparseGradConfig:
    """Return the form of the adapter as loading would see it, with the defaults of the time when it was made."""
    names = ("neurons", "exponent", "shared", "original_space", "data_free", "core_shapes", "c", "r")
    try:
        return SparseGradConfig(**{name: config[name] for name in names if name in config})
    except TypeError as error:
        raise ValueError(f"the adapter's config is damaged: {error}") from error


def _core_shapes(config: dict[str, Any], weights: AdapterWeights) -> dict[str, list[Any]]:
    """Return the entries of the configuration, checked; none for cores in the original space.

    Raises:
        ValueError: they are damaged, or of other layers than the weights.
    """
    shapes = check_core_shapes(config.get("core_shapes")) or {}
    named = config.get("target_parameters") or ()
    experts = [layer for layer, shape in shapes.items() if len(shape) == 6 and layer not in named]
    if experts:
        raise ValueError(
            f"core_shapes of the adapter's config is damaged: {experts[0]} has a number of experts, and is not in "
            "target_parameters"
        )
    if not weights.cores:
        raise ValueError(f"the adapter has no core S for any layer; {_MIXED}")
    if not shapes and weights.sides:
        raise ValueError(f"the adapter has bases, and no core_shapes in its configuration; {_MIXED}")
    if missing := sorted(set(shapes) - set(weights.cores)):
        raise ValueError(f"the adapter has no core S for {', '.join(missing[:3])}; {_MIXED}")
    if shapes and (other := sorted(set(weights.cores) - set(shapes))):
        raise ValueError(f"the adapter has no entry in its configuration for {', '.join(other[:3])}; {_MIXED}")
    fused = [layer for layer in weights.cores if layer in named]
    if fused and not shapes:
        raise ValueError(f"{fused[0]} holds fused experts in the original space, which have no LoRA form; merge it")
    return shapes


def _check_shapes(layer: str, entry: list[Any], S: Tensor, sides: tuple[Side, Side], *, data_free: bool) -> None:
    """Raise `ValueError` unless the tensors of a layer have the shapes of its entry in the configuration."""
    _, r, c, out_features, in_features, *_ = entry
    expected = [(r, c), (c, in_features), (r, out_features)]
    found: list[tuple[int, ...] | None] = [tuple(S.shape)]
    for side, features in zip(sides, (in_features, out_features), strict=True):
        if is_selected(side):
            check_selected(side, features, "a basis of the adapter")
            found.append((len(side), features))
        elif side is None:
            found.append((features, features) if data_free else None)
        else:
            found.append(tuple(side.shape))
    if found != expected:
        raise ValueError(f"{layer}: expected S, U and V of shapes {expected}, found {found}; {_MIXED}")


def _check_replaceable(out: Path) -> None:
    """Raise unless `out` does not exist, is empty, or is an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder that does not exist")
    files = {path.name for path in out.iterdir()}
    written = {CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME}
    if files and not (written <= files <= {*written, CARD, *COMPANIONS} and _was_exported(out)):
        raise FileExistsError(
            f"{out} holds {', '.join(sorted(files)[:3])}, and is no earlier export; name another folder"
        )


def _was_exported(out: Path) -> bool:
    try:
        with safe_open(out / SAFETENSORS_WEIGHTS_NAME, "pt") as file:
            return file.metadata() == _MADE_BY
    except SafetensorError:
        return False


def _write(out: Path, config: LoraConfig, tensors: dict[str, Tensor], companions: Sequence[Path]) -> None:
    """Write to a folder beside `out`, and move it into place when it is complete."""
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{age}") for age in ("new", "old"))
    new.mkdir(parents=True)
    try:
        config.save_pretrained(str(new))
        save_file(tensors, new / SAFETENSORS_WEIGHTS_NAME, metadata=_MADE_BY)
        for path in companions:
            shutil.copyfile(path, new / path.name)
        if out.exists():
            os.replace(out, old)  # a folder that is not empty cannot be replaced at once
        os.replace(new, out)
    finally:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists():
            if out.exists():
                shutil.rmtree(old)
            else:
                os.replace(old, out)
