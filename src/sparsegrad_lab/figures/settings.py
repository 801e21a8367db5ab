"""Settings of `sparsegrad figures`. Imports no torch, so that `--help` is quick."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ..methods.ranges import COUNT, Range, range_problems
from ..methods.registry import METHODS
from ..run.settings import RunArguments, flat, refuse

_READ = (
    "model", "task", "method", "rest", "seeds", "output", "training.batch_size", "training.learning_rate",
    "training.rest_learning_rate", "training.padding", "training.precision",
)  # fmt: skip
"Settings of a run that figures read, besides those of the data, the adapter and the calibration."


@dataclass
class FiguresArguments:
    """Draw figures of SparseGrad on a model and a task: a gradient before and after the change of basis, gradient rows
    that are zero, spectra, how the bases age, which entries a run changes, and how far the weights move. Runs two short
    training runs and saves only their figures.
    """

    steps: int = 60
    "training steps of each of the two runs"
    points: int = 4
    "number of measurements during training, evenly spaced from step 0 to the last; one more is made at half time"
    batches: int = 2
    "batches for each measurement; training does not use them"
    layer: int | None = None
    "number of the block whose layers are shown entry by entry, counted from 0; default: the middle adapted block"
    redraw: bool = False
    "draw the figures again from the numbers in the output folder, without training"

    def as_dict(self) -> dict[str, Any]:
        """Return the settings for JSON."""
        return asdict(self)

    def check(self, run: RunArguments, given: Collection[str] = ()) -> None:
        """Check these settings, and those of the run that figures restrict.

        Args:
            run: the run's settings.
            given: dotted names of the settings that the command line names. Figures must read them; a file may hold
                settings of other commands.

        Raises:
            RefusedError: lists every problem.
        """
        two = Range("at least 2", lambda value: value >= 2)
        ranges = {"steps": two, "points": two, "batches": COUNT, "layer": Range("at least 0", lambda value: value >= 0)}
        problems = range_problems("figures", self, ranges)
        if 2 <= self.steps < self.points - 1:
            problems.append(
                f"figures.points must be at most {self.steps + 1} with {self.steps} training steps, found "
                f"{self.points}; lower figures.points or raise figures.steps"
            )
        if METHODS.get(run.method) is not METHODS["sparsegrad"]:
            problems.append(f"method: figures show SparseGrad only, found {run.method!r}; remove the setting")
        settings = flat(run.as_dict())
        problems += [
            f"{name}: figures do not read it; leave it out"
            for name in settings
            if name in given and name not in _READ and not name.startswith(("data.", "adapter.", "calibration."))
        ]
        if len(run.seeds) > 1:
            problems.append(f"seeds: figures show one run, found {run.seeds}; give one seed")
        if run.training.precision != "fp32":
            problems.append(
                f"training.precision: figures measure gradients in fp32, found {run.training.precision!r}; remove the "
                "setting"
            )
        refuse("cannot make these figures", problems)

    @property
    def half_time(self) -> int:
        """The step at which one pair of bases is calibrated again."""
        return self.steps // 2

    @property
    def measured_steps(self) -> list[int]:
        """The training steps after which gradients are measured, ascending."""
        even = {round(number * self.steps / (self.points - 1)) for number in range(self.points)}
        return sorted(even | {self.half_time})
