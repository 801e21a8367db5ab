"""Run a benchmark: every method in its own process, one step of each in turn, one result."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from sparsegrad_peft.method.groups import linear_shape

from ..run.machine import environment
from ..run.settings import refuse
from .counts import multiply_adds
from .methods import METHODS
from .settings import DEFAULT_METHODS, BenchArguments
from .worker import Worker
from .workloads import find_workload

MAX_SIDE_COMPLETE = 4096
"""Largest side of a layer for which methods with complete bases run by default: larger ones take minutes to compute."""
MAX_LAYERS_CPU = 4
BASELINES = ("floor", "lora", "full", "literal")
"""The methods that the others are compared with."""


def check(arguments: BenchArguments) -> None:
    """Raise RefusedError for settings that cannot be run."""
    arguments.check()
    workload = find_workload(arguments.workload)
    problems = [
        f"methods: expected some of {', '.join(METHODS)}; found {name!r}"
        for name in arguments.method_names or []
        if name not in METHODS
    ]
    if workload.sequence and arguments.tokens > workload.sequence and arguments.tokens % workload.sequence:
        problems.append(
            f"tokens: expected a multiple of {workload.sequence}, the length of a sequence, or fewer; found "
            f"{arguments.tokens}"
        )
    try:
        arguments.sizes.check(workload.wide, workload.hidden, workload.name)
        arguments.sizes.check(workload.hidden, workload.wide, workload.name)
    except (TypeError, ValueError) as error:
        problems.append(str(error))
    refuse("cannot run this benchmark", problems)


def measure(arguments: BenchArguments, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Run the benchmark.

    Args:
        arguments: the settings.
        report: called with a line of text on the progress.

    Returns:
        A result for JSON. `methods.<name>` has `step_ms` (p20, p50, p80), `ratio_to` (medians of the ratios within each
        round), `tokens_per_second`, `peak_bytes`, `bytes` by what holds them, and `multiply_adds` of the MLP layers; or
        `skipped` or `failed` with the reason.

    Raises:
        RefusedError: see `check`.
    """
    check(arguments)
    workload = find_workload(arguments.workload)
    on_gpu = torch.cuda.is_available()
    layers = arguments.layers or (workload.layers if on_gpu else min(workload.layers, MAX_LAYERS_CPU))
    large = max(workload.hidden, workload.wide) > MAX_SIDE_COMPLETE
    names = arguments.method_names or [name for name in DEFAULT_METHODS if not (large and METHODS[name].complete)]
    rows: dict[str, dict[str, Any]] = {name: {"words": METHODS[name].summary} for name in names}
    workers: dict[str, Worker] = {}
    try:
        for name in names:
            report(f"{name}: preparing")
            workers[name] = Worker(arguments, name, layers)
        times = _run_rounds(arguments, workers, report)
        sizes = {name: worker.bytes() for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.stop()
    shapes, live = _shapes(arguments, layers)
    for name, row in rows.items():
        if (ended := workers[name].ended) is not None:
            row[ended[0]] = ended[1]
            continue
        size = sizes[name] or {}
        row |= {"peak_bytes": size.pop("peak"), "bytes": size, **_times(arguments, times, name)}
        row["multiply_adds"] = multiply_adds(name, shapes, arguments.tokens, live, arguments.sizes)
    rest = "trained" if arguments.rest == "train" else "frozen"
    return {
        "benchmark": "speed",
        "command": " ".join(["sparsegrad" if sys.argv[0].endswith("sparsegrad") else f"python {sys.argv[0]}",
                             *sys.argv[1:]]),
        "arguments": arguments.as_dict(),
        "workload": f"{workload.summary}; {layers} of {workload.layers} blocks, {arguments.tokens:,} tokens, "
        f"{arguments.precision}, rest {rest}, random weights",
        "layers": layers,
        "live_tokens": live,
        "environment": environment() | {"threads": arguments.threads},
        "methods": rows,
    }  # fmt: skip


def _run_rounds(
    arguments: BenchArguments, workers: dict[str, Worker], report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Run all rounds. Returns the milliseconds of each measured step; methods that ended are left out."""
    times: dict[str, list[float]] = {name: [] for name in workers}
    for turn in range(-arguments.warmup, arguments.repeats):
        report(f"round {turn + 1} of {arguments.repeats}" if turn >= 0 else "warming up")
        for name, worker in workers.items():
            milliseconds = worker.timed_step()
            if turn >= 0 and milliseconds is not None:
                times[name].append(milliseconds)
    return {name: steps for name, steps in times.items() if workers[name].ended is None}


def _times(arguments: BenchArguments, times: dict[str, list[float]], name: str) -> dict[str, Any]:
    """Return a method's percentiles, its throughput, and its ratios to the baselines, taken within each round."""
    own = percentiles(times[name])
    ratios = {
        other: percentiles([a / b for a, b in zip(times[name], times[other], strict=True)])["p50"]
        for other in BASELINES
        if other in times
    }
    return {"step_ms": own, "tokens_per_second": round(1e3 * arguments.tokens / own["p50"], 1), "ratio_to": ratios}


def _shapes(arguments: BenchArguments, layers: int) -> tuple[list[tuple[int, int]], int]:
    """Return (out, in) of the MLP layers, and how many tokens have a gradient there."""
    workload = find_workload(arguments.workload)
    with torch.device("meta"):
        model = workload.build(layers)
    names = [name for name, _ in model.named_modules() if re.fullmatch(workload.targets, name)]
    batch = workload.batch(arguments.tokens, arguments.seed, torch.device("cpu"))
    live = int(batch["attention_mask"].sum()) if "attention_mask" in batch else arguments.tokens
    return [linear_shape(model.get_submodule(name), name) for name in names], live


def percentiles(values: list[float]) -> dict[str, float]:
    """Return p20, p50 (the median) and p80."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {"p20": round(float(low), 3), "p50": round(float(middle), 3), "p80": round(float(high), 3)}
