"""Run and measure: a model and a task -> a dict of all that the figures show, fit for JSON.

    calibrate in several ways ─► G and V G Uᵀ of one block, spectra
                              ─► regular fine-tuning, with looks at the gradient: ageing, zero rows, norms of updates
                              ─► the published method: entries touched, norms of updates

The model goes back to its start before each part. Gradients are looked at one at a time and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from sparsegrad_peft.method.basis import Basis
from sparsegrad_peft.method.calibrate import Calibration, CalibrationConfig, calibrate
from sparsegrad_peft.method.gradients import Trajectory, sign_step, stream_gradients
from sparsegrad_peft.method.groups import group_linears
from sparsegrad_peft.method.selection import energy_share

from ..methods.by_name import calibration_config, sizes_of
from ..run.environment import environment
from ..run.settings import RunArguments
from .arguments import FiguresArguments
from .image import log_pair
from .measure import DENSITY, look, shares_of
from .scene import Scene, prepare
from .train import published, regular

CALIBRATING, SHOWN, HELD, FRESH = 1, 3, 4, 100
"""Offsets of batches, see `Scene.batches`. Shares of energy are of the same batches at each look, since they differ
more from batch to batch than a basis ages in a few steps; zero rows are of fresh ones, which begin at the last."""

POINTS = 200
"""Of a spectrum, evenly spaced in the logarithm of the direction's number."""

ORIGINAL, PAPER, SHARED, PER_LAYER, OWN = (
    "original space", "paper: at the start, shared", "along a trajectory, shared", "along a trajectory, per layer",
    "as the run is set",
)  # fmt: skip


def collect(
    arguments: RunArguments, what: FiguresArguments, *, command: str | None = None, progress: bool = True
) -> dict[str, Any]:
    """All numbers of all figures.

    Args:
        arguments: model, task, batch size, sizes of the bases, calibration and learning rate, as for a run.
        what: how long to train and how often to look.
        command: that made them, for the record.
        progress: show a bar.

    Raises:
        ValueError: what the settings ask for cannot be had; see `RunArguments.check`, `FiguresArguments.check` and
            `prepare`.
        TrainingDivergedError: the loss is no longer finite.
    """
    arguments.check()
    what.check(arguments)
    scene = prepare(arguments, what.layer)
    made = {**environment(), "seed": scene.seed}
    own, ways = _calibrations(arguments)
    n_steps = arguments.calibration.n_steps
    total = (len(ways) + 1) * n_steps + 1 + 2 * what.steps + 2 * len(what.looks()) * what.batches
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), disable=not progress,
    )  # fmt: skip
    with bar:
        task = bar.add_task("calibrating", total=total)

        def advance(*_: Any) -> None:
            bar.advance(task)

        measured = scene.measured
        bases: dict[str, dict[str, Basis]] = {ORIGINAL: dict.fromkeys(measured, Basis.identity())}
        own_bases: dict[str, Basis] = {}
        spectrum: list[dict[str, Any]] = []
        for way, (config, shared) in ways.items():
            is_own = (config, shared) == own
            calibration, found = _calibrated(scene, config, shared, scene.layers if is_own else measured, advance)
            bases[way] = {name: found[name] for name in measured}
            if is_own:
                own_bases, spectrum = found, _spectra(scene, arguments, calibration, found)
        bar.update(task, description="gradient of one block")
        gradient = _gradient(scene, own_bases, advance)
        bar.update(task, description="regular fine-tuning")
        ageing, rows, full = _aged(scene, what, bases, arguments, advance)
        del bases
        bar.update(task, description="SparseGrad")
        sparse = published(scene, arguments, own_bases, what.steps, advance)
    return {
        "command": command, "config": arguments.as_dict(), "figures": what.as_dict(),
        "environment": made,
        "block": scene.block, "blocks": max(map(len, scene.groups.values())), "density": DENSITY,
        "roles": {group: scene.role(names[0]) for group, names in scene.groups.items()},
        "calibrated": next(way for way, made in ways.items() if made == own),
        "gradient": gradient, "rows": rows, "spectrum": spectrum, "ageing": ageing,
        "touched": {name: sparse[name] for name in ("touched", "images", "selection")}
        | {"layers": scene.pair},
        "runs": {name: {key: found[key] for key in ("learning_rate", "losses", "norms")}
                 for name, found in (("regular fine-tuning", full), ("SparseGrad", sparse))},
    }  # fmt: skip


def _calibrations(
    arguments: RunArguments,
) -> tuple[tuple[CalibrationConfig, bool], dict[str, tuple[CalibrationConfig, bool]]]:
    """The run's own way of calibrating, and all that are compared, that one among them: (config, shared)."""
    n_steps = arguments.calibration.n_steps
    own = (calibration_config(arguments.calibration), arguments.adapter.shared)
    walk = _trajectory(arguments)
    ways = {PAPER: (CalibrationConfig(n_steps=n_steps), True), SHARED: (walk, True), PER_LAYER: (walk, False)}
    return own, ways if own in ways.values() else {**ways, OWN: own}


def _trajectory(arguments: RunArguments) -> CalibrationConfig:
    """Along a training run, scaled; with the run's step size where it has one."""
    given = arguments.calibration
    lr = Trajectory().lr if given.walk is None else given.walk
    return CalibrationConfig(n_steps=given.n_steps, trajectory=Trajectory(lr, sign_step), normalize=True)


def _calibrated(
    scene: Scene, config: CalibrationConfig, shared: bool, needed: list[str], advance: Callable[..., None]
) -> tuple[Calibration, dict[str, Basis]]:
    """Complete bases by layer. Shared ones are always of all layers of a group, others of those that are needed."""
    groups = group_linears(scene.model, scene.layers if shared else needed, shared=shared)
    step = scene.steps(CALIBRATING, advance)
    calibration = calibrate(scene.model, groups=groups, step=step, config=config, progress=False)
    with _without_warnings():
        bases = calibration.bases()
    return calibration, {name: bases[group] for group, names in groups.items() for name in names}


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A complete basis has rows that no gradient has reached: here that is meant, and the spectra show it."""
    logger = logging.getLogger(Basis.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _gradient(scene: Scene, bases: dict[str, Basis], advance: Callable[..., None]) -> dict[str, Any]:
    """Of one batch: role -> `G` and `V G Uᵀ` of the block's layer as images, with the shares of energy."""
    found: dict[str, Any] = {}
    roles = {name: role for role, name in scene.pair.items()}

    def keep(name: str, G: Tensor) -> None:
        G_tilde = bases[name].to_basis(G)
        found[roles[name]] = {
            "layer": name, "shape": list(G.shape),
            "shares": [round(energy_share(matrix, DENSITY), 6) for matrix in (G, G_tilde)],
            "images": log_pair(G, G_tilde),
        }  # fmt: skip

    stream_gradients(scene.model, roles, keep, step=scene.steps(SHOWN, advance), n_steps=1)
    return {role: found[role] for role in scene.pair}


def _spectra(
    scene: Scene, arguments: RunArguments, calibration: Calibration, bases: dict[str, Basis]
) -> list[dict[str, Any]]:
    """Both sides of each group that a layer of the block belongs to: shares of energy, descending, and the cut."""
    here = set(scene.of_block(scene.block))
    groups = {name: gram for name, gram in calibration.groups.items() if here & set(gram.layers)}
    with _without_warnings():
        cut = replace(calibration, groups=groups).bases(sizes=sizes_of(arguments))
    found = []
    for group, gram in groups.items():
        basis = bases[gram.layers[0]]
        sides = (("input", basis.spectrum_in, cut[group].U), ("output", basis.spectrum_out, cut[group].V))
        for side, spectrum, kept in sides:
            assert spectrum is not None
            assert kept is not None
            shares = spectrum.double() / spectrum.double().sum()
            summed = shares.cumsum(0)
            # As many as a logarithmic axis can show; a large model has thousands.
            at = sorted({round(len(shares) ** (number / (POINTS - 1))) for number in range(POINTS)} | {len(kept)})
            found.append({
                "group": group, "role": scene.role(gram.layers[0]), "side": side, "size": len(shares),
                "at": at,
                "each": [float(f"{shares[place - 1]:.4g}") for place in at],
                "summed": [round(float(summed[place - 1]), 6) for place in at],
                "kept": len(kept), "share_kept": round(float(summed[len(kept) - 1]), 6),
            })  # fmt: skip
    return found


def _aged(
    scene: Scene, what: FiguresArguments, bases: dict[str, dict[str, Basis]], arguments: RunArguments,
    advance: Callable[..., None],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Regular fine-tuning with looks at the gradient; returns the ageing of bases, the zero rows, and the run."""
    renewed = f"along a trajectory, shared, renewed at step {what.half}"
    watched = {"middle": next(iter(scene.pair.values())), "last": scene.last}
    points: list[dict[str, Any]] = []
    rows: dict[str, Any] = {"layers": watched, "shares": []}

    def visit(step: int) -> None:
        if step not in what.looks():
            return
        if step == what.half:
            walk = _trajectory(arguments)
            bases[renewed] = _calibrated(scene, walk, True, scene.measured, advance)[1]
            bases[renewed] = {name: bases[renewed][name] for name in scene.measured}
        shares, _ = look(scene, bases, {}, what.batches, HELD, advance)
        _, tokens = look(scene, {}, watched, what.batches, FRESH + step, advance)
        points.append({"step": step, "shares": shares})
        rows["shares"].append({"step": step} | {key: shares_of(found) for key, found in tokens.items()})
        rows.setdefault("tokens", {key: ["".join(map(str, row)) for row in found[0].tolist()]
                                   for key, found in tokens.items()})  # fmt: skip

    full = regular(scene, what.steps, visit, advance)
    ageing = {"half": what.half, "ways": list(bases), "points": points, "measured": len(scene.measured)}
    return ageing, rows, full
