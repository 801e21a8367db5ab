"""One benchmark run: every method in a process of its own, steps in turn, one result."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch

from sparsegrad_peft.method.groups import linear_shape
from sparsegrad_peft.method.sizes import Sizes

from ..run.machine import environment
from .arguments import DEFAULT_METHODS, BenchArguments
from .counts import multiply_adds
from .methods import METHODS
from .worker import Job, serve
from .workloads import find_workload

_LARGE = 4096  # a side above this has a square basis that takes minutes to find
_CPU_LAYERS = 4


def check(arguments: BenchArguments) -> None:
    """Raise a ValueError for what cannot be run."""
    workload = find_workload(arguments.workload)
    names = arguments.method_names or []
    for name in names:
        if name not in METHODS:
            raise ValueError(f"methods: expected some of {', '.join(METHODS)}; found {name!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods: each one once, found {arguments.methods}")
    for name, least in {"tokens": 1, "repeats": 1, "warmup": 0, "threads": 1, "layers": 1}.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    sizes_of(arguments).check(workload.wide, workload.hidden, workload.name)
    sizes_of(arguments).check(workload.hidden, workload.wide, workload.name)


def sizes_of(arguments: BenchArguments) -> Sizes:
    """Rows of the bases."""
    return Sizes(arguments.narrow, arguments.wide, arguments.c, arguments.r)


def measure(arguments: BenchArguments, say: Callable[[str], None] = lambda words: None) -> dict[str, Any]:
    """Run it.

    Args:
        arguments: what.
        say: takes a line of words on what goes on.

    Returns:
        JSON-able: `methods.<name>` has `step_ms` (p20, p50, p80), `ratio_to` (medians of the ratios within each round),
        `tokens_per_second`, `peak_bytes`, `bytes` by what holds them, `multiply_adds` of the MLP's layers; or `skipped`
        or `failed` with the reason.

    Raises:
        ValueError: what cannot be run.
    """
    check(arguments)
    workload = find_workload(arguments.workload)
    on_gpu = torch.cuda.is_available()
    layers = arguments.layers or (workload.layers if on_gpu else min(workload.layers, _CPU_LAYERS))
    large = max(workload.hidden, workload.wide) > _LARGE
    names = arguments.method_names or [n for n in DEFAULT_METHODS if not (large and METHODS[n].complete)]
    context, workers = get_context("spawn"), {}
    rows: dict[str, dict[str, Any]] = {name: {"words": METHODS[name].words} for name in names}
    try:
        for name in names:
            say(f"{name}: preparing")
            job = Job(
                arguments.workload, name, arguments.tokens, layers, arguments.rest == "train", sizes_of(arguments),
                arguments.seed, arguments.threads, arguments.precision == "bf16",
            )  # fmt: skip
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(job, there), daemon=True)
            process.start()
            there.close()
            workers[name] = (process, here)
            if not _answer(rows[name], here, say, name):
                del workers[name]
        times: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(-arguments.warmup, arguments.repeats):
            say(f"round {turn + 1} of {arguments.repeats}" if turn >= 0 else "warming up")
            for name, (_, pipe) in list(workers.items()):
                pipe.send("step")
                found = _answer(rows[name], pipe, say, name)
                if not found:
                    del workers[name], times[name]
                elif turn >= 0:
                    times[name].append(found)
        for name, (_, pipe) in workers.items():
            pipe.send("bytes")
            size = _answer(rows[name], pipe, say, name)
            if size:
                rows[name] |= {"peak_bytes": size.pop("peak"), "bytes": size}
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.terminate()
            process.join()
    shapes, live = _shapes(arguments, layers)
    for name, found in times.items():
        rows[name] |= {
            "step_ms": percentiles(found),
            "tokens_per_second": round(1e3 * arguments.tokens / percentiles(found)["p50"], 1),
            "ratio_to": {
                other: percentiles([a / b for a, b in zip(found, times[other], strict=True)])["p50"]
                for other in ("floor", "lora", "full", "literal")
                if other in times
            },
            "multiply_adds": multiply_adds(name, shapes, arguments.tokens, live, sizes_of(arguments)),
        }
    return {
        "benchmark": "speed",
        "command": " ".join(["sparsegrad", *sys.argv[1:]]) if sys.argv[0].endswith("sparsegrad") else " ".join(
            ["python", *sys.argv]
        ),
        "arguments": arguments.as_dict(),
        "workload": f"{workload.words}; {layers} of {workload.layers} blocks, {arguments.tokens:,} tokens, "
        f"{arguments.precision}, rest {'trained' if arguments.rest == 'train' else 'frozen'}, random weights",
        "layers": layers,
        "live_tokens": live,
        "environment": environment() | {"threads": arguments.threads},
        "methods": rows,
    }  # fmt: skip


def _answer(row: dict[str, Any], pipe: Any, say: Callable[[str], None], name: str) -> Any:
    """What a process answers; None, and a note in its row, if it has come to an end."""
    try:
        kind, found = pipe.recv()
    except EOFError:
        kind, found = "failed", "the process was killed (out of memory?)"
    if kind in ("failed", "skipped"):
        row[kind] = found
        say(f"{name} {kind}: {found.strip().splitlines()[-1]}")
        return None
    return True if kind == "ready" else found


def _shapes(arguments: BenchArguments, layers: int) -> tuple[list[tuple[int, int]], int]:
    """(out, in) of the MLP's layers, and how many tokens have a gradient there."""
    workload = find_workload(arguments.workload)
    with torch.device("meta"):
        model = workload.make(layers)
    names = [name for name, _ in model.named_modules() if re.fullmatch(workload.targets, name)]
    batch = workload.batch(arguments.tokens, arguments.seed, torch.device("cpu"))
    live = int(batch["attention_mask"].sum()) if "attention_mask" in batch else arguments.tokens
    return [linear_shape(model.get_submodule(name), name) for name in names], live


def percentiles(values: list[float]) -> dict[str, float]:
    """p20, p50, p80."""
    ordered = sorted(values)
    return {f"p{q}": round(ordered[min(len(ordered) - 1, len(ordered) * q // 100)], 3) for q in (20, 50, 80)}
