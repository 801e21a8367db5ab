"""Average gradients over the processes, one parameter at a time, while backward runs.

A collective operation needs the same order on all processes, and gradients may arrive in different ones. So each
process keeps a gradient that arrives early until its turn, and at the end of backward sends zeros for those that did
not arrive, such as those of an expert that none of its tokens reached. Backward runs through the layers in about the
same order everywhere, so a process rarely keeps more than one gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from .processes import is_distributed, is_sharded, mean_over_processes


class Averaging:
    """Takes the gradient of each parameter when it is complete, and hands on the mean over the processes.

    With one process, and for parameters of FSDP2, which averages their gradients itself, a gradient is handed on at
    once.

    Args:
        hooks: removes the hooks in the end.
    """

    def __init__(self, hooks: ExitStack) -> None:
        self._hooks = hooks
        self._turns: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._at_end: list[tuple[Tensor, Callable[[Tensor], None]]] = []
        self._waiting: dict[int, Tensor] = {}
        self._next = 0

    def add(self, parameter: Tensor, receive: Callable[[Tensor], None], *, at_end: bool = False) -> None:
        """Hand on a parameter's gradients. Call this in the order in which backward reaches the parameters.

        Args:
            parameter: to hook.
            receive: gets the mean; it may overwrite it.
            at_end: keep the gradient until the end of backward, for parameters in no known order.
        """
        immediate = not is_distributed() or is_sharded(parameter)
        if not immediate:
            (self._at_end if at_end else self._turns).append((parameter, receive))

        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            assert gradient is not None
            if immediate:
                receive(gradient)
                return
            self._waiting[id(parameter)] = gradient
            while self._next < len(self._turns) and id(self._turns[self._next][0]) in self._waiting:
                self._average_next(self._turns)

        self._hooks.callback(parameter.register_post_accumulate_grad_hook(hook).remove)

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Average what is left when the backward pass in the block is complete.

        If it fails on this process, the averages that the other processes wait for are taken all the same, with zeros.
        """
        everything = [*self._turns, *self._at_end]
        try:
            yield
            while self._next < len(everything):
                self._average_next(everything)
        except Exception:
            for parameter, _ in everything[self._next :]:
                mean_over_processes(torch.zeros_like(parameter))
            raise
        finally:
            self._next = 0
            self._waiting.clear()

    def _average_next(self, turns: list[tuple[Tensor, Callable[[Tensor], None]]]) -> None:
        parameter, receive = turns[self._next]
        self._next += 1
        gradient = self._waiting.pop(id(parameter), None)
        mean = mean_over_processes(torch.zeros_like(parameter) if gradient is None else gradient)
        if bool(mean.any()):  # it arrived on one of the processes
            receive(mean)
