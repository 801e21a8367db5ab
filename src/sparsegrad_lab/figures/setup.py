"""The model, its MLP layers by block, and random batches of a task: what the measurements start from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from sparsegrad_peft.method.gradients import Step, default_loss
from sparsegrad_peft.method.groups import group_linears, linear_shape
from sparsegrad_peft.method.statistics import Statistics

from ..methods.registry import METHODS, find_method
from ..methods.training.layers import block_number
from ..run.exit_codes import RefusedError
from ..run.inputs import load_run_task
from ..run.settings import RunArguments
from ..tasks.kinds import KINDS
from ..tasks.kinds.packing import prepare_model
from ..tasks.library_logs import suppress_library_logs

DENSITY = 0.01
"""Share of the entries that counts as "the largest", and that SparseGrad selects: the paper's 1 %."""

MAX_BLOCKS = 6
"""Number of blocks whose gradients are measured. Each layer may have bases of its own, which take memory."""

CALIBRATION_BATCHES, TRAINING_BATCHES, SHOWN_BATCHES, AGEING_BATCHES, ZERO_ROW_BATCHES = 1, 2, 3, 4, 100
"""Added to the seed: each purpose has batches of its own. Zero rows use `ZERO_ROW_BATCHES + step`."""


@dataclass
class Setup:
    """Model, layers and batches."""

    model: nn.Module
    "pretrained, with a new head; the run's `rest` decides what trains besides the MLP layers"
    groups: dict[str, list[str]]
    "group -> its MLP layers, in the order of the blocks"
    block: int
    "number of the block that is shown entry by entry, in the model"
    rows: Any
    "tokenized training rows"
    collate: Callable[[list[Any]], Any]
    batch_size: int
    seed: int

    @property
    def layers(self) -> list[str]:
        """All MLP layers."""
        return [name for names in self.groups.values() for name in names]

    @property
    def measured_layers(self) -> list[str]:
        """The MLP layers of at most `MAX_BLOCKS` blocks."""
        return [name for names in self.groups.values() for name in evenly_spaced(names, MAX_BLOCKS)]

    @property
    def shown_layers(self) -> dict[str, str]:
        """Role -> the first layer of that role in the shown block; "up" comes first. A role may be missing."""
        layers: dict[str, str] = {}
        for name in self.layers_of(self.block):
            layers.setdefault(self.role(name), name)
        return dict(sorted(layers.items(), reverse=True))

    @property
    def last_layer(self) -> str:
        """The first MLP layer of the last block."""
        return next(iter(self.groups.values()))[-1]

    @property
    def block_numbers(self) -> dict[str, list[int]]:
        """Group -> the numbers of its layers' blocks in the model. `adapter.layers` may leave some out."""
        return {group: block_numbers(names) for group, names in self.groups.items()}

    def layers_of(self, block: int) -> list[str]:
        """Return a block's layers. A group that has none in this block gives its last layer."""
        return [
            dict(zip(numbers, names, strict=True)).get(block, names[-1])
            for numbers, names in zip(self.block_numbers.values(), self.groups.values(), strict=True)
        ]

    def role(self, name: str) -> str:
        """Return "down" for a layer with fewer outputs than inputs, else "up"."""
        out_features, in_features = linear_shape(self.model.get_submodule(name), name)
        return "down" if out_features < in_features else "up"

    def weight(self, name: str) -> nn.Parameter:
        """Return a layer's weight."""
        return self.model.get_parameter(f"{name}.weight")

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that a run may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def batches(self, offset: int) -> Iterator[Any]:
        """Yield random batches without end. The same offset gives the same batches."""
        generator = torch.Generator().manual_seed(self.seed + offset)
        while True:
            chosen = torch.randint(len(self.rows), (self.batch_size,), generator=generator).tolist()
            yield self.collate([self.rows[number] for number in chosen])

    def loss_step(self, offset: int, after: Callable[[Any], None]) -> Step:
        """Return a function that computes the loss of the next of these batches and passes the batch to `after`."""
        stream = self.batches(offset)

        def step() -> Tensor:
            batch = next(stream)
            loss = default_loss(self.model, batch)
            after(batch)
            return loss

        return step


def load_setup(arguments: RunArguments, block: int | None) -> Setup:
    """Load task, tokenizer and model.

    Raises:
        ValueError: no training rows, no MLP layers, or sizes or a block that the model does not have. Where the config
            tells, it is raised before the weights are loaded.
    """
    task, shapes = load_run_task(arguments)
    kind, method = KINDS[task.kind], find_method(arguments.method)
    if shapes is not None:
        choose_block(group_linears(shapes, method.target_layers(shapes, arguments.adapter)), block)
    set_seed(arguments.seeds[0])
    processor = kind.processor(arguments.model)
    with suppress_library_logs():
        model = kind.load_model(arguments.model, task, processor)
        # The gradients of the plain layers are measured, so there is no adapter; only what trains is chosen.
        METHODS["full"].adapt(model, arguments.setup())
        rows = kind.features(task, "train", processor, arguments.data)
        if arguments.data.packing:
            prepare_model(model, rows["input_ids"][0])
    groups = group_linears(model, method.target_layers(model, arguments.adapter))
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return Setup(
        model, groups, choose_block(groups, block), rows, kind.collator(processor, arguments.padded_length),
        arguments.training.batch_size, arguments.seeds[0],
    )  # fmt: skip


def choose_block(groups: dict[str, list[str]], block: int | None) -> int:
    """Return `block`, or the middle one of the blocks with MLP layers for None.

    Raises:
        RefusedError: that block has no MLP layer of the run.
    """
    numbers = block_numbers(max(groups.values(), key=len))
    if block is not None and block not in numbers:
        raise RefusedError(
            f"figures.layer: expected the number of a block with layers to adapt, {', '.join(map(str, numbers))}; "
            f"found {block}"
        )
    return numbers[(len(numbers) - 1) // 2] if block is None else block


def block_numbers(names: list[str]) -> list[int]:
    """Return the numbers of these layers' blocks in the model, or 0, 1, … if the names do not tell them apart."""
    numbers = [block_number(name) for name in names]
    return [n for n in numbers if n is not None] if len({*numbers} - {None}) == len(names) else list(range(len(names)))


def evenly_spaced(names: list[str], count: int) -> list[str]:
    """Return at most `count` of the names, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[round(number * (len(names) - 1) / (count - 1))] for number in range(count)]


@contextmanager
def without_rank_warnings() -> Iterator[None]:
    """Silence the warning that a complete basis has rows which no gradient has reached. The spectra show them."""
    logger = logging.getLogger(Statistics.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
