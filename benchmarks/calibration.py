"""Measure memory and time of calibration for BERT-base, of the paper's SVDs, and of the default for a LLaMA.

    python benchmarks/calibration.py
    python benchmarks/calibration.py --steps 2 --skip-svd --json /tmp/calibration.json

The model is BERT-base with random weights (12 blocks, 768/3072); the batches are random tokens. The paper stacks the
gradients of a group and takes SVDs of the unfoldings of the stack. Here one stack of 30 gradients is decomposed in both
ways. The default adapter is calibrated on a LLaMA of SmolLM2's sizes (30 blocks, 576/1536), in batches of 4 rows.
"""

from __future__ import annotations

import resource
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from record import environment, parser, write
from sparsegrad_peft import (
    CalibrationConfig,
    GramStatistics,
    PairStatistics,
    ProjectedStatistics,
    calibrate,
    group_linears,
)
from sparsegrad_peft.method.gradients import stream_gradients
from sparsegrad_peft.method.groups import linear_shape
from sparsegrad_peft.method.hosvd import eigenbasis
from sparsegrad_peft.method.sizes import DEFAULT_EXPONENT, Sizes
from sparsegrad_peft.method.statistics import Statistics


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._watch(leaf.untyped_storage())
        return output

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.seen:
            self.seen.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key: int, nbytes: int) -> None:
        self.seen.discard(key)
        self.live -= nbytes


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak number of bytes in tensors created during `work`."""
    with LiveBytes() as counter:
        work()
    return counter.peak


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


Groups = dict[str, list[str]]
Batches = list[dict[str, Tensor]]


def measure_bytes(model: nn.Module, groups: Groups, batches: Batches) -> dict[str, int]:
    """Measure what calibration holds besides backpropagation itself, and compute what it should hold."""
    layers = [name for names in groups.values() for name in names]
    config = CalibrationConfig.paper(n_steps=2)
    dropped = peak_bytes(lambda: stream_gradients(model, layers, lambda *_: None, batches, n_steps=2))
    kept = peak_bytes(lambda: calibrate(model, batches, groups=groups, config=config, progress=False))
    out, in_ = linear_shape(model.get_submodule(layers[0]), layers[0])
    gradient, gram = 4 * out * in_, 4 * len(groups) * (out**2 + in_**2)  # both groups have these two sides
    return {
        "peak_extra": kept - dropped,
        "gram": gram,
        "one_gradient": gradient,
        "paper_stack_one_group": 30 * gradient,
    }


def measure_calibration(
    model: nn.Module, groups: Groups, batches: Batches
) -> tuple[dict[str, float], dict[str, float]]:
    """Time calibration and its decompositions.

    Returns:
        The seconds of each part; and for each side, the energy in the leading tenth of the directions, relative to that
        of exact eigenvectors.
    """
    layers = [name for names in groups.values() for name in names]
    steps = len(batches)
    backpropagation, _ = timed(lambda: stream_gradients(model, layers, lambda *_: None, batches, n_steps=steps))
    whole, calibration = timed(lambda: calibrate(model, batches, groups=groups, n_steps=steps))
    complete, _ = timed(calibration.bases)
    leading, tenth = timed(lambda: calibration.bases(c=0.1, r=0.1))
    captured = {}
    for name, gram in calibration.groups.items():
        for side, matrix in (("in", gram.gram_in), ("out", gram.gram_out)):
            exact = eigenbasis(matrix).spectrum
            rows: int = (tenth[name].U if side == "in" else tenth[name].V).shape[0]
            captured[f"{name}, {side}"] = float(eigenbasis(matrix, rows).spectrum.sum() / exact[:rows].sum())
    seconds = {"backpropagation_alone": backpropagation, "calibrate": whole, "complete_bases": complete,
               "leading_tenth": leading}  # fmt: skip
    return seconds, captured


def measure_svd(model: nn.Module, layers: list[str], batches: Batches) -> dict[str, float]:
    """Time both decompositions of a stack of 30 gradients: SVDs of its unfoldings, and Gram matrices."""
    stack: list[Tensor] = []
    stream_gradients(model, layers, lambda _, G: stack.append(G.clone()), batches, n_steps=-(-30 // len(layers)))
    gradients = torch.stack(stack[:30])  # (30, out, in)
    out, in_ = gradients.shape[1:]
    unfoldings = [gradients.permute(2, 0, 1).reshape(in_, -1), gradients.permute(1, 0, 2).reshape(out, -1)]
    svd, _ = timed(lambda: [torch.linalg.svd(unfolding, full_matrices=False) for unfolding in unfoldings])
    gram = GramStatistics("one stack", ("one stack",), torch.zeros(in_, in_), torch.zeros(out, out))
    sums, _ = timed(lambda: [gram.add(G) for G in gradients])
    bases, _ = timed(gram.basis)
    return {"svd_of_one_stack": svd, "gram_of_one_stack": sums, "bases_of_one_stack": bases}


def measure_default(blocks: int, tokens: int, steps: int) -> dict[str, float]:
    """Time the default's calibration of all MLP layers of a LLaMA, and the same backpropagation. Count its sums."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=blocks, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    ))  # fmt: skip
    groups = group_linears(model, r".*mlp\.\w+_proj", shared=False)
    layers = [name for names in groups.values() for name in names]
    tokens_of_steps = [torch.randint(0, 49152, (4, tokens)) for _ in range(steps)]
    batches = [{"input_ids": ids, "labels": ids} for ids in tokens_of_steps]
    sizes, config = Sizes(narrow=None, wide=None, neurons=True), CalibrationConfig(n_steps=steps)
    stream_gradients(model, layers, lambda *_: None, batches, n_steps=1)  # a warm-up
    backpropagation, _ = timed(lambda: stream_gradients(model, layers, lambda *_: None, batches, n_steps=steps))
    whole, calibration = timed(lambda: calibrate(model, batches, groups=groups, sizes=sizes, config=config))
    bases, _ = timed(lambda: calibration.bases(sizes=sizes, exponent=DEFAULT_EXPONENT))
    return {
        "backpropagation_step": backpropagation / steps, "calibration_step": whole / steps, "bases": bases,
        "sums_bytes": sum(4 * numbers_of(group) for group in calibration.groups.values()),
    }  # fmt: skip


def numbers_of(statistics: Statistics) -> int:
    """Count the numbers in the sums of a group, without random vectors, which groups share."""
    if isinstance(statistics, ProjectedStatistics):
        return sum(sums.left.numel() + sums.right.numel() for sums in statistics.sums.values())
    assert isinstance(statistics, PairStatistics)
    return sum(tensor.numel() for tensor in (statistics.gram_in, statistics.gram_out, *statistics.M.values()))


def targets(
    size: dict[str, int], seconds: dict[str, float], default: dict[str, float]
) -> dict[str, dict[str, float | bool]]:
    """Compare the measurements with their targets."""

    def target(found: float, reached: bool) -> dict[str, float | bool]:
        return {"found": found, "reached": reached}

    result = {
        "extra memory at most the Gram matrices and one gradient": target(
            size["peak_extra"], size["peak_extra"] <= size["gram"] + size["one_gradient"]
        ),
        "decompositions of both groups under 20 s": target(seconds["complete_bases"], seconds["complete_bases"] < 20),
    }
    ratio = (30 * default["calibration_step"] + default["bases"]) / (30 * default["backpropagation_step"])
    result |= {
        "the default's calibration (30 steps, from the mean of those timed, and bases) at most 1.3x the same "
        "backpropagation": target(ratio, ratio <= 1.3),
        "its sums at most 100 MB": target(default["sums_bytes"] / 1e6, default["sums_bytes"] <= 100e6),
    }
    if "svd_of_one_stack" in seconds:
        svd, bases = seconds["svd_of_one_stack"], seconds["bases_of_one_stack"]
        with_sums = svd / (bases + seconds["gram_of_one_stack"])
        result |= {
            "decomposition at least 10x faster than the SVDs": target(svd / bases, svd >= 10 * bases),
            "decomposition and sums at least 10x faster than the SVDs": target(with_sums, with_sums >= 10),
        }
    return result


def main() -> None:
    arguments = parser(__doc__, "calibration.json")
    arguments.add_argument("--steps", type=int, default=30, help="calibration steps (paper: 30)")
    arguments.add_argument("--tokens", type=int, default=128, help="tokens per sentence")
    arguments.add_argument("--batch", type=int, default=16, help="sentences per batch")
    arguments.add_argument("--hidden", type=int, default=768, help="hidden size; the MLP is four times as wide")
    arguments.add_argument("--blocks", type=int, default=12, help="transformer blocks")
    arguments.add_argument("--llama-blocks", type=int, default=30, help="blocks of the LLaMA")
    arguments.add_argument("--llama-tokens", type=int, default=512, help="tokens per row of the LLaMA")
    arguments.add_argument("--llama-steps", type=int, default=4, help="calibration steps of the LLaMA")
    arguments.add_argument("--skip-svd", action="store_true", help="skip the paper's SVDs, which take minutes")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    config = BertConfig(
        hidden_size=options.hidden, intermediate_size=4 * options.hidden, num_hidden_layers=options.blocks,
        num_attention_heads=max(1, options.hidden // 64), attn_implementation="eager",
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    groups = group_linears(model, r".*layer\.\d+\.(intermediate|output)\.dense")
    shape = (options.batch, options.tokens)
    batches = [
        {"input_ids": torch.randint(1000, 30000, shape), "labels": torch.randint(0, 2, (options.batch,))}
        for _ in range(options.steps)
    ]
    size = measure_bytes(model, groups, batches[:2])
    seconds, captured = measure_calibration(model, groups, batches)
    if not options.skip_svd:
        seconds |= measure_svd(model, next(iter(groups.values())), batches)
    default = measure_default(options.llama_blocks, options.llama_tokens, options.llama_steps)
    tokens = f"{options.batch}x{options.tokens}"
    base = (options.hidden, options.blocks) == (768, 12)
    name = "BERT-base" if base else f"BERT of {options.blocks} blocks, {options.hidden}/{4 * options.hidden}"
    result: dict[str, Any] = {
        "benchmark": "calibration",
        "workload": f"{name}, random weights, float32, {options.steps} steps of {tokens} tokens",
        "environment": environment(options.seed),
        "bytes": {**size, "process_high_water": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
        "seconds": seconds,
        "default": {
            **default,
            "blocks": options.llama_blocks,
            "tokens": 4 * options.llama_tokens,
            "steps": options.llama_steps,
        },
        "leading_tenth_energy_of_exact": captured,
        "targets": targets(size, seconds, default),
    }
    for part, count in size.items():
        print(f"{part:26}{count / 1e6:10.1f} MB")
    for part, second in seconds.items():
        print(f"{part:26}{second:10.1f} s")
    for target, outcome in result["targets"].items():
        print(f"{'met' if outcome['reached'] else 'NOT MET':8} {target}: {outcome['found']:.4g}")
    write(options.json, result)


if __name__ == "__main__":
    main()
