"""Which weights are a transformer's MLP: linears by name for known families, else by structure; and fused experts."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..method.experts import fused_parameters
from ..method.groups import linear_shape, matches_target
from ..method.plain import is_linear
from ..method.precision import PLAIN

logger = logging.getLogger(__name__)

# Regular expressions for whole names (PEFT's `target_modules` as a string). `layer.N.output.dense` is the MLP's second
# layer in BERT and its relatives; `layer.N.attention.output.dense` is not, so a name ending would not do.
_BERT = r"(.*\.)?layer\.\d+\.(intermediate|output)\.dense"
_FC = r"(.*\.)?(fc1|fc2)"
_GATED = r"(.*\.)?mlp\.(gate_proj|up_proj|down_proj)"

TARGETS: dict[str, str] = {
    "albert": r"(.*\.)?(ffn|ffn_output)",
    "bart": _FC,
    "bert": _BERT,
    "deberta": _BERT,
    "deberta-v2": _BERT,
    "dinov2": r"(.*\.)?mlp\.(fc1|fc2|weights_in|weights_out|gate_proj|up_proj|down_proj)",
    "distilbert": r"(.*\.)?ffn\.(lin1|lin2)",
    "electra": _BERT,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "gpt2": r"(.*\.)?mlp\.(c_fc|c_proj)",
    "gpt_neox": r"(.*\.)?mlp\.(dense_h_to_4h|dense_4h_to_h)",
    "gptj": r"(.*\.)?mlp\.(fc_in|fc_out)",
    "llama": _GATED,
    "mbart": _FC,
    "mistral": _GATED,
    "mpnet": _BERT,
    "mt5": r"(.*\.)?DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "opt": _FC,
    "phi": r"(.*\.)?mlp\.(fc1|fc2)",
    "phi3": r"(.*\.)?mlp\.(gate_up_proj|down_proj)",
    "qwen2": _GATED,
    "qwen3": _GATED,
    "roberta": _BERT,
    "t5": r"(.*\.)?DenseReluDense\.(wi|wi_0|wi_1|wo)",
    "vit": r"(.*\.)?(layer\.\d+\.(intermediate|output)\.dense|mlp\.(fc1|fc2))",
    "whisper": _FC,
    "xlm-roberta": _BERT,
}
"""`config.model_type` -> the MLP linears."""

ATTENTION_NAME = re.compile(r"att(n|ention)|(^|[._])(q|k|v|o|qkv|kv|query|key|value)(_proj|_lin)?(\.|$)", re.IGNORECASE)
"""Found in the names of attention layers."""


def choose_targets(
    model: nn.Module, model_type: str | None, *, experts: bool = True
) -> tuple[str | list[str], list[str]]:
    """Return `target_modules` and `target_parameters` for a model: the MLP linears and the fused experts.

    The linears are those of the model's family, else those found by structure.

    Args:
        model: the model.
        model_type: of its config.
        experts: False leaves fused experts out.

    Raises:
        ValueError: there are none; the message says what to name in `target_modules`.
    """
    known = TARGETS.get(model_type or "")
    targets = known or find_mlp_linears(model)
    fused = fused_experts(model)
    parameters = list(fused) if experts else []
    if targets or parameters:
        logger.info("target_modules %s: %s", "of the model's family" if known else "found by structure", targets)
        if parameters:
            logger.info("target_parameters: %s", parameters)
        return targets, parameters
    if fused:
        name, parameter = next(iter(fused.items()))
        raise ValueError(
            f"the MLP weights of this {type(model).__name__} are fused expert parameters, such as {name} of shape "
            f"{tuple(parameter.shape)}, which SparseGrad adapts in its default form only: leave target_parameters, "
            'neurons, shared, c and r at their defaults, or name linear layers in target_modules, such as ["q_proj", '
            '"v_proj"]'
        )
    raise ValueError(
        f"no MLP layers known for model_type {model_type!r}, and none found by structure in this "
        f"{type(model).__name__}; please specify `target_modules` in the config"
    )


def mlp_linears(model: nn.Module, wanted: str | Iterable[str] | None = None) -> list[str]:
    """Return the full names of a model's MLP linears, or of the layers that match `wanted` (PEFT's `target_modules`).

    Raises:
        ValueError: there are none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    wanted = wanted if wanted is not None else TARGETS.get(model_type)
    if wanted is None:
        found = find_mlp_linears(model)
    else:
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        found = [name for name in linears if matches_target(name, wanted)]
    experts = fused_experts(model)
    if not found and wanted is None and experts:
        raise ValueError(
            f"the MLP weights of this {type(model).__name__} are fused experts, such as {next(iter(experts))}. "
            "They are adapted by SparseGrad in its default form (without shared, c, r and neurons=False) and by LoRA"
        )
    if not found:
        raise ValueError(
            f"no MLP layers found in a {type(model).__name__} (model_type {model_type!r}, target_modules {wanted!r}); "
            "name them in target_modules"
        )
    return found


def find_mlp_linears(model: nn.Module) -> list[str]:
    """Return the names of the layers that look like an MLP's: one that widens and one that narrows in a repeated block.

    Within a block (an entry of a `ModuleList` or `Sequential`), linear layers (m, d) and (d, m) with m different from d
    belong together, and so do (2m, d) and (d, m), where gate and up are one matrix. Attention mostly has square layers,
    or narrow ones without a counterpart; if its heads are wider than the model, its name tells. The projections of a
    state-space mixer (Mamba) are recognized by the convolution beside them.

    The names are those in the model without adapters.
    """
    blocks: dict[str, list[tuple[str, tuple[int, int]]]] = defaultdict(list)
    for name, module in model.named_modules():
        if is_linear(module) and not ATTENTION_NAME.search(name) and not _in_state_space_mixer(model, name):
            block = _block_of(name)
            if block is not None:
                blocks[block].append((name, linear_shape(module, name)))
    found = []
    for layers in blocks.values():
        shapes = {shape for _, shape in layers}
        found += [name.removesuffix(".base_layer") for name, shape in layers if _has_counterpart(shape, shapes)]
    return found


def fused_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the expert weights that are one parameter for all experts, by name in the model without adapters."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in fused_parameters(model).items()
        if "expert" in name.lower() and parameter.dtype in PLAIN
    }


def named_experts(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """Return the names of the parameters that match `target_parameters`: whole names, or endings after a dot.

    Raises:
        ValueError: one of them matches no parameter of three dimensions.
    """
    found = {name.replace(".base_layer", ""): parameter for name, parameter in fused_parameters(model).items()}
    for target in wanted:
        if not any(matches_target(name, [target]) for name in found):
            some = ", ".join(list(found)[:2]) or "none"
            raise ValueError(
                f"target_parameters: expected names or endings of fused expert parameters (experts, ., .), found "
                f"{target!r}; this {type(model).__name__} has {some}. Name linear layers in target_modules"
            )
    return [name for name in found if matches_target(name, wanted)]


def mlp_share(model: nn.Module, adapted: Iterable[str]) -> float:
    """Return the share of the MLP's weights that the adapted linears and fused experts hold, 0 to 1.

    Adapted layers outside the MLP do not count. In a model without a known MLP, the adapted layers are the MLP.
    """
    adapted = set(adapted)
    sizes = {
        name.removesuffix(".base_layer"): math.prod(linear_shape(module, name))
        for name, module in model.named_modules()
        if is_linear(module)
    }
    known = TARGETS.get(getattr(getattr(model, "config", None), "model_type", ""))
    mlp = {name for name in sizes if matches_target(name, known)} if known else set(find_mlp_linears(model))
    experts = {name: parameter.numel() for name, parameter in fused_experts(model).items()}
    sizes, mlp = {**sizes, **experts}, mlp | set(experts)
    mlp = mlp or adapted
    total = sum(sizes.get(name, 0) for name in mlp)
    return sum(sizes.get(name, 0) for name in mlp & adapted) / total if total else 0.0


def log_share(model: nn.Module, adapted: Iterable[str], *, automatic: bool) -> None:
    """Log the share of the MLP's weights that is adapted: a warning if the targets were found and leave some out.

    `adapted` holds the names of linear layers and of fused experts' parameters.
    """
    adapted = list(adapted)
    share, left = mlp_share(model, adapted), [name for name in fused_experts(model) if name not in adapted]
    level = logging.WARNING if automatic and share < 1 else logging.INFO
    rest = f"; fused expert parameters such as {left[0]} are not adapted" if left else ""
    logger.log(level, "SparseGrad adapts %d layers with %.1f %% of the MLP weights%s", len(adapted), 100 * share, rest)


def warn_unmatched(targets: Iterable[str] | str | None, adapted: Iterable[str]) -> None:
    """Log a warning for names in `target_modules` that match none of the adapted layers. Others may match."""
    adapted = list(adapted)
    names = [] if targets is None or isinstance(targets, str) else sorted(targets)
    unmatched = [name for name in names if not any(matches_target(layer, [name]) for layer in adapted)]
    if unmatched:
        logger.warning(
            "target_modules: no adapted layer matches %s; the adapted layers are %s, ... Correct or remove these names",
            ", ".join(unmatched), ", ".join(adapted[:2]),
        )  # fmt: skip


def _has_counterpart(shape: tuple[int, int], shapes: set[tuple[int, int]]) -> bool:
    out, in_ = shape
    if out != in_ and (in_, out) in shapes:
        return True
    fused_up = out != 2 * in_ and out % 2 == 0 and (in_, out // 2) in shapes  # gate and up in one matrix
    down_of_fused = in_ != out and (2 * in_, out) in shapes
    return fused_up or down_of_fused


def _in_state_space_mixer(model: nn.Module, name: str) -> bool:
    """True if the layer's parent also has a `Conv1d`, as the mixers of Mamba and its relatives have."""
    parent = model.get_submodule(name.removesuffix(".base_layer").rpartition(".")[0])
    return any(isinstance(child, nn.Conv1d) for child in parent.children())


def _block_of(name: str) -> str | None:
    """Return the innermost numbered module that a layer lies in. The layer itself does not count."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return None
