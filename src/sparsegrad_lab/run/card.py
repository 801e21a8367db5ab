"""The model card beside a run's adapter or model. It names no path of the machine that it was written on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from peft import PeftConfig

from sparsegrad_peft.tuner.config import SparseGradConfig

from ..methods.registry import METHODS
from ..tasks.gguf_models import origin_of
from ..tasks.kinds import KINDS
from ..tasks.model_folder import hub_id, model_path
from ..tasks.registry import kind_of
from ..tasks.task import IMAGES, LANGUAGE, TEXT, display_name
from .markdown import as_cell

_TEMPLATE = "card_template.md"
_DATASETS = {"glue": "nyu-mll/glue", "oasst1": "OpenAssistant/oasst1"}
"First part of a task's name -> data set on the hub."
_HUB_TASKS = {TEXT: "text-classification", LANGUAGE: "text-generation", IMAGES: "image-classification"}


def make_card(result: dict[str, Any], config: PeftConfig | None, note: str = "") -> str:
    """Model card in Markdown, with the metadata that the Hugging Face Hub reads.

    Args:
        result: content of the run's `result.json`.
        config: of the adapter; None for a run that trained the weights themselves.
        note: a paragraph for readers.
    """
    task, settings = result["config"]["task"], result["config"]
    what, library = ("Model", "transformers") if config is None else ("Adapter", "peft")
    base, folder = hub_id(result["model"]), Path(model_path(result["model"]))
    origin = origin_of(folder)
    license_name = origin.license if origin is not None else _license(folder)
    method = _method_name(result)
    dataset = _DATASETS.get(task.partition("/")[0])
    metadata = ModelCardData(
        library_name=library, base_model=base, license=license_name, pipeline_tag=_HUB_TASKS[kind_of(task)],
        tags=[method],
        datasets=None if dataset is None else [dataset], model_name=f"{what} for {result['task']}",
        eval_results=[
            EvalResult(
                task_type=_HUB_TASKS[kind_of(task)], dataset_type=dataset or result["task"],
                dataset_name=result["task"], metric_type=result["metric"], metric_value=round(result["score"], 6),
            )
        ],
    )  # fmt: skip
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["cell"] = as_cell
    body = environment.get_template(_TEMPLATE).render(
        result=result, what=what, method=method, base=base, base_name=folder.name, origin=origin, note=note,
        license=license_name, four_bits=settings.get("load_in_4bit", False),
        dtype=settings.get("dtype"),
        is_sparsegrad=isinstance(config, SparseGradConfig), usage=_usage(result, config, base),
        kind=kind_of(task), metric=display_name(result["metric"]), training=settings["training"],
        data=_data(task, settings["data"]),
        rows=", ".join(f"{count:,} {split} rows" for split, count in result["rows"].items()),
        by_class=list((result.get("by_class") or {}).get("classes", {}).items())[:50],
    )  # fmt: skip
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def make_lora_card(result: dict[str, Any], folder: Path, errors: Mapping[str, float]) -> str:
    """Model card of a run's adapter that was exported as a LoRA adapter.

    Args:
        result: content of the run's `result.json`.
        folder: of the export.
        errors: relative error of each layer's update.
    """
    config = PeftConfig.from_pretrained(str(folder))
    note = (
        f"Exported as LoRA of rank {config.r} from an adapter that was trained with "
        f"{_method_name(result)}. The largest relative error of a layer's update is "
        f"{max(errors.values()):.2g}. The scores are those of the adapter before the export."
    )
    return make_card(result, config, note)


def _method_name(result: dict[str, Any]) -> str:
    """Name of the method; of a PEFT config, which may be gone, the file's name."""
    name = str(result["method"])
    return name if name in METHODS else Path(name).stem


def _usage(result: dict[str, Any], config: PeftConfig | None, base: str | None) -> str:
    """Code that loads the model and its tokenizer."""
    kind = KINDS[kind_of(result["config"]["task"])]
    auto = kind.auto.__name__
    reader = "AutoTokenizer" if kind.processor_folder == "tokenizer" else None
    lines = [f"from transformers import {auto}{'' if reader is None else f', {reader}'}", ""]
    if config is None:
        lines.append(f'model = {auto}.from_pretrained("PATH")  # this folder')
    else:
        register = "import sparsegrad_peft.tuner  # of the package sparsegrad-peft"
        labels = result["labels"]
        head = ""
        if kind.heads:
            head = ", num_labels=1" if labels is None else f", id2label={dict(enumerate(labels))}"
        where, hint = (base, "") if base else ("BASE", f"  # your copy of {Path(result['model']).name}")
        lines = [
            *([register] if isinstance(config, SparseGradConfig) else []),
            "from peft import PeftModel",
            *lines,
            f'base = {auto}.from_pretrained("{where}"{head}){hint}',
            'model = PeftModel.from_pretrained(base, "PATH")  # this folder; merge_and_unload() makes it faster',
        ]
    return "\n".join([*lines, *([] if reader is None else [f'tokenizer = {reader}.from_pretrained("PATH")'])])


def _data(task: str, data: dict[str, Any]) -> str:
    """Where the rows come from, without the folders of this machine."""
    files = [Path(data[name]).name for name in ("train_file", "validation_file") if data.get(name)]
    return ", ".join(f"`{name}`" for name in files) or task


def _license(folder: Path) -> str | None:
    """The licence in the model card of a local model; None if it states none."""
    try:
        parts = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(parts[1]).get("license") if len(parts) == 3 and not parts[0] else None
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return None
    return found if isinstance(found, str) else None
