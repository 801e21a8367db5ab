"""The README beside a run's adapter or model: what it is, how it scores, how to load it."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig

from sparsegrad_peft.tuner.config import SparseGradConfig


def card(result: dict[str, Any], config: PeftConfig | None, auto: str, base: str) -> str:
    """Model card in Markdown, with the header that the Hugging Face Hub reads.

    Args:
        result: of the run, as in `result.json`.
        config: of the adapter; None for a run that trained the weights themselves.
        auto: class of `transformers` that loads the model with its head.
        base: name or folder of the pretrained model.
    """
    scores = "\n".join(
        f"| {split} | {metric.replace('_', ' ')} | {value:.4f} |"
        for split, found in result["scores"].items() for metric, value in found.items() if metric != "loss"
    )  # fmt: skip
    what = "Adapter" if config is not None else "Model"
    library = "peft" if config is not None else "transformers"
    return f"""---
library_name: {library}
base_model: {base}
tags: [{result["method"] if result["method"].isidentifier() else library}]
---

# {what} for {result["task"]}, trained with {result["method"]}

{what} of `{result["model"]}`, seed {result["seed"]}, {result["steps"]:,} steps, written by `sparsegrad train`
(sparsegrad-peft {result["environment"]["packages"]["sparsegrad-peft"]}).

| split | metric | value |
| --- | --- | --- |
{scores}

## Load it

```python
{_loading(result, config, auto, base)}
```
"""


def _loading(result: dict[str, Any], config: PeftConfig | None, auto: str, base: str) -> str:
    labels = result["labels"]
    count = f", num_labels={1 if labels is None else len(labels)}" if auto.endswith("SequenceClassification") else ""
    if config is None:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("PATH")  # this folder'
    ours = isinstance(config, SparseGradConfig)
    return "\n".join([
        *(["import sparsegrad_peft.tuner  # pip install 'sparsegrad-peft[peft]'; PEFT knows the method from here on"]
          if ours else []),
        "from peft import PeftModel",
        f"from transformers import {auto}",
        "",
        f'base = {auto}.from_pretrained("{base}"{count})',
        'model = PeftModel.from_pretrained(base, "PATH")  # this folder; merge_and_unload() for speed',
    ])  # fmt: skip
