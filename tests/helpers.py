"""Helpers that several test files share: orthonormal rows, tiny models and their batches, adapters, steps of training.

Only torch is imported at the top, so that tests of the method start fast.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

    from sparsegrad_lab.bench.worker import Runner
    from sparsegrad_peft.tuner.layer import SparseGradLayer
from torch.utils._python_dispatch import TorchDispatchMode

F64 = torch.float64


def read_toml(path: Path) -> dict[str, Any]:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        import tomli as tomllib
    return tomllib.loads(path.read_text(encoding="utf-8"))


PROJECT: dict[str, Any] = read_toml(Path(__file__).parents[1] / "pyproject.toml")["project"]
"The table `project` of pyproject.toml."


def write_json(path: Path, content: Any) -> None:
    """A JSON file, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def orthogonal(n: int, rows: int | None = None, dtype: torch.dtype = F64) -> Tensor:
    """The first `rows` rows of a random orthogonal matrix (n, n); computed in float64, then cast."""
    return torch.linalg.qr(torch.randn(n, n, dtype=F64)).Q[:rows].to(dtype)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor))
    return sum(value.numel() * value.element_size() for value in tensors)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Any],
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
) -> list[float]:
    """One optimizer step a batch; returns the losses. Without `loss_fn`, the model's own loss of `model(**batch)`."""
    losses = []
    for batch in batches:
        loss = model(**batch).loss if loss_fn is None else loss_fn(model, batch)
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def all_chain_costs(dims: tuple[int, ...]) -> list[int]:
    """Multiply-adds of a matrix chain, for every parenthesization."""
    if len(dims) == 2:
        return [0]
    return [
        left + right + dims[0] * dims[s] * dims[-1]
        for s in range(1, len(dims) - 1)
        for left in all_chain_costs(dims[: s + 1])
        for right in all_chain_costs(dims[s:])
    ]


class _MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products as they are dispatched; refuses products that it does not know."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not {"bmm", "matmul", "einsum", "linear", "mv", "dot"} & {name}, name
        if name in ("mm", "addmm", "addmm_"):
            left, right = args[-2:]
            self.total += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


class TF32(TorchDispatchMode):
    """Rounds the factors of float32 products to 10 bits, as a GPU does where TF32 is allowed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_") and (
            torch.backends.cuda.matmul.fp32_precision == "tf32"
        ):
            args = (*args[:-2], *map(_rounded_to_10_bits, args[-2:]))
        return func(*args, **(kwargs or {}))


def _rounded_to_10_bits(factor: Tensor) -> Tensor:
    if factor.dtype != torch.float32:
        return factor
    return ((factor.contiguous().view(torch.int32) + 2**12) & ~(2**13 - 1)).view(torch.float32)


def multiply_adds_done(call: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the matrix products that a call computes."""
    with _MultiplyAdds() as counter:
        call(*args, **kwargs)
    return counter.total


def max_difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def check_equal(found: Any, expected: Any, where: str = "") -> None:
    """Assert bitwise equality of tensors, and of tensors in dictionaries, lists and tuples."""
    assert type(found) is type(expected), where
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name in expected:
            check_equal(found[name], expected[name], f"{where}.{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            check_equal(one, other, f"{where}[{i}]")
    else:
        assert found == expected, where


# Tiny models with random weights, without dropout.


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
                   max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=60, hidden_size=16, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2,
                    num_key_value_heads=1, max_position_embeddings=16)
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=16, n_layer=3, n_head=2, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0,
                   attn_pdrop=0.0, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=60, d_model=16, d_ff=32, d_kv=8, num_layers=2, num_heads=2, dropout_rate=0.0,
                 decoder_start_token_id=0)
    )  # fmt: skip


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8,
                  patch_size=4, num_channels=1, num_labels=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )  # fmt: skip


TINY_MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": _bert, "llama": _llama, "gpt2": _gpt2, "t5": _t5, "vit": _vit,
}  # fmt: skip
MLP_LINEARS = {"bert": 6, "llama": 9, "gpt2": 6, "t5": 8, "vit": 6}
MLP_GROUPS = {"bert": 2, "llama": 3, "gpt2": 2, "t5": 4, "vit": 2}
"Groups of linears with the same role and shape. T5's encoder and decoder are apart."


def tiny_model(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TINY_MODELS[kind]().eval()


def tiny_batch(kind: str, n: int = 4) -> dict[str, Tensor]:
    """The same `n` rows with labels at each call."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(n, 1, 8, 8, generator=generator), "labels": torch.arange(n) % 3}
    ids = torch.randint(3, 60, (n, 10), generator=generator)
    return {"input_ids": ids, "labels": torch.arange(n) % 2 if kind == "bert" else ids}


def logits(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).logits


# Adapters on them.


def tuner_layers(model: nn.Module) -> list[SparseGradLayer]:
    from sparsegrad_peft.tuner.layer import SparseGradLayer

    return [module for module in model.modules() if isinstance(module, SparseGradLayer)]


def cores(model: nn.Module, adapter: str = "default") -> list[nn.Parameter]:
    return [layer.sparsegrad_S[adapter] for layer in tuner_layers(model)]


def train_adapter(model: nn.Module, batch: dict[str, Tensor], steps: int = 3, lr: float = 0.02) -> list[float]:
    from sparsegrad_peft import SparseGradAdamW, param_groups

    return train(model, SparseGradAdamW(param_groups(model, density=0.2), lr=lr), steps * [batch])


def trained_adapter(
    kind: str, *, calibrated: bool = True, trained: int = 3, **options: Any
) -> tuple[PeftModel, nn.Module]:
    """A tiny model with an adapter after `trained` steps, and the base model as it was."""
    from peft import get_peft_model

    from sparsegrad_peft import SparseGradConfig, calibrate_adapter

    base = tiny_model(kind)
    if trained and not calibrated:
        options["original_space"] = True
    model = get_peft_model(copy.deepcopy(base), SparseGradConfig(**{"c": 0.5, "r": 0.25, **options}))
    batch = tiny_batch(kind)
    if calibrated:
        calibrate_adapter(model, [batch], n_steps=3, training=False, progress=False)
    train_adapter(model, batch, trained)
    return model.eval(), base


def uncalibrated_adapter(
    kind: str = "bert", *, dropout: float = 0.1, low_cpu_mem_usage: bool = False, **options: Any
) -> PeftModel:
    """A tiny model with dropout and an adapter that was not calibrated; BERT's head is trained as well."""
    from peft import get_peft_model
    from transformers.trainer_utils import set_seed

    from sparsegrad_peft import SparseGradConfig

    base = tiny_model(kind)
    for module in base.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
    task = {"task_type": "SEQ_CLS"} if kind == "bert" else {"task_type": "CAUSAL_LM"}
    set_seed(0)
    config = SparseGradConfig(**{"c": 0.5, "r": 0.25, **task, **options})
    return get_peft_model(base, config, low_cpu_mem_usage=low_cpu_mem_usage)


TINY_SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
"Of a config of transformers."


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def bench_runner(method: str, workload: str = "mlp-32x64", tokens: int = 96, **settings: Any) -> Runner:
    """A prepared method of `sparsegrad bench`: one block, bases of 8 and 4 rows."""
    from sparsegrad_lab.bench.settings import BenchArguments
    from sparsegrad_lab.bench.worker import Runner

    options = {"narrow": 8, "wide": 4, "threads": torch.get_num_threads(), **settings}
    return Runner(BenchArguments(workload=workload, tokens=tokens, **options), method, 1)
