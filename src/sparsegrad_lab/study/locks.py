"""Who runs what: several processes, or machines that share a database, work off one grid without doing a run twice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

from ..run.process_identity import is_alive, is_here, mark

BEAT = 60.0
"""Seconds between two signs of life of a claim."""

_SILENT = 10 * BEAT  # a machine that has not been heard of for so long has given up; clocks may differ by minutes
_BEGINNING = 30.0  # between the making of a claim and its maker's name lies a moment


class Claims:
    """A claim is an Optuna study of its own: making one that is there already fails, at once and for all but one.

    A run that was cut off can be claimed again, as the next attempt: on the same machine as soon as its processes are
    gone, from another one when its claim has shown no sign of life for ten minutes.

    Args:
        storage: Optuna's, a URL such as postgresql://..., or a storage object.
    """

    def __init__(self, storage: Any) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = _opened(storage)
        self._unnamed: dict[str, float] = {}

    def take(self, name: str) -> int:
        """Claim a run; returns which attempt this is, from 1 on, or 0 if it is another's."""
        import optuna

        for attempt in count(1):
            study_name = f"{name} ({attempt})"
            try:
                study = optuna.create_study(study_name=study_name, storage=self.storage)
            except optuna.exceptions.DuplicatedStudyError:
                if self._held(study_name):
                    return 0
                continue
            study.set_user_attr("seen", time.time())
            study.set_user_attr("processes", [mark()])
            return attempt
        raise AssertionError("unreachable")

    def add_process(self, name: str, attempt: int, process: int) -> None:
        """A process that does the claimed run: it may outlive this one."""
        self._study(name, attempt).set_user_attr("processes", [mark(), mark(process)])

    def beat(self, name: str, attempt: int) -> None:
        """A sign of life, for other machines."""
        self._study(name, attempt).set_user_attr("seen", time.time())

    def finish(self, name: str, attempt: int, result: dict[str, Any]) -> None:
        """Leave the result for those who do not share a disk."""
        self._study(name, attempt).set_user_attr("result", result)

    def release(self, name: str, attempt: int) -> None:
        """The run was interrupted and may be claimed again."""
        self._study(name, attempt).set_user_attr("processes", [])

    def forget(self, name: str) -> None:
        """A result that is not wanted any more: the run may be claimed again."""
        for study in self.storage.get_all_studies():
            if study.study_name.rpartition(" (")[0] == name:
                self.storage.set_study_user_attr(study._study_id, "result", None)
                self.storage.set_study_user_attr(study._study_id, "processes", [])

    def results(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names and results of what is finished."""
        for study in self.storage.get_all_studies():
            result = study.user_attrs.get("result")
            if result is not None:
                yield study.study_name.rpartition(" (")[0], result

    def _study(self, name: str, attempt: int) -> Any:
        import optuna

        return optuna.load_study(study_name=f"{name} ({attempt})", storage=self.storage)

    def _held(self, study_name: str) -> bool:
        """Whether it is finished or under way."""
        attributes = self.storage.get_study_user_attrs(self.storage.get_study_id_from_name(study_name))
        if attributes.get("result"):
            return True
        processes = attributes.get("processes")
        if processes is None:  # it is being claimed this very moment, or its maker was killed in that moment
            first = self._unnamed.setdefault(study_name, time.monotonic())
            return time.monotonic() - first < _BEGINNING
        if not processes:
            return False
        if is_here(processes[0]):
            return any(process == mark() or is_alive(process) for process in processes)
        return time.time() - float(attributes["seen"]) < _SILENT


def _opened(storage: Any, tries: int = 5) -> Any:
    """Optuna's storage. Of several processes that make the tables of an empty database at once, all but one fail."""
    import optuna
    from sqlalchemy.exc import DBAPIError

    try:
        return optuna.storages.get_storage(storage)
    except DBAPIError:
        if tries == 1:
            raise
    time.sleep(1)
    return _opened(storage, tries - 1)
