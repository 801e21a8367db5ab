"""What a run prints while it trains, and the log that it keeps."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import Progress
from transformers import TrainerCallback

from ..tasks.task import display_name, higher_is_better
from .folder import RunFolder
from .processes import is_rank0
from .progress_bar import make_progress_bar


class ProgressCallback(TrainerCallback):
    """Shows a bar over the steps and a line per evaluation, and keeps `metrics.json` up to date.

    Args:
        folder: of the run.
        metric: the score to print, without "eval_".
        show: print and show the bar, on rank 0.
    """

    def __init__(self, folder: RunFolder, metric: str = "loss", show: bool = True) -> None:
        self.folder, self.metric, self.show = folder, metric, show and is_rank0()
        self.console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
        self.bar: Progress | None = None
        self.best: float | None = None

    def say(self, line: str) -> None:
        """Print a line."""
        if self.show:
            self.console.print(line, markup=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar, at the step that a resumed run has reached."""
        self.best = state.best_metric
        if self.show and state.is_world_process_zero:
            self.bar = make_progress_bar(self.console)
            self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss."""
        if self.bar is not None and logs and "loss" in logs:
            self.bar.update(self.bar.task_ids[0], description=f"training, loss {float(logs['loss']):.3f}")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any], **kwargs: Any) -> None:
        """Print the score, and write the log."""
        score = metrics.get(f"eval_{self.metric}")
        if score is None or not state.is_world_process_zero:
            return
        is_best = self.best is None or (score > self.best if higher_is_better(self.metric) else score < self.best)
        self.best = score if is_best else self.best
        if self.bar is not None:
            name = display_name(self.metric)
            best = "  best so far" if is_best else ""
            loss = "" if self.metric == "loss" else f", loss {metrics['eval_loss']:.4f}"
            self.say(f"epoch {state.epoch:.2f}, step {state.global_step}: {name} {score:.4f}{loss}{best}")
        self.folder.write_json("metrics.json", state.log_history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the bar."""
        self.stop()

    def stop(self) -> None:
        """Remove the bar, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
