"""The two files of a saved adapter, checked before they are loaded: PEFT looks for missing ones on the hub."""

from __future__ import annotations

from pathlib import Path

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open

import sparsegrad_peft.tuner  # noqa: F401  # registers SparseGrad, so that PEFT can read its configuration

from ..tasks.pretrained import first_line


def check_adapter(folder: Path) -> PeftConfig:
    """Check the files of a saved adapter, of any PEFT method, and return its configuration.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: one of them is damaged, or a tensor is not finite.
    """
    config, weights = folder / CONFIG_NAME, folder / SAFETENSORS_WEIGHTS_NAME
    pickled = (folder / WEIGHTS_NAME).is_file()  # PyTorch's format, which PEFT reads too
    for path in (config, *(() if pickled else (weights,))):
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} is not a saved adapter: it has no {path.name}; save or copy the adapter again"
            )
    path = config
    try:
        found = PeftConfig.from_pretrained(str(folder))
        if found.peft_type is None:
            raise ValueError("expected a peft_type, found none")
        path = weights
        names = [] if pickled and not weights.is_file() else _not_finite(weights)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or cut off ({type(error).__name__}: {first_line(error)}); save or copy the adapter "
            "again"
        ) from error
    if names:
        raise ValueError(
            f"{weights}: expected finite numbers, found NaN or infinity in {', '.join(names[:3])}; train again, or "
            "copy the adapter again"
        )
    return found


def _not_finite(weights: Path) -> list[str]:
    """Names of the tensors in a safetensors file with a number that is not finite."""
    with safe_open(weights, "pt") as file:
        return [name for name in file.keys() if not file.get_tensor(name).float().isfinite().all()]  # noqa: SIM118
