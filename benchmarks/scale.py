"""Simulate a training step at scales that nobody here can measure: counted work over stated speeds.

    python benchmarks/scale.py            the tables of docs/scaling.md
    python benchmarks/scale.py --check    bytes counted by the formulas beside those of two real processes (gloo)

Time is the larger of arithmetic and communication, as if the two overlapped. Nothing here is a measurement. The
assumptions are the constants below.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparsegrad_peft.method.costs import LayerShape, step_cost
from sparsegrad_peft.method.sizes import Sizes

PEAK_FLOPS = 989e12
"dense bfloat16 of one H100 SXM"
UTILIZATION = 0.4
MEMORY = 0.9 * 80e9
"bytes of one GPU that may be used"
NODE = 8
"GPUs of a machine"
NVLINK = 300e9
"bytes per second and GPU within a machine"
NETWORK = 40e9
"bytes per second and GPU between machines (400 Gbit/s, 80 % of it)"
TOKENS = 4096
"tokens of a GPU in a step: one sequence"
CALIBRATION_STEPS = 30

HALF, SINGLE = 2, 4
"bytes of a number in bfloat16 and float32"


@dataclass(frozen=True)
class Model:
    """A LLaMA, from its published configuration."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> Iterator[tuple[int, int, bool]]:
        """(out, in, whether it is adapted) of each linear layer of a block."""
        kv = self.hidden // self.heads * self.kv_heads
        for out in (self.hidden, kv, kv, self.hidden):
            yield out, self.hidden, False
        for out in (self.intermediate, self.intermediate):
            yield out, self.hidden, True
        yield self.hidden, self.intermediate, True

    @property
    def block(self) -> int:
        """Weights of a block."""
        return sum(out * in_ for out, in_, _ in self.linears())

    @property
    def weights(self) -> int:
        """Weights of the model; the embeddings are not tied."""
        return self.layers * self.block + 2 * self.vocabulary * self.hidden

    @property
    def mlp(self) -> int:
        """Weights of the adapted layers."""
        return self.layers * sum(out * in_ for out, in_, adapted in self.linears() if adapted)


MODELS = (
    Model("LLaMA-2-7B", 4096, 11008, 32, 32, 32, 32000),
    Model("LLaMA-2-13B", 5120, 13824, 40, 40, 40, 32000),
    Model("LLaMA-2-70B", 8192, 28672, 80, 64, 8, 32000),
    Model("Llama-3.1-405B", 16384, 53248, 126, 128, 8, 128256),
)
METHODS = ("sparsegrad", "lora", "full")
GPUS = (8, 64)


@dataclass(frozen=True)
class Work:
    """What a method adds to a model."""

    trained: int
    "parameters"
    replicated: int
    "bytes that no engine shards: the bases"
    multiply_adds: int
    "of one GPU in a step, recomputation in backward included"


def work(model: Model, method: str, tokens: int = TOKENS) -> Work:
    """Count a method's parameters, bases and multiply-adds. LoRA gets the rank with about as many parameters."""
    sizes = Sizes(narrow=None, wide=None, neurons=True)
    trained = replicated = 0
    # Forward, forward again in backward (gradient checkpointing), and the gradient of the input; the head once less.
    adds = 3 * tokens * model.layers * model.block + 2 * tokens * model.vocabulary * model.hidden
    adds += 4 * model.layers * tokens * tokens * model.hidden  # causal attention, forward, again, and backward
    if method == "full":
        return Work(model.weights, 0, adds + tokens * model.weights)
    for out, in_, adapted in model.linears():
        if not adapted:
            continue
        r, c = sizes.counts(out, in_)
        assert r is not None
        assert c is not None
        if method == "lora":
            rank = max(1, round(r * c / (out + in_)))
            trained += model.layers * rank * (out + in_)
            adds += model.layers * 4 * tokens * rank * (out + in_)
        else:
            select_out, select_in = sizes.selected(out, in_)
            layer = LayerShape(out, in_, r, c, rotates_out=not select_out, rotates_in=not select_in)
            trained += model.layers * r * c
            replicated += model.layers * sizes.basis_bytes(out, in_, HALF)
            adds += model.layers * (step_cost(layer, tokens) - 2 * tokens * out * in_)
    return Work(trained, replicated, adds)


def all_reduce_bytes(numbers: int, processes: int, itemsize: int = SINGLE) -> float:
    """Bytes that each process sends to sum `numbers` (ring): a reduce-scatter and an all-gather."""
    return 2 * share_bytes(numbers, processes, itemsize)


def share_bytes(numbers: int, processes: int, itemsize: int) -> float:
    """Bytes that each process sends to gather `numbers` from all, or to reduce them to shares."""
    return numbers * itemsize * (processes - 1) / processes


@dataclass(frozen=True)
class Step:
    """One step of one GPU."""

    engine: str
    memory: float
    "bytes"
    sent: float
    "bytes"
    compute: float
    "seconds"
    communication: float
    "seconds"

    @property
    def seconds(self) -> float:
        """The slower of the two."""
        return max(self.compute, self.communication)


def steps(model: Model, method: str, gpus: int) -> list[Step]:
    """Return the step under each engine: DDP; weights sharded within a machine (HSDP); sharded over all (FSDP)."""
    counted = work(model, method)
    compute = 2 * counted.multiply_adds / (PEAK_FLOPS * UTILIZATION)
    frozen = model.weights if method != "full" else 0
    activations = TOKENS * (model.layers * model.hidden * HALF + model.vocabulary * 2 * SINGLE)
    activations += TOKENS * (8 * model.hidden + 4 * model.intermediate) * HALF  # one block's, recomputed
    found = []
    for engine, shards in (("DDP", 1), ("HSDP", min(NODE, gpus)), ("FSDP", gpus)):
        # A trained parameter takes its value, its gradient and Adam's two moments in float32.
        held = (frozen * HALF + counted.trained * 4 * SINGLE) / shards + counted.replicated + activations
        if shards > 1:
            held += 2 * model.block * HALF  # the block in use and the next one
        elif method == "full":
            held += model.weights * HALF  # the copy to compute with
        gathered = 2 * share_bytes(model.weights, shards, HALF) if shards > 1 else 0.0
        reduced = share_bytes(counted.trained, shards, SINGLE) if shards > 1 else 0.0
        over_groups = all_reduce_bytes(counted.trained // shards, gpus // shards)
        inside = NVLINK if shards <= NODE else NETWORK
        across = NVLINK if gpus <= NODE else NETWORK
        communication = (gathered + reduced) / inside + over_groups / across
        found.append(Step(engine, held, gathered + reduced + over_groups, compute, communication))
    return found


def best(model: Model, method: str, gpus: int) -> Step | None:
    """The fastest engine that fits into memory, or None."""
    return min((s for s in steps(model, method, gpus) if s.memory <= MEMORY), key=lambda s: s.seconds, default=None)


def calibration_bytes(model: Model, gpus: int) -> float:
    """Bytes that each process sends to calibrate under DDP: the mean gradient of each adapted layer in each step."""
    return CALIBRATION_STEPS * all_reduce_bytes(model.mlp, gpus)


def tables() -> str:
    """The simulated steps, as Markdown."""
    lines = [
        "| model | GPUs | method | trained | engine | memory, GB | sent, GB | arithmetic, s | communication, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for model in MODELS:
        for gpus in GPUS:
            for method in METHODS:
                step, trained = best(model, method, gpus), work(model, method).trained
                start = f"| {model.name} | {gpus:,} | {method} | {trained / 1e6:,.0f} M |"
                if step is None:
                    lines.append(f"{start} does not fit | | | | |")
                    continue
                lines.append(
                    f"{start} {step.engine} | {step.memory / 1e9:.0f} | {step.sent / 1e9:.2f} | {step.compute:.2f} | "
                    f"{step.communication:.3f} |"
                )
    lines += [
        "",
        "| model | sent to calibrate under DDP, GB per GPU | seconds between 64 GPUs |",
        "| --- | --- | --- |",
    ]
    for model in MODELS:
        sent = calibration_bytes(model, 64)
        lines.append(f"| {model.name} | {sent / 1e9:,.0f} | {sent / NETWORK:,.0f} |")
    return "\n".join(lines)


# Check: the formulas beside two real processes.


def check() -> dict[str, dict[str, float]]:
    """Count the bytes that two processes give to collective operations, beside what the formulas say."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_measure, args=(folder,), nprocs=2)
        found: dict[str, dict[str, float]] = json.loads(Path(folder, "found.json").read_text())
    return found


def _measure(rank: int, folder: str) -> None:
    import torch
    from peft import get_peft_model
    from torch import distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups

    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)

    class Sent(TorchDispatchMode):
        """Adds up what this process sends, by the formulas for rings."""

        total = 0.0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = str(func)
            if name.startswith("c10d."):
                if "allreduce_" in name:
                    self.total += sum(all_reduce_bytes(t.numel(), 2, t.element_size()) for t in args[0])
                elif "_allgather_base" in name:
                    self.total += share_bytes(args[0].numel(), 2, args[0].element_size())
                elif "_reduce_scatter_base" in name:
                    self.total += share_bytes(args[1].numel(), 2, args[1].element_size())
            return func(*args, **(kwargs or {}))

    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 2}
        config = LlamaConfig(**sizes, vocab_size=100, max_position_embeddings=32)
        return get_peft_model(LlamaForCausalLM(config), SparseGradConfig(task_type="CAUSAL_LM"))

    ids = torch.randint(100, (2, 16))
    batch = {"input_ids": ids, "labels": ids}
    found: dict[str, dict[str, float]] = {}

    def record(name: str, counted: float, run) -> None:  # type: ignore[no-untyped-def]
        with Sent() as sent:
            run()
        found[name] = {"counted": counted, "measured": sent.total}

    adapted = model()
    targets = sum(m.base_layer.weight.numel() for m in adapted.modules() if hasattr(m, "sparsegrad_S"))
    steps = 3

    def calibrate() -> None:
        calibrate_adapter(adapted, [batch], n_steps=steps, trajectory=None, progress=False)

    record("calibration, DDP", steps * all_reduce_bytes(targets, 2), calibrate)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    wrapped = torch.nn.parallel.DistributedDataParallel(adapted)
    record("step, DDP", all_reduce_bytes(trained, 2), lambda: wrapped(**batch).loss.backward())

    sharded = model()
    weights = sum(p.numel() for p in sharded.parameters())
    for block in sharded.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(sharded)
    blocks = sum(p.numel() for b in sharded.base_model.model.model.layers for p in b.parameters())
    optimizer = SparseGradAdamW(param_groups(sharded), lr=1e-3)

    def step() -> None:
        sharded(**batch).loss.backward()
        optimizer.step()

    # The root module's own weights (embeddings and head) are gathered once: they stay until backward.
    gathered = share_bytes(2 * blocks + weights - blocks, 2, SINGLE)
    record("step, FSDP2", gathered + share_bytes(trained, 2, SINGLE), step)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    """Print the tables, or the check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="count the bytes of two real processes")
    if not parser.parse_args().check:
        print(tables())
        return
    print("| two processes | counted, bytes | measured, bytes |\n| --- | --- | --- |")
    for name, numbers in check().items():
        print(f"| {name} | {numbers['counted']:,.0f} | {numbers['measured']:,.0f} |")


if __name__ == "__main__":
    main()
