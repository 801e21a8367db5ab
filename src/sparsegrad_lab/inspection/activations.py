"""Count what autograd saves for backward in one training step, without weights and without computing anything.

The model is built on the meta device and run on fake tensors (`torch._subclasses.fake_tensor`, also used by
`torch.export`), which have a shape, a type and a device, and no data. PyTorch then takes the code of the real device,
such as its attention kernels, and asks for the same tensors to be saved.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves
from transformers.modeling_layers import GradientCheckpointingLayer

from sparsegrad_peft.method.experts import owner_of
from sparsegrad_peft.tuner.config import SparseGradConfig

from ..methods.training.layers import split_targets
from ..tasks.library_logs import suppress_library_logs

Adapt = Callable[[nn.Module], nn.Module]


def count_activations(
    model: nn.Module, layers: list[str], config: SparseGradConfig, lora_rank: int, dtype: torch.dtype,
    batch_size: int, length: int, *, checkpointing: bool = False,
) -> dict[str, int]:  # fmt: skip
    """Return the bytes saved for backward by the key of `MethodBytes`, for the methods that can be counted.

    Args:
        model: on the meta device, with its head; it is not changed.
        layers: names of the layers to adapt, and of fused experts' parameters. Experts are counted in bfloat16 only.
        config: of the SparseGrad adapter; its targets are replaced by the layers.
        lora_rank: rank of LoRA on the same layers.
        dtype: of the weights and the activations.
        batch_size: rows of a step.
        length: tokens of a row; not read by vision models.
        checkpointing: with gradient checkpointing of each block: the most that is held at one time.

    Raises:
        ValueError: the model cannot be run this way, or it has no blocks to checkpoint.
    """
    if checkpointing and not any(isinstance(module, GradientCheckpointingLayer) for module in model.modules()):
        raise ValueError(f"gradient_checkpointing: {type(model).__name__} has no blocks that transformers checkpoints")
    sparsegrad = copy.deepcopy(config)
    linears, experts = split_targets(model, layers)
    sparsegrad.target_modules, sparsegrad.target_parameters = linears, experts or None
    lora = LoraConfig(r=lora_rank, target_modules=linears, target_parameters=experts or None)
    methods: dict[str, Adapt] = {
        "full": lambda model: model.requires_grad_(True),
        "layers": lambda model: _train_only(model, layers),
        "lora": lambda model: get_peft_model(model, lora),
        "block": lambda model: get_peft_model(model, sparsegrad),
    }
    found = {}
    try:
        for key, adapt in methods.items():
            with suppress_library_logs():
                adapted = adapt(copy.deepcopy(model).to(dtype)).train()
            found[key] = _saved_bytes(adapted, model, batch_size, length, checkpointing)
    except Exception as error:  # a model's own code may read values, which fake tensors do not have
        advice = "use dtype bfloat16, or " if experts and dtype != torch.bfloat16 else ""
        raise ValueError(
            f"the activations of {type(model).__name__} cannot be counted ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}); {advice}leave out batch_size and length"
        ) from error
    return {**found, "topk": found["block"]}


def _train_only(model: nn.Module, layers: Iterable[str]) -> nn.Module:
    model.requires_grad_(False)
    for name in layers:
        owner, parameter = owner_of(model, name)
        (owner if parameter is None else owner.get_parameter(parameter)).requires_grad_(True)
    return model


def _saved_bytes(adapted: nn.Module, model: nn.Module, batch_size: int, length: int, checkpointing: bool) -> int:
    """Return the bytes that autograd saves in a forward pass, without the model's own parameters and buffers."""
    with FakeTensorMode(), suppress_library_logs(), _without_log(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was not calibrated")  # of no matter for the count
        _make_fake(adapted)
        saved = _Saved(adapted)
        with torch.autograd.graph.saved_tensors_hooks(saved.record, lambda tensor: tensor):
            adapted(**_inputs(model, batch_size, length))
        return saved.peak_checkpointed() if checkpointing else saved.total()


@contextmanager
def _without_log() -> Iterator[None]:
    """Silence the log of fake tensors, which has a whole traceback beside the error that is raised."""
    logger = logging.getLogger(fake_tensor.__name__)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled


class _Saved:
    """The tensors that autograd saves, by place: 0 before the blocks, n in block n, -n between it and the next.

    Tensors are known by their storage, and kept, so that no later one gets the same storage.
    """

    def __init__(self, model: nn.Module) -> None:
        self.own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self.saved: dict[int, dict[int, Tensor]] = {0: {}}
        self.inputs: dict[int, dict[int, Tensor]] = {}
        self.block = self.blocks = 0
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        within = {inner for block in blocks for inner in block.modules() if inner is not block}
        for module in blocks:
            if module not in within:  # a stage of Swin is a block that holds blocks; the outer one runs again
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave)

    def record(self, tensor: Tensor) -> Tensor:
        """Take note of a tensor, unless it is a parameter or a buffer, or was saved before."""
        key = _storage(tensor)
        if key not in self.own and not any(key in saved for saved in self.saved.values()):
            self.saved[self.block][key] = tensor
        return tensor

    def _enter(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        self.block = self.blocks = self.blocks + 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.inputs[self.block] = {_storage(tensor): tensor for tensor in given if _storage(tensor) not in self.own}
        self.saved[self.block] = {}

    def _leave(self, *_: Any) -> None:
        self.block = -self.block  # what is saved from here to the next block
        self.saved[self.block] = {}

    def total(self) -> int:
        """Return the bytes of all of them."""
        return sum(map(_bytes, self.saved.values()))

    def peak_checkpointed(self) -> int:
        """Return the most bytes that are held at one time, if each block keeps only its inputs and runs again.

        At the end of the forward pass these are the inputs and all that is saved outside the blocks. When a block runs
        again, what is saved after the last block is already free.
        """
        held: dict[int, Tensor] = {}
        for block, inputs in self.inputs.items():
            if self.saved[block]:
                held |= inputs
        parts = {block: _bytes(saved, without=held) for block, saved in self.saved.items()}
        after = parts.pop(-self.blocks)
        between = sum(size for block, size in parts.items() if block <= 0)
        return _bytes(held) + between + max(after, *(size for block, size in parts.items() if block > 0))


def _bytes(tensors: Mapping[int, Tensor], without: Container[int] = ()) -> int:
    return sum(tensor.untyped_storage().nbytes() for key, tensor in tensors.items() if key not in without)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _make_fake(model: nn.Module) -> None:
    """Replace all parameters and buffers by fake tensors on the CPU. Shared ones stay shared."""
    fake: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                if id(tensor) not in fake:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                    trains = tensor.requires_grad
                    fake[id(tensor)] = nn.Parameter(empty, trains) if isinstance(tensor, nn.Parameter) else empty
                own[name] = fake[id(tensor)]  # type: ignore[assignment]


def _inputs(model: Any, batch_size: int, length: int) -> dict[str, Tensor]:
    """Return inputs of the right shapes, with labels if the model has a head that takes them."""
    config, name = model.config, type(model).__name__
    if model.main_input_name == "pixel_values":
        size = getattr(config, "image_size", 224)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        pixels = torch.zeros(batch_size, getattr(config, "num_channels", 3), height, width, dtype=model.dtype)
        return {"pixel_values": pixels} | _labels(name, torch.zeros(batch_size, dtype=torch.long))
    ids = torch.zeros(batch_size, length, dtype=torch.long)
    per_token = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification")
    labels = ids if name.endswith(per_token) else ids[:, 0]
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids} | decoder | _labels(name, labels)


def _labels(name: str, labels: Tensor) -> dict[str, Tensor]:
    return {} if name.endswith("Model") and not name.endswith("LMHeadModel") else {"labels": labels}
