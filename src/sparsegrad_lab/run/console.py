"""What a run shows while it goes on, and the log that it keeps."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from ..tasks.task import higher_is_better
from .folder import RunFolder


class Progress(TrainerCallback):
    """A bar over the steps, a line for each evaluation, and `metrics.json` kept up to date."""

    def __init__(self, folder: RunFolder, metric: str = "loss", show: bool = True) -> None:
        self.folder, self.metric, self.show = folder, metric, show
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Bar | None = None
        self.best: float | None = None

    def say(self, words: str) -> None:
        """A line."""
        if self.show:
            self.console.print(words, markup=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, where a resumed run had got to."""
        self.best = state.best_metric
        if self.show and state.is_world_process_zero:
            self.bar = Bar(
                TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
                TextColumn("{task.description}"), console=self.console,
            )  # fmt: skip
            self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.update(self.bar.task_ids[0], description=f"loss {float(logs['loss']):.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """A line for the score, and the log to disk."""
        found = metrics.get(f"eval_{self.metric}")
        if found is None or not state.is_world_process_zero:
            return
        is_best = self.best is None or (found > self.best if higher_is_better(self.metric) else found < self.best)
        self.best = found if is_best else self.best
        if self.bar is not None:
            name = self.metric.replace("_", " ")
            mark = "  best so far" if is_best else ""
            loss = "" if self.metric == "loss" else f", loss {metrics['eval_loss']:.4f}"
            self.say(f"epoch {state.epoch:.2f}, step {state.global_step}: {name} {found:.4f}{loss}{mark}")
        self.folder.write_json("metrics.json", state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the bar away."""
        self.stop()

    def stop(self) -> None:
        """Take the bar away, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
