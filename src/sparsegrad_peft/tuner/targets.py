"""Which linear layers are a transformer's MLP: by name for known families, by structure for other models."""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..method.groups import linear_shape, matches_target
from ..method.plain import is_linear

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
    "dinov2": r"(.*\.)?mlp\.(fc1|fc2|weights_in|weights_out)",
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


def choose_targets(model: nn.Module, model_type: str | None) -> str | list[str]:
    """Return `target_modules` for a model: the MLP linears of its family, else those found by structure.

    Raises:
        ValueError: there are none; the message says what to name in `target_modules`.
    """
    known = TARGETS.get(model_type or "")
    targets = known or find_mlp_linears(model)
    if targets:
        logger.info("target_modules %s: %s", "of the model's family" if known else "found by structure", targets)
        return targets
    experts = fused_experts(model)
    if experts:
        name, parameter = next(iter(experts.items()))
        raise ValueError(
            f"the MLP weights of this {type(model).__name__} are fused expert parameters, such as {name} of shape "
            f"{tuple(parameter.shape)}. SparseGrad adapts linear layers only: name them in target_modules, such as "
            '["q_proj", "v_proj"], or adapt the experts with another PEFT method (LoRA with target_parameters)'
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
    """Return the expert weights that are one parameter (experts, out, in) for all experts, by name."""
    return {n: p for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n.lower()}


def mlp_share(model: nn.Module, adapted: Iterable[str]) -> float:
    """Return the share of the MLP's weights (linears and fused experts) that the adapted layers hold, 0 to 1.

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
    experts = sum(parameter.numel() for parameter in fused_experts(model).values())
    if not mlp and not experts:
        mlp = adapted
    total = experts + sum(sizes.get(name, 0) for name in mlp)
    return sum(sizes.get(name, 0) for name in mlp & adapted) / total if total else 0.0


def log_share(model: nn.Module, adapted: Iterable[str], *, automatic: bool) -> None:
    """Log the share of the MLP's weights that is adapted: a warning if the targets were found and leave some out."""
    adapted = list(adapted)
    share, experts = mlp_share(model, adapted), fused_experts(model)
    level = logging.WARNING if automatic and share < 1 else logging.INFO
    rest = f"; fused expert parameters such as {next(iter(experts))} are not adapted" if experts else ""
    logger.log(level, "SparseGrad adapts %d layers with %.1f %% of the MLP weights%s", len(adapted), 100 * share, rest)


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
