"""Which linear layers are a transformer's MLP: known for the families that people use, found by structure elsewhere."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from torch import nn

from ..method.groups import linear_shape, matches_target
from ..method.plain import is_conv1d

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


def mlp_linears(model: nn.Module, wanted: str | Iterable[str] | None = None) -> list[str]:
    """Full names of a model's MLP linears, or of the layers that `wanted` names as PEFT's `target_modules` would.

    Raises:
        ValueError: there are none.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    wanted = wanted if wanted is not None else TARGETS.get(model_type)
    if wanted is None:
        found = find_mlp_linears(model)
    else:
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
        found = [name for name in linears if matches_target(name, wanted)]
    if not found:
        raise ValueError(
            f"no MLP layers found in a {type(model).__name__} (model_type {model_type!r}, target_modules {wanted!r}); "
            "name them in target_modules"
        )
    return found


def find_mlp_linears(model: nn.Module) -> list[str]:
    """Names of the layers that look like an MLP's: in a repeated block, one that widens and one that narrows again.

    The names are those in the model without adapters.

    Within a block (an entry of a `ModuleList` or `Sequential`), linear layers (m, d) and (d, m) with m different from d
    belong together, as do (2m, d) and (d, m), where gate and up are one matrix. Attention mostly has square layers, or
    narrow ones without a counterpart; where its heads are wider than the model, its name has to tell.
    """
    blocks: dict[str, list[tuple[str, tuple[int, int]]]] = defaultdict(list)
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and not ATTENTION_NAME.search(name):
            block = _block_of(model, name)
            if block is not None:
                blocks[block].append((name, linear_shape(module, name)))
    found = []
    for layers in blocks.values():
        shapes = {shape for _, shape in layers}
        found += [name.removesuffix(".base_layer") for name, shape in layers if _has_counterpart(shape, shapes)]
    return found


def _has_counterpart(shape: tuple[int, int], shapes: set[tuple[int, int]]) -> bool:
    out, in_ = shape
    if out != in_ and (in_, out) in shapes:
        return True
    fused_up = out != 2 * in_ and out % 2 == 0 and (in_, out // 2) in shapes  # gate and up in one matrix
    down_of_fused = in_ != out and (2 * in_, out) in shapes
    return fused_up or down_of_fused


def _block_of(model: nn.Module, name: str) -> str | None:
    """The innermost numbered module that a layer lies in, itself and bare `Sequential`s of layers aside."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            return ".".join(parts[:end])
    return None
