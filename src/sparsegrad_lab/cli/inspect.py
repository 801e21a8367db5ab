"""`sparsegrad inspect`."""

from __future__ import annotations

import json
from dataclasses import replace

from ..run.parsing import make_parser

EXAMPLE = "sparsegrad inspect bert-base; prints three tables: parameters by part, layers to adapt, and memory."


def main(argv: list[str]) -> None:
    """Print the tables, or JSON."""
    parser = make_parser(
        "inspect",
        "What a model consists of, which layers SparseGrad would adapt, and the bytes that each method takes for "
        "weights, gradients and optimizer. Reads the model's config only, no weights.",
        EXAMPLE,
    )
    parser.add_argument("model", type=str, help="hub name or folder (with config.json), or, without a download, "
                        "minilm, bert-base, roberta-base, roberta-large, llama-2-7b")  # fmt: skip
    for name, meaning in {
        "narrow": "rows of the basis of a layer's smaller side, see sparsegrad train", "wide": "of its larger side",
        "c": "rows of U, in place of those two", "r": "rows of V, likewise",
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int | float | str | None, default=None, help=meaning)
    parser.add_argument("--shared", type=bool | None, default=None, help="one pair of bases a group, or one a layer")
    parser.add_argument("--density", type=float, default=0.01, help="share of the entries that a step selects")
    parser.add_argument("--target_modules", type=str | list[str] | None, default=None, help="as in PEFT")
    parser.add_argument("--task_type", type=str | None, default=None, help="SEQ_CLS, CAUSAL_LM, ...: which head")
    parser.add_argument("--dtype", type=str, default="float32", help="of the frozen weights")
    parser.add_argument("--json", type=bool, default=False, help="print JSON")
    found = vars(parser.parse_args(argv))
    as_json, model = found.pop("json"), found.pop("model")
    from rich.console import Console

    from ..inspection.inspect import inspect
    from ..inspection.shipped_models import shipped_model
    from ..inspection.tables import render
    from ..tasks.model_folder import model_path

    place = shipped_model(model)
    inspection = inspect(model_path(model) if place is None else str(place), **found)
    if place is not None:
        inspection = replace(inspection, model=model)
    if as_json:
        print(json.dumps(inspection.as_dict(), indent=2))
    else:
        render(inspection, Console())
