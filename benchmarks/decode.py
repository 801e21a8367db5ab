"""Measure the decoding time per token: base model, SparseGrad attached and merged, LoRA.

    python benchmarks/decode.py

The model is a GPT-2 with random weights: one sequence, greedy decoding with the key-value cache. SparseGrad's adapter
is trained for one step, so that its core is not zero. The models take turns; a turn is a prompt and a burst of tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from record import environment, parser, time_in_turn, write
from sparsegrad_lab.bench.speed import percentiles
from sparsegrad_peft import SparseGradAdamW, SparseGradConfig, calibrate_adapter, param_groups
from sparsegrad_peft.method.groups import linear_shape
from sparsegrad_peft.tuner.targets import TARGETS


def build(layers: int, seed: int) -> dict[str, nn.Module]:
    torch.manual_seed(seed)
    base = GPT2LMHeadModel(GPT2Config(n_layer=layers))
    ids = torch.randint(50257, (1, 64))
    adapted = get_peft_model(copy.deepcopy(base), SparseGradConfig(task_type="CAUSAL_LM"))
    calibrate_adapter(adapted, [{"input_ids": ids, "labels": ids}], n_steps=1, trajectory=None, progress=False)
    adapted(input_ids=ids, labels=ids).loss.backward()
    SparseGradAdamW(param_groups(adapted), lr=1e-3).step()
    entries = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    names = [name for name, module in base.named_modules() if type(module).__name__ == "Conv1D" and "mlp" in name]
    per_rank = sum(sum(linear_shape(base.get_submodule(name), name)) for name in names)
    rank = round(entries / per_rank)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank,
        target_modules=TARGETS["gpt2"],
        fan_in_fan_out=True,
        init_lora_weights=False,
    )
    return {
        "base": base,
        "sparsegrad": adapted,
        "sparsegrad-merged": copy.deepcopy(adapted).merge_and_unload(),
        "lora": get_peft_model(copy.deepcopy(base), config),
    }


def main() -> None:
    arguments = parser(__doc__, "decode.json")
    arguments.add_argument("--layers", type=int, default=12)
    arguments.add_argument("--new-tokens", type=int, default=16, help="tokens of a burst")
    arguments.add_argument("--repeats", type=int, default=15)
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    models = build(options.layers, options.seed)
    prompt = torch.randint(50257, (1, 32), generator=torch.Generator().manual_seed(options.seed))

    def burst(model: nn.Module) -> None:
        model.generate(  # type: ignore[operator]
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=options.new_tokens,
            min_new_tokens=options.new_tokens, do_sample=False, pad_token_id=0,
        )  # fmt: skip

    steps: dict[str, Callable[[], object]] = {name: partial(burst, model.eval()) for name, model in models.items()}
    times = time_in_turn(steps, options.repeats)
    result: dict[str, Any] = {
        "benchmark": "decode",
        "workload": f"GPT-2, {options.layers} blocks, one sequence, {options.new_tokens} tokens after a prompt of 32, "
        "float32, random weights",
        "environment": environment(options.seed),
        "methods": {},
    }
    for name, found in times.items():
        result["methods"][name] = {
            "token_ms": percentiles([ms / options.new_tokens for ms in found]),
            "ratio_to_base": percentiles([a / b for a, b in zip(found, times["base"], strict=True)])["p50"],
        }
    attached, merged = (result["methods"][name]["ratio_to_base"] for name in ("sparsegrad", "sparsegrad-merged"))
    result["targets"] = {
        "attached: at most 1.1x the base model's time per token": {"found": attached, "reached": attached <= 1.1},
        "merged: the base model's time per token (to 2 %)": {"found": merged, "reached": merged <= 1.02},
    }
    print(result["workload"])
    for name, row in result["methods"].items():
        print(f"{name:20}{row['token_ms']['p50']:8.2f} ms a token{row['ratio_to_base']:8.2f}")
    for target, outcome in result["targets"].items():
        print(f"{'met' if outcome['reached'] else 'NOT MET':8} {target}: {outcome['found']:.3f}")
    write(options.json, result)


if __name__ == "__main__":
    main()
