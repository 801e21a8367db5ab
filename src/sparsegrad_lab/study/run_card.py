"""A run's details for the page: facts, settings that are not the default, and curves."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..run.settings import WITHOUT_EFFECT, RunArguments, flat
from ..tasks.task import display_name
from .runs import Run

WIDTH, HEIGHT = 240, 70
"Of a curve's drawing, in units of its own."
_SHOWN = ("model", "task", "method", "seeds", "training.learning_rate", *WITHOUT_EFFECT)
"Settings that are among the facts, or of no effect."


@dataclass(frozen=True)
class Curve:
    """A score or a loss over the steps."""

    title: str
    points: str
    "x,y pairs for an SVG polyline"
    description: str


@dataclass(frozen=True)
class RunCard:
    """What the page shows of a run before its file's content."""

    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]
    curves: list[Curve]


def run_card(run: Run) -> RunCard:
    """Return the card of a run."""
    environment, training = run.environment, run.config.training
    calibration = [] if run.calibration is None else [("calibration", f"{run.calibration.seconds:,.0f} s")]
    loss = run.training_loss_last_sixth
    facts = [
        (display_name(run.metric), run.format(run.value, 2)),
        ("training loss at the end", "" if loss is None else f"{loss:.4f}, mean of the last sixth of the steps"),
        ("learning rate", f"{run.learning_rate:g}"),
        ("steps", f"{run.steps:,} of {run.rows_per_step} rows, {training.epochs:g} epochs"),
        ("rows", str(run.rows)),
        *calibration,
        ("training", "resumed" if run.resumed else f"{run.training.seconds:,.0f} s"),
        ("peak memory", f"{run.megabytes:,.0f} MB"),
        ("trained entries", f"{run.trained_entries.adapter:,}"),
        ("saved", f"{run.weights_bytes / 1e6:,.1f} MB"),
        ("model", run.model),
        ("machine", f"{environment.device}, {environment.threads} thread{'s' if environment.threads > 1 else ''}"),
        ("when", environment.time),
        ("commit", f"{(environment.commit or 'unknown')[:10]}{' with changes' if environment.dirty else ''}"),
        ("file", run.path.as_posix()),
    ]
    return RunCard([fact for fact in facts if fact[1]], _changed_settings(run), list(_curves(run)))


def _changed_settings(run: Run) -> list[tuple[str, str]]:
    """Settings that are not the default, by their names on the command line."""
    defaults = flat(RunArguments().as_dict())
    settings = flat(run.config.model_dump())
    return [
        (name, ", ".join(map(_text, value)) if isinstance(value, list) else _text(value))
        for name, value in settings.items()
        if name not in _SHOWN and value is not None and value != defaults.get(name)
    ]


def _text(value: object) -> str:
    """A setting's value as on the command line."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _curves(run: Run) -> Iterable[Curve]:
    """Evaluation loss and score, where there are two evaluations or more."""
    for name in dict.fromkeys(("loss", run.metric)):
        points = [
            (step, value)
            for entry in run.evaluations
            if (step := entry.get("step")) is not None and (value := entry.get(name)) is not None
        ]
        if len(points) < 2:
            continue
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = min(values), max(values)
        across, up = max(steps) - min(steps) or 1, high - low or 1
        drawn = " ".join(
            f"{WIDTH * (step - min(steps)) / across:.1f},{HEIGHT * (1 - (value - low) / up):.1f}"
            for step, value in points
        )
        title = f"evaluation {display_name(name)}"
        ends = f"{values[0]:.4g} at step {steps[0]:,.0f}, {values[-1]:.4g} at step {steps[-1]:,.0f}"
        yield Curve(title, drawn, f"{ends}; lowest {low:.4g}, highest {high:.4g}")
