"""What is looked at: a model with what trains in it, its MLP layers by block, and endless batches of a task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from sparsegrad_peft.method.gradients import Step, default_loss
from sparsegrad_peft.method.groups import group_linears, linear_shape

from ..methods.by_name import adapt, check_layers
from ..run.base import load_model, load_run_task
from ..run.settings import RunArguments
from ..tasks.kinds import KINDS
from ..tasks.library_logs import suppress_library_logs

MOST_BLOCKS = 6
"""Of how many blocks gradients are measured, evenly spaced: bases of its own for each layer take memory."""


@dataclass
class Scene:
    """Model, layers and batches."""

    model: nn.Module
    "pretrained, with a new head; MLP layers and head train, or all of it, as the run's `rest` says"
    groups: dict[str, list[str]]
    "group -> its MLP layers, in the order of the blocks"
    block: int
    "the one that is shown entry by entry"
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
    def measured(self) -> list[str]:
        """Those of at most `MOST_BLOCKS` blocks."""
        return [name for names in self.groups.values() for name in evenly(names, MOST_BLOCKS)]

    @property
    def pair(self) -> dict[str, str]:
        """The block's first layer of each role, by role; one of them only, where the targets have no other."""
        found: dict[str, str] = {}
        for name in self.of_block(self.block):
            found.setdefault(self.role(name), name)
        return dict(sorted(found.items(), reverse=True))  # up before down

    @property
    def last(self) -> str:
        """The first layer of the last block."""
        return next(iter(self.groups.values()))[-1]

    def of_block(self, block: int) -> list[str]:
        """A block's layers; a group with fewer gives its last."""
        return [names[min(block, len(names) - 1)] for names in self.groups.values()]

    def role(self, name: str) -> str:
        """What a layer is: "up", or "down" where it narrows."""
        out_features, in_features = linear_shape(self.model.get_submodule(name), name)
        return "down" if out_features < in_features else "up"

    def weight(self, name: str) -> nn.Parameter:
        """Of a layer."""
        found: nn.Parameter = self.model.get_parameter(f"{name}.weight")
        return found

    @property
    def trained(self) -> list[nn.Parameter]:
        """What a run may change."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def batches(self, offset: int) -> Iterator[Any]:
        """Endless random batches; the same ones for the same offset."""
        generator = torch.Generator().manual_seed(self.seed + offset)
        while True:
            chosen = torch.randint(len(self.rows), (self.batch_size,), generator=generator).tolist()
            yield self.collate([self.rows[number] for number in chosen])

    def steps(self, offset: int, after: Callable[[Any], None]) -> Step:
        """A function that returns the loss of the next of these batches, and hands the batch to `after`."""
        stream = self.batches(offset)

        def step() -> Tensor:
            batch = next(stream)
            loss = default_loss(self.model, batch)
            after(batch)
            return loss

        return step


def prepare(arguments: RunArguments, block: int | None) -> Scene:
    """Task, tokenizer and model of a run.

    Raises:
        ValueError: no training rows, no MLP layers, sizes or a block that the model does not have; all of it before the
            weights are loaded, where the model's config alone says it.
    """
    task, shapes = load_run_task(arguments)
    kind = KINDS[task.kind]
    if shapes is not None:
        choose_block(group_linears(shapes, check_layers(shapes, arguments)), block)
    set_seed(arguments.seeds[0])
    processor = kind.processor(arguments.model)
    with suppress_library_logs():
        model = load_model(arguments.model, task, processor)
        # What is looked at are the plain layers' own gradients; the adapter's sizes count for the spectra alone.
        adapt(model, replace(arguments, method="full"))
        rows = kind.features(task, "train", processor, arguments)
    groups = group_linears(model, check_layers(model, arguments))
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    return Scene(
        model, groups, choose_block(groups, block), rows, kind.collator(processor, arguments),
        arguments.training.batch_size, arguments.seeds[0],
    )  # fmt: skip


def choose_block(groups: dict[str, list[str]], block: int | None) -> int:
    """The block that was asked for, or the middle one.

    Raises:
        ValueError: the model has fewer.
    """
    blocks = max(len(names) for names in groups.values())
    if block is not None and block >= blocks:
        raise ValueError(
            f"figures.layer: expected a block from 0 to {blocks - 1}, found {block}; the model has {blocks}"
        )
    return (blocks - 1) // 2 if block is None else block


def evenly(names: list[str], count: int) -> list[str]:
    """At most so many of them, the first and the last among them."""
    if len(names) <= count:
        return names
    return [names[round(number * (len(names) - 1) / (count - 1))] for number in range(count)]
