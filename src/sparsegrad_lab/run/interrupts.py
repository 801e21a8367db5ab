"""Ctrl-C that a library swallows."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt at the end of the block if a signal asked for it and a library swallowed it.

    `datasets` has a bare `except` around the hashing of a function, which is where a run that tokenizes is often
    interrupted.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield
        return
    interrupted = False
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        signal.default_int_handler(number, frame)

    ours = [number for number, handler in handlers.items() if handler is signal.default_int_handler]
    for number in ours:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, handlers[number])
    if interrupted:
        raise KeyboardInterrupt
