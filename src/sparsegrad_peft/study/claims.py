"""Who runs what: several processes, or machines that share a database, work off one grid without doing a run twice."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from itertools import count
from typing import Any

from ..run.search import is_alive


class Claims:
    """A claim is an Optuna study of its own: making one that is there already fails, at once and for all but one.

    A run that was cut off (its processes are gone) can be claimed again, as the next attempt; one of another machine
    cannot be looked into, and counts as under way.

    Args:
        storage: Optuna's, a URL such as postgresql://..., or a storage object.
    """

    def __init__(self, storage: Any) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.storage = _opened(storage)

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
            study.set_user_attr("host", socket.gethostname())
            study.set_user_attr("processes", [os.getpid()])
            return attempt
        raise AssertionError("unreachable")

    def add_process(self, name: str, attempt: int, process: int) -> None:
        """A process that does the claimed run: it may outlive this one."""
        self._study(name, attempt).set_user_attr("processes", [os.getpid(), process])

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
        if attributes.get("result") or "processes" not in attributes:  # without: it is being claimed this very moment
            return True
        here = attributes["host"] == socket.gethostname()
        return not here or any(process == os.getpid() or is_alive(process) for process in attributes["processes"])


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
