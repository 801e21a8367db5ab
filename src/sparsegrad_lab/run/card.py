"""The model card beside a run's adapter or model."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftConfig

from sparsegrad_peft.tuner.config import SparseGradConfig

from ..tasks.gguf_models import Origin, origin_of


def make_card(result: dict[str, Any], config: PeftConfig | None, auto: str, base: str) -> str:
    """Model card in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        result: content of the run's `result.json`.
        config: of the adapter; None for a run that trained the weights themselves.
        auto: Auto class of transformers that loads the model with its head.
        base: name or folder of the pretrained model.
    """
    what, library = ("Model", "transformers") if config is None else ("Adapter", "peft")
    tag = result["method"] if result["method"].isidentifier() else library
    origin = origin_of(base)
    metadata = ModelCardData(
        library_name=library, base_model=base, tags=[tag], license=None if origin is None else origin.license
    )
    scores = "\n".join(
        f"| {split} | {metric.replace('_', ' ')} | {value:.4f} |"
        for split, metrics in result["scores"].items()
        for metric, value in metrics.items()
        if metric != "loss"
    )
    content = f"""---
{metadata.to_yaml()}
---

# {what} for {result["task"]}, trained with {result["method"]}

{what} of `{result["model"]}`, seed {result["seed"]}, {result["steps"]:,} steps, written by `sparsegrad train`
(sparsegrad-peft {result["environment"]["packages"]["sparsegrad-peft"]}).
{"" if origin is None else _base_paragraph(origin)}
| split | metric | value |
| --- | --- | --- |
{scores}

## Usage

```python
{_usage(result, config, auto, base)}
```
"""
    return str(ModelCard(content))


def _base_paragraph(origin: Origin) -> str:
    """What a reader must know of a base model that was converted from a GGUF file."""
    rounded = f"They were dequantized from {origin.quantization}, so they differ from the published weights. "
    return f"""
The weights of the base model ({origin.name or "unnamed"}, licence {origin.license or "not stated"}) come from the file
`{origin.file}`. {rounded if origin.is_quantized else ""}`sparsegrad train` converted the file (SHA-256
`{origin.sha256}`) to float32.
"""


def _usage(result: dict[str, Any], config: PeftConfig | None, auto: str, base: str) -> str:
    """Code that loads the model."""
    if config is None:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")  # this folder'
    labels = result["labels"]
    count = f", num_labels={1 if labels is None else len(labels)}" if auto.endswith("SequenceClassification") else ""
    register = "import sparsegrad_peft.tuner  # registers SparseGrad with PEFT: pip install 'sparsegrad-peft[peft]'"
    return "\n".join([
        *([register] if isinstance(config, SparseGradConfig) else []),
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}"{count})',
        'model = PeftModel.from_pretrained(base, "PATH")  # this folder; merge_and_unload() makes it faster',
    ])  # fmt: skip
