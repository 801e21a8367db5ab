"""Calibrate the adapter of a 4-bit model, whose weights have no gradients."""

from __future__ import annotations

import gc
from dataclasses import replace

from transformers import set_seed

from sparsegrad_peft.tuner.calibration import calibrate_adapter

from ..tasks.library_logs import suppress_library_logs
from .folder import RunFolder
from .inputs import Inputs, load_adapted
from .settings import RunArguments
from .trainer import make_trainer


def calibrate_unquantized(arguments: RunArguments, folder: RunFolder, inputs: Inputs) -> None:
    """Calibrate the adapter with gradients of the unquantized model, which is loaded for this and then dropped.

    Args:
        arguments: the settings.
        folder: gets `calibration.json`.
        inputs: of the run; their model is quantized.
    """
    set_seed(arguments.seeds[0])  # a new head gets the numbers that the run's has
    with suppress_library_logs():
        unquantized = load_adapted(arguments, inputs.task, inputs.processor, four_bits=False)
        statistics = make_trainer(arguments, folder, replace(inputs, adapted=unquantized), ()).calibration_statistics()
    del unquantized
    gc.collect()  # the trainer and its model refer to each other
    calibrate_adapter(inputs.adapted.model, calibration=statistics, progress=False)
