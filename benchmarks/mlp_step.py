"""One training step of one MLP block of BERT-base's size, every form of the method beside its peers, in one run.

    python benchmarks/mlp_step.py
    python benchmarks/mlp_step.py --tokens 512 --repeats 10 --json /tmp/step.json

A step is forward, backward (with the gradient of the input, as inside a network), optimizer step and zero_grad. Weights
and data are random; the bases come from the gradients of a few random steps. Methods take turns.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from record import environment, parser, percentiles, saved_bytes, time_in_turn, write
from sparsegrad_peft import (
    Basis,
    LiteralSparseGradLinear,
    SparseGradAdamW,
    calibrate,
    group_linears,
    param_groups,
    replace_linears,
)
from sparsegrad_peft.method.products import chain_cost
from sparsegrad_peft.method.sizes import row_count

HIDDEN, WIDE, DENSITY = 768, 3072, 0.01  # BERT-base; 1 % of the entries, paper
LEADING = 0.1  # the truncated form: a tenth of each side


class Method:
    """One block, one optimizer (None: nothing is learnt), and what a step of it is."""

    def __init__(self, block: nn.Module, optimizer: torch.optim.Optimizer | None, x: Tensor, delta: Tensor) -> None:
        self.block, self.optimizer, self.x, self.delta = block, optimizer, x, delta

    def step(self) -> None:
        self.block(self.x).backward(self.delta)
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.x.grad = None

    def bytes(self) -> dict[str, int]:
        state = self.optimizer.state if self.optimizer is not None else {}
        trained = [p for p in self.block.parameters() if p.requires_grad]
        return {
            "saved_for_backward": saved_bytes(self.block, lambda: self.block(self.x)),
            "optimizer_state": sum(v.nbytes for s in state.values() for v in s.values() if isinstance(v, Tensor)),
            "bases": sum(b.nbytes for m in self.block.modules() if isinstance(m, Basis) for b in m.buffers()),
            "gradients": sum(p.nbytes for p in trained),
            "trainable_entries": sum(p.numel() for p in trained),
        }


def build(tokens: int, seed: int) -> dict[str, Method]:
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(HIDDEN, WIDE), nn.GELU(), nn.Linear(WIDE, HIDDEN))
    x = torch.randn(tokens, HIDDEN, requires_grad=True)
    delta = torch.randn(tokens, HIDDEN) / tokens
    groups = group_linears(block)
    calibration = calibrate(
        block, step=lambda: (block(torch.randn(tokens, HIDDEN)) * torch.randn(tokens, HIDDEN)).mean(),
        groups=groups, n_steps=4, progress=False,
    )  # fmt: skip
    complete, tenth = calibration.bases(), calibration.bases(c=LEADING, r=LEADING)

    def replaced(bases: dict[str, Basis], make: Callable[..., nn.Module] | None = None, **options: Any) -> nn.Module:
        changed = copy.deepcopy(block)
        replace_linears(changed, groups, copy.deepcopy(bases), *([make] if make else []), **options)
        for name, parameter in changed.named_parameters():
            if name.endswith("bias"):  # the same trained entries in every method: no biases
                parameter.requires_grad_(False)
        return changed

    methods: dict[str, Method] = {}

    def add(name: str, changed: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        methods[name] = Method(changed, optimizer, x, delta)

    floor = copy.deepcopy(block).requires_grad_(False)
    add("floor", floor, None)

    full = copy.deepcopy(block)
    full[0].bias.requires_grad_(False)
    full[2].bias.requires_grad_(False)
    add(
        "full",
        full,
        torch.optim.AdamW([p for p in full.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0),
    )

    literal = LiteralSparseGradLinear.from_linear
    for name, products in (("literal", "regular"), ("literal-sparse-products", "sparse")):
        changed = replaced(complete, literal, density=DENSITY, products=products)
        add(name, changed, SparseGradAdamW(param_groups(changed)))

    folded = copy.deepcopy(full)
    weights: dict[nn.Parameter, Basis] = {
        folded.get_parameter(f"{name}.weight"): complete[g] for g, names in groups.items() for name in names
    }
    group = {"params": list(weights), "sparse": True, "density": DENSITY}
    add("exact", folded, SparseGradAdamW([group], bases=weights))

    changed = replaced(complete)
    add("exact-adapter", changed, SparseGradAdamW(param_groups(changed, density=DENSITY)))

    for prefer in ("memory", "speed"):
        changed = replaced(tenth, prefer=prefer)
        add(f"truncated-{prefer}", changed, SparseGradAdamW(param_groups(changed)))
    changed = replaced(tenth)
    add("truncated-memory-topk", changed, SparseGradAdamW(param_groups(changed, density=0.1)))

    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        print("peft is not installed: no LoRA row")
    else:
        config = LoraConfig(r=7, target_modules=["0", "2"])  # rank 7: the paper's for BERT-base
        changed = get_peft_model(copy.deepcopy(block), config)
        trained = [p for p in changed.parameters() if p.requires_grad]
        add("lora-rank-7", changed, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0))
    return methods


def leading(n: int) -> int:
    count = row_count(LEADING, n)
    assert count is not None
    return count


def counted(tokens: int) -> dict[str, int]:
    """Multiply-adds of a step, both layers, activation and optimizer aside."""
    plain = tokens * HIDDEN * WIDE
    total = {
        "floor": 4 * plain,
        "full": 6 * plain,
        "literal": 0,
        "exact": 0,
        "truncated-memory": 0,
        "truncated-speed": 0,
    }
    for out, in_ in ((WIDE, HIDDEN), (HIDDEN, WIDE)):
        total["literal"] += 2 * tokens * (in_**2 + out**2 + in_ * out) + plain
        total["exact"] += 3 * plain + chain_cost(out, out, in_, in_) + out * in_ * min(out, in_)
        r, c = leading(out), leading(in_)
        forming = chain_cost(out, r, c, in_)
        projected = tokens * in_ * c + chain_cost(r, out, tokens, c)
        total["truncated-memory"] += 2 * plain + 2 * forming + projected
        total["truncated-speed"] += 2 * plain + forming + min(projected, chain_cost(r, out, tokens, in_, c))
    return total


def main() -> None:
    arguments = parser(__doc__, "mlp_step.json")
    arguments.add_argument("--tokens", type=int, default=2048)
    arguments.add_argument("--repeats", type=int, default=20)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)

    methods = build(options.tokens, options.seed)
    times = time_in_turn({name: method.step for name, method in methods.items()}, options.repeats)
    counts = counted(options.tokens)
    result: dict[str, Any] = {
        "benchmark": "mlp_step",
        "workload": f"one MLP block {HIDDEN}/{WIDE}, {options.tokens} tokens, float32, random weights",
        "environment": environment(options.seed),
        "methods": {},
    }
    # In one round all methods meet the same machine: a ratio is taken within each round, then its median.
    for name, method in methods.items():
        ratios = {
            other: percentiles([a / b for a, b in zip(times[name], times[other], strict=True)])["p50"]
            for other in ("floor", "full", "literal")
        }
        result["methods"][name] = {
            "step_ms": percentiles(times[name]), "ratio_to": ratios, "bytes": method.bytes(),
            "multiply_adds": counts.get(name),
        }  # fmt: skip
    print(
        f"{result['workload']}\n"
        f"{'method':26}{'step ms p50':>12}{'/floor':>8}{'/full':>8}{'/literal':>9}{'kept for backward':>19}"
    )
    for name, row in result["methods"].items():
        ratios = row["ratio_to"]
        print(f"{name:26}{row['step_ms']['p50']:12.1f}{ratios['floor']:8.2f}{ratios['full']:8.2f}{ratios['literal']:9.2f}"
              f"{row['bytes']['saved_for_backward'] / 1e6:16.1f} MB")  # fmt: skip
    ratio = {name: row["ratio_to"] for name, row in result["methods"].items()}
    exact, default, speed = ratio["exact"]["literal"], ratio["truncated-memory"], ratio["truncated-speed"]
    result["targets"] = {
        "exact at least 2x faster than literal": {"found": round(1 / exact, 2), "reached": exact <= 0.5},
        "truncated at most 1.15x the floor": {"found": default["floor"], "reached": default["floor"] <= 1.15},
        '... with prefer="speed"': {"found": speed["floor"], "reached": speed["floor"] <= 1.15},
        "truncated faster than full fine-tuning": {"found": default["full"], "reached": default["full"] < 1},
    }
    for target, outcome in result["targets"].items():
        print(f"{'reached' if outcome['reached'] else 'MISSED ':8} {target}: {outcome['found']}")
    write(options.json, result)


if __name__ == "__main__":
    main()
