"""Hide the progress bars and info logs of transformers and datasets."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def suppress_library_logs() -> Iterator[None]:
    """Hide progress bars and everything below errors that transformers logs; other libraries' warnings still show."""
    import datasets  # here, since it takes a second and most modules that import this one do not need it
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers_bars = transformers.logging.is_progress_bar_enabled()
    datasets_bars = not datasets.are_progress_bars_disabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # PEFT reads a model property that transformers has deprecated.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if transformers_bars:
            transformers.logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()
