"""The record of workers: a file that lists them, in case guard and controller are both killed."""

from __future__ import annotations

from pathlib import Path

from steer.control.record import Record, Worker


class RecordedWorkers:
    """The recorded workers of one service, by key.

    Args:
        control: path of the control socket. The file is beside it.
    """

    def __init__(self, control: Path) -> None:
        self._record = Record(control)
        self._known: dict[str, Worker] = {}
        self._unwritten: list[Worker] = []

    def add(self, key: str, worker: Worker) -> None:
        """Add a worker. `write` puts it into the file."""
        self._known[key] = worker
        self._unwritten.append(worker)

    def write(self) -> None:
        if self._unwritten:
            self._record.add(self._unwritten, self._known.values())
            self._unwritten = []

    def drop(self, key: str) -> None:
        self._known.pop(key, None)

    def renew_if_gone(self) -> None:
        """Write the file again if it was removed, for example with its directory."""
        if not self._record.is_there:
            self._record.renew(self._known.values())

    def relocate(self, control: Path) -> None:
        """Write the file beside a control socket with another path."""
        self._record = Record(control)
        self.renew_if_gone()
