"""What can be set for the figures; light, so that the help is quick."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..run.settings import RunArguments


@dataclass
class FiguresArguments:
    """Draw what SparseGrad sees in a model and a task: gradients before and after the change of basis, rows that are
    zero, spectra, how bases age, what a run touches, and how far the weights move. Trains for a short while, twice.
    """

    steps: int = 60
    "training steps of each of the two short runs"
    points: int = 4
    "looks along training, evenly spaced, the first and the last step among them; one at half time comes on top"
    batches: int = 2
    "batches a look: for shares of energy the same at each, for zero rows fresh ones; none of the training's"
    layer: int | None = None
    "block whose layers are shown entry by entry, counted from 0; default: the middle one"
    redraw: bool = False
    "draw again from the figures.json of the output folder, without a run"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def check(self, run: RunArguments) -> None:
        """Raise one ValueError that names every problem, those of the run's settings included that figures cannot take.

        Raises:
            ValueError: see above.
        """
        problems = [
            f"figures.{name} must be at least {least}, found {value}"
            for name, least, value in (("steps", 2, self.steps), ("points", 2, self.points),
                                       ("batches", 1, self.batches), ("layer", 0, self.layer))
            if value is not None and value < least
        ]  # fmt: skip
        if 2 <= self.steps < self.points - 1:
            problems.append(
                f"figures.points: expected at most {self.steps + 1} looks at {self.steps} steps, found {self.points}; "
                "take fewer, or more figures.steps"
            )
        if run.method != "sparsegrad":
            problems.append(f"method: the figures are SparseGrad's, found {run.method!r}; leave it out")
        if len(run.seeds) > 1:
            problems.append(f"seeds: the figures show one run, found {run.seeds}; give one seed")
        if run.training.precision != "fp32":
            problems.append(
                f"training.precision: gradients are looked at in fp32, found {run.training.precision!r}; leave it out"
            )
        if problems:
            raise ValueError("\n".join(["these figures cannot be made:", *(f"  - {words}" for words in problems)]))

    def looks(self) -> list[int]:
        """The steps at which the gradient is looked at, ascending; half time is one of them."""
        even = {round(number * self.steps / (self.points - 1)) for number in range(self.points)}
        return sorted(even | {self.half})

    @property
    def half(self) -> int:
        """The step at which bases are refreshed."""
        return self.steps // 2
