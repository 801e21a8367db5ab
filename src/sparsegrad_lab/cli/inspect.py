"""`sparsegrad inspect`."""

from __future__ import annotations

import json
from dataclasses import replace

from rich.console import Console

from sparsegrad_peft.method.sizes import DEFAULT_SHARE

from ..inspection.shipped_models import shipped_model
from ..methods.ranges import pattern_problems
from ..run.parsing import make_parser
from ..run.settings import refuse
from ..tasks.model_folder import check_model_folder, model_path

EXAMPLE = "sparsegrad inspect bert-base; prints three tables: parameters by part, layers to adapt, and memory."


def main(argv: list[str]) -> None:
    """Print the tables, or JSON."""
    parser = make_parser(
        "inspect",
        "Show a model's parameters by part, the layers that SparseGrad adapts, and the memory that each method needs "
        "for weights, gradients and optimizer. Reads the model's config only; a GGUF file is converted first.",
        EXAMPLE,
    )
    parser.add_argument("model", type=str, help="hub name, or folder with config.json; without a download: minilm, "
                        "bert-base, roberta-base, roberta-large, llama-2-7b")  # fmt: skip
    for name, meaning in {
        "narrow": "number of directions of each layer's smaller side, see sparsegrad train --help",
        "wide": "number of neurons (or directions) of each layer's larger side",
        "c": "number of directions of the input side, instead of narrow and wide",
        "r": "number of directions of the output side, instead of narrow and wide",
    }.items():
        parser.add_argument(f"--{name}", type=int | float | str | None, default=None, help=meaning)
    parser.add_argument(
        "--trained_share", type=float, default=DEFAULT_SHARE, help="share of a layer's entries that train"
    )
    parser.add_argument("--neurons", type=bool | None, default=None, help="the larger side selects neurons")
    parser.add_argument("--shared", type=bool | None, default=None,
                        help="one pair of bases for all layers of the same role and shape")  # fmt: skip
    parser.add_argument("--density", type=float, default=0.01,
                        help="share of the entries that a step updates, where it selects")  # fmt: skip
    parser.add_argument("--target_modules", type=str | list[str] | None, default=None, help="layers, as in PEFT")
    parser.add_argument("--task_type", type=str | None, default=None, help="PEFT task type, such as SEQ_CLS: the head")
    parser.add_argument("--dtype", type=str, default="float32", help="data type of the frozen weights")
    parser.add_argument(
        "--batch_size",
        type=int | None,
        default=None,
        help="rows of a training step; with --length, also counts the activations saved for backward",
    )
    parser.add_argument("--length", type=int | None, default=None, help="tokens of a row")
    parser.add_argument("--gradient_checkpointing", type=bool, default=False,
                        help="count the activations with gradient checkpointing")  # fmt: skip
    parser.add_argument("--json", type=bool, default=False, help="print JSON")
    options = vars(parser.parse_args(argv))
    by_side = options["c"] is not None and options["r"] is not None
    if "trained_share" in parser.given and (by_side or options["wide"] is not None):
        parser.error(f"--trained_share has no effect with {'--c and --r' if by_side else '--wide'}; leave one out")
    as_json, model = options.pop("json"), options.pop("model")
    refuse("this model cannot be inspected", pattern_problems("--target_modules", options["target_modules"]))
    shipped = shipped_model(model)
    if shipped is None:
        check_model_folder(model)
    from ..inspection.inspect import inspect
    from ..inspection.tables import render

    inspection = replace(inspect(str(shipped or model_path(model)), **options), model=model)
    if as_json:
        print(json.dumps(inspection.as_dict(), indent=2))
    else:
        render(inspection, Console(markup=False, emoji=False))
