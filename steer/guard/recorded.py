"""The workers that the guard knows, in a file: all that tells of them should guard and controller
be killed."""

from __future__ import annotations

from pathlib import Path

from steer.control.record import Record, Worker


class RecordedWorkers:
    """Those of one service, by key.

    Args:
        control: path of the control socket; the file is beside it.
    """

    def __init__(self, control: Path) -> None:
        self._record = Record(control)
        self._known: dict[str, Worker] = {}
        self._unwritten: list[Worker] = []

    def add(self, key: str, worker: Worker) -> None:
        """It is in the file after `write`."""
        self._known[key] = worker
        self._unwritten.append(worker)

    def write(self) -> None:
        if self._unwritten:
            self._record.add(self._unwritten, self._known.values())
            self._unwritten = []

    def drop(self, key: str) -> None:
        self._known.pop(key, None)

    def renew_if_gone(self) -> None:
        """The file may have been removed, with its directory or by who cleans directories."""
        if not self._record.is_there:
            self._record.renew(self._known.values())

    def relocate(self, control: Path) -> None:
        """The control socket is another, and so is the file."""
        self._record = Record(control)
        self.renew_if_gone()
