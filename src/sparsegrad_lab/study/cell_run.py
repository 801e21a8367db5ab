"""Does one run of a grid in a process of its own: what kills it does not kill the study, and its memory is its own."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import yaml

from ..run.exit_codes import status_of
from ..run.folder import RunFolder
from ..run.machine import environment
from ..run.settings import RunArguments
from ..run.whole_files import write_whole
from .experiment import Cell
from .locks import BEAT, Attempt
from .stored_results import adapter_config

logger = logging.getLogger(__name__)


def run_in_process(
    arguments: RunArguments, threads: int | None, attempt: Attempt, then: Sequence[str] | None = None
) -> dict[str, Any]:
    """Run `sparsegrad train`; its output goes into a log beside the run folder.

    Args:
        arguments: settings of one seed; `output` is the run folder.
        threads: of PyTorch; None: its own choice.
        attempt: hears of the process and that it is alive.
        then: arguments of `sparsegrad` for what is done with the weights before they are removed; None: nothing.

    Returns:
        The run's result, or a record of its failure. The weights are removed.

    Raises:
        OSError: the run ended because the disk is full, as the next one would.
    """
    output = Path(arguments.output)
    config, log = output.with_name(f"{output.name}.yaml"), output.with_name(f"{output.name}.log")
    write_whole(config, yaml.safe_dump(arguments.as_dict(), sort_keys=False))
    command = ["train", "--config", str(config)]
    shown = shlex.join(["sparsegrad", *command])
    with log.open("w", encoding="utf-8") as stream:
        code = _run(command, stream, threads, attempt)
        if code == 0 and then is not None:
            code = _run(then, stream, threads, attempt)
    if code == 0:
        for weights in ("adapter", "model", "tokenizer", "processor"):
            shutil.rmtree(output / weights, ignore_errors=True)
        return {**RunFolder(output).read_result(), "status": "finished", "command": shown}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if lines and os.strerror(errno.ENOSPC) in lines[-1]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(output))
    return {
        "status": status_of(code), "error": lines[-1] if lines else f"exit code {code}", "task": arguments.task,
        "method": arguments.method, "model": arguments.model, "seed": arguments.seeds[0],
        "learning_rate": arguments.learning_rate, "config": arguments.as_dict(),
        "environment": {**environment(), "seed": arguments.seeds[0]}, "command": shown,
    }  # fmt: skip


def _run(command: Sequence[str], stream: IO[str], threads: int | None, attempt: Attempt) -> int:
    """Run a verb of `sparsegrad` in a process, and return its exit code."""
    variables = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    process = subprocess.Popen(
        [sys.executable, "-m", "sparsegrad_lab.cli.main", *command], stdout=stream, stderr=stream, env=variables
    )
    try:
        attempt.add_process(process.pid)
        return _wait(process, attempt)
    except BaseException:  # an interrupt stops the run as well; its folder keeps the checkpoints
        process.terminate()
        process.wait()
        raise


def _wait(process: subprocess.Popen[bytes], attempt: Attempt) -> int:
    while process.poll() is None:
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=BEAT)
        try:
            attempt.beat()
        except Exception as error:  # other machines wait for ten minutes; a shorter outage costs nothing
            logger.warning("the database of the study does not answer (%s); the run goes on", type(error).__name__)
    return int(process.returncode)


def describe(cell: Cell, arguments: RunArguments, attempts: int) -> dict[str, Any]:
    """What a result file says about the experiment, so that a report does not need the experiment's own file."""
    config = adapter_config(arguments.method)
    return {
        "experiment": cell.experiment.name,
        "scale": cell.experiment.scale,
        "variant": cell.method,
        "trial": cell.trial is not None,
        "attempts": attempts,
        "about": {
            "title": cell.experiment.title,
            "question": cell.experiment.question,
            "baseline": cell.experiment.baseline,
            "words": cell.variant.words,
            "scored": cell.experiment.scored,
            "own": cell.experiment.own,
        },
        **({} if config is None else {"adapter_config": config}),
    }
