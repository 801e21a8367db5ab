"""Whether a process still runs."""

from __future__ import annotations

import subprocess
import sys
import time

from sparsegrad_lab.run.process_identity import is_alive, process_identity


def test_a_process_that_has_ended_is_not_alive() -> None:
    """Also while nobody has collected it: in a container, that may be for ever."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    marked = process_identity(process.pid)
    assert is_alive(marked)
    host, number, start = marked.split(":")
    assert not is_alive(f"{host}:{number}:{float(start) - 60:.2f}")  # another one had its number before
    process.kill()
    deadline = time.monotonic() + 30
    while is_alive(marked) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(marked)
    assert process.returncode is None  # a zombie until then
    process.communicate()
    assert not is_alive(marked)
    assert not is_alive(process_identity(process.pid))
    assert is_alive(process_identity())
