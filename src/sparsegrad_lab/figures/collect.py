"""Take all measurements of the figures.

    calibrate in several ways ─► G and V G Uᵀ of one block, spectra
                              ─► regular fine-tuning with measurements: ageing, zero rows, update norms
                              ─► SparseGrad as published: touched entries, update norms

The model is restored before each part. Gradients are measured one at a time and dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import Calibration, calibrate
from sparsegrad_peft.method.config import CalibrationConfig, Trajectory, sign_step
from sparsegrad_peft.method.groups import group_linears

from ..methods.sparsegrad import calibration_config
from ..run.machine import environment
from ..run.progress_bar import make_progress_bar
from ..run.settings import RunArguments
from . import gradient_before_after, spectrum
from .ageing import energy_shares
from .settings import FiguresArguments
from .setup import CALIBRATION_BATCHES, DENSITY, ZERO_ROW_BATCHES, Setup, load_setup, without_rank_warnings
from .strided_structure import kind_shares, token_kinds
from .training import FINE_TUNING, SPARSEGRAD, fine_tune, train_sparsegrad

ORIGINAL, PAPER, SHARED, PER_LAYER, MEAN, OWN = (
    "original space", "paper: at the start, shared", "along a trajectory, shared", "along a trajectory, per layer",
    "mean gradient along a trajectory, per layer", "this run's settings",
)  # fmt: skip
"""Names of the bases that are compared."""

Advance = Callable[..., None]
Way = tuple[CalibrationConfig, bool]
"""How bases are calibrated: the config, and whether a group shares one pair."""


def collect(
    arguments: RunArguments, settings: FiguresArguments, *, command: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """Measure everything that the figures show.

    Args:
        arguments: model, task, batch size, sizes of the bases, calibration and learning rate, as for a run.
        settings: how long to train and how often to measure.
        command: the command line, for the record.
        progress: show a progress bar.

    Returns:
        Nested dicts of numbers, strings and arrays, for `folder.write`.

    Raises:
        ValueError: invalid settings, see `RunArguments.check`, `FiguresArguments.check` and `load_setup`.
        TrainingDivergedError: the loss is no longer finite.
    """
    arguments.check()
    settings.check(arguments)
    setup = load_setup(arguments, settings.layer)
    record = {**environment(), "seed": setup.seed}
    own, ways = calibration_ways(arguments)
    measured_batches = 2 * len(settings.measured_steps) * settings.batches
    total = (len(ways) + 1) * arguments.calibration.n_steps + 1 + 2 * settings.steps + measured_batches
    with make_progress_bar(Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("calibrating", total=total)

        def advance(*_: Any) -> None:
            bar.advance(task)

        bases = {ORIGINAL: dict.fromkeys(setup.measured_layers, Basis.identity())}
        of_all_layers: dict[str, tuple[Calibration, dict[str, Basis]]] = {}
        for name, way in ways.items():
            layers = setup.layers if name in (own, PAPER) else setup.measured_layers
            calibration, by_layer = calibrate_bases(setup, way, layers, advance)
            bases[name] = {layer: by_layer[layer] for layer in setup.measured_layers}
            if name in (own, PAPER):
                of_all_layers[name] = calibration, by_layer
        own_calibration, own_bases = of_all_layers[own]
        spectra = spectrum.measure(setup, own_calibration, own_bases, arguments.adapter.sizes)
        bar.update(task, description="gradient of one block")
        gradient = gradient_before_after.measure(setup, own_bases, advance)
        bar.update(task, description=FINE_TUNING)
        ageing, zero_rows, full = _measure_fine_tuning(setup, settings, bases, arguments, advance)
        bases.clear()
        bar.update(task, description=SPARSEGRAD)
        sparse = train_sparsegrad(setup, arguments, of_all_layers[PAPER][1], settings.steps, advance)
    return {
        "command": command, "config": arguments.as_dict(), "figures": settings.as_dict(), "environment": record,
        "block": setup.block, "block_numbers": setup.block_numbers, "density": DENSITY,
        "roles": {group: setup.role(names[0]) for group, names in setup.groups.items()}, "calibrated": own,
        "mean_gradient": ways[own][0].mean_gradient,
        "gradient": gradient, "rows": zero_rows, "spectrum": spectra, "ageing": ageing,
        "touched": {"layers": setup.shown_layers} | {key: sparse[key] for key in ("touched", "images", "selection")},
        "runs": {name: {key: run[key] for key in ("learning_rate", "losses", "norms")}
                 for name, run in ((FINE_TUNING, full), (SPARSEGRAD, sparse))},
    }  # fmt: skip


def calibration_ways(arguments: RunArguments) -> tuple[str, dict[str, Way]]:
    """Return the name of the run's own way of calibration, and all ways that are compared, that one included."""
    ways = {
        PAPER: (CalibrationConfig.paper(n_steps=arguments.calibration.n_steps), True),
        SHARED: (_along_trajectory(arguments), True),
        PER_LAYER: (_along_trajectory(arguments), False),
    }
    own = (calibration_config(arguments.calibration.resolved(arguments.adapter.sizes)), arguments.adapter.shared)
    mean = replace(_along_trajectory(arguments), mean_gradient=True)
    name = next((name for name, way in {**ways, MEAN: (mean, False)}.items() if way == own), OWN)
    return name, {**ways, name: own}


def _along_trajectory(arguments: RunArguments) -> CalibrationConfig:
    """Return a calibration along a trajectory, with normalized gradients and the run's step size if it has one."""
    walk = arguments.calibration.walk
    trajectory = Trajectory(Trajectory().lr if walk is None else walk, sign_step)
    return CalibrationConfig.paper(n_steps=arguments.calibration.n_steps, trajectory=trajectory, normalize=True)


def calibrate_bases(
    setup: Setup, way: Way, layers: list[str], advance: Advance
) -> tuple[Calibration, dict[str, Basis]]:
    """Return the calibration and layer -> complete basis. Shared bases are always those of all layers."""
    config, shared = way
    groups = group_linears(setup.model, setup.layers if shared else layers, shared=shared)
    step = setup.loss_step(CALIBRATION_BATCHES, advance)
    calibration = calibrate(setup.model, groups=groups, step=step, config=config, progress=False)
    with without_rank_warnings():
        bases = calibration.bases()
    return calibration, {name: bases[group] for group, names in groups.items() for name in names}


def _measure_fine_tuning(
    setup: Setup, settings: FiguresArguments, bases: dict[str, dict[str, Basis]], arguments: RunArguments,
    advance: Advance,
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Fine-tune and measure on the way. Returns the ageing of bases, the zero rows, and the run."""
    renewed = f"along a trajectory, shared, renewed at step {settings.half_time}"
    layers = {"middle": next(iter(setup.shown_layers.values())), "last": setup.last_layer}
    points: list[dict[str, Any]] = []
    zero_rows: dict[str, Any] = {"layers": layers, "shares": []}

    def visit(step: int) -> None:
        if step not in settings.measured_steps:
            return
        if step == settings.half_time:
            way = (_along_trajectory(arguments), True)
            bases[renewed] = calibrate_bases(setup, way, setup.measured_layers, advance)[1]
        points.append({"step": step, "shares": energy_shares(setup, bases, settings.batches, advance)})
        kinds = token_kinds(setup, layers, settings.batches, ZERO_ROW_BATCHES + step, advance)
        zero_rows["shares"].append({"step": step, **{key: kind_shares(batches) for key, batches in kinds.items()}})
        if step == 0:
            zero_rows["tokens"] = {key: batches[0].numpy().astype(np.uint8) for key, batches in kinds.items()}

    run = fine_tune(setup, settings.steps, visit, advance)
    ageing = {
        "half": settings.half_time, "ways": list(bases), "points": points, "measured": len(setup.measured_layers)
    }  # fmt: skip
    return ageing, zero_rows, run
