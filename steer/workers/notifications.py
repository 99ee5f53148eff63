"""Handles what processes of workers send by sd_notify(3), and finds the worker that sent it."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence

from steer.config import servers
from steer.control import notification_buffer, notify
from steer.control.notify import IgnoredReady
from steer.linux import family, processes
from steer.linux.waiting import Seen
from steer.workers.clock import Clock
from steer.workers.handle import WorkerHandle, WorkerHandles, waits
from steer.workers.lifecycle import Event, State
from steer.workers.process import WorkerProcess
from steer.workers.selection import Selection


class Notifications:
    """Finds the worker that sent a notification, and reports what it says.

    Args:
        workers: all workers.
        ignored_ready: logs each READY=1 that no worker sent.
        report: called with a worker and the event that its notification means.
        changed: called with a worker that asks to be treated as hung, or to be replaced.
    """

    def __init__(
        self,
        workers: WorkerHandles,
        clock: Clock,
        ignored_ready: IgnoredReady,
        report: Callable[[WorkerHandle, Event], None],
        changed: Callable[[WorkerHandle], None],
    ) -> None:
        self._workers = workers
        self._clock = clock
        self._ignored_ready = ignored_ready
        self._report = report
        self._changed = changed

    def take(self, lineage: Sequence[int], message: Mapping[str, str]) -> None:
        """Handle a message that a process sent.

        Args:
            lineage: the sender, its parent and so on: see `notification_buffer.lineage`.
        """
        senders = self._senders(lineage, message)
        for worker in senders:
            if worker.process:
                self._handle(worker, worker.process, lineage[0], message)
        is_unknown = not senders and notify.is_ready(message)
        if is_unknown and any(worker.state is State.STARTING for worker in self._workers):
            self._ignored_ready.log(lineage[0], *_why_unknown(lineage))

    def _senders(
        self, lineage: Sequence[int], message: Mapping[str, str]
    ) -> Collection[WorkerHandle]:
        """The worker whose process sent the message. If the sender's parent has ended, the sender
        has become a child of the controller. Then it may belong to any worker that is starting, so
        the worker is known only if one is starting.

        Returns:
            No worker or one; or several, of which one sent the message and the others are about to
            send the same.
        """
        known = next((found for pid in lineage if (found := self._workers.of_pid(pid))), None)
        if known is not None or not notify.is_ready(message):
            return [known] if known else []
        is_ours = lineage[0] == os.getpid()
        starting = {
            pid: each for pid, each in self._workers.by_pid.items() if each.state is State.STARTING
        }
        telling = _say_ready_for_us(starting) if is_ours else {}
        if telling:
            return telling.values()
        is_one = len(starting) == 1 and (is_ours or _is_orphan(lineage))
        return starting.values() if is_one else []

    def _handle(
        self, worker: WorkerHandle, process: WorkerProcess, sender: int, message: Mapping[str, str]
    ) -> None:
        worker.store_notification(message, self._clock.now_s())
        if worker.has_triggered_watchdog or worker.asks_replacement:
            self._changed(worker)
        if message.get("STOPPING") == "1":
            self._report(worker, Event.LEAVES)
        if message.get("READY") == "1" and worker.state is State.STARTING:
            worker.says_ready = True
            arguments = processes.arguments(sender) or process.launch.service.command
            too_early = servers.says_ready_early(arguments)
            if not too_early or waits(process) is Seen.YES:
                self._report(worker, Event.READY)


def serve_early(pid: int, workers: WorkerHandles, selection: Selection) -> bool:
    """Select the worker with this process, which is ready before the event loop runs, and no other.
    This is done only for a worker that calls the application, and for no spare. `Notifications` has
    to get the message again once the loop runs.

    Returns:
        Whether the worker is selected.
    """
    worker = workers.of_pid(pid)
    if worker is None or worker.spec.is_spare:
        return False
    if not worker.process or not worker.process.is_callable:
        return False
    with selection.naming_locked():
        selection.backend.steer([worker.member()])
    if selection.backend.backup:
        selection.backend.backup.empty()
    return True


def _say_ready_for_us(starting: Mapping[int, WorkerHandle]) -> Mapping[int, WorkerHandle]:
    """The starting workers with an orphaned systemd-notify(1) that sends READY=1. If permitted,
    systemd-notify sends in the name of its parent, and the parent of an orphan is the controller.

    Args:
        starting: the starting workers, by the process id of the first process.
    """
    telling = (notification_buffer.lineage(pid) for pid in family.orphans() if _says_ready(pid))
    whose = {pid for lineage in telling for pid in lineage}
    return {pid: worker for pid, worker in starting.items() if pid in whose}


def _says_ready(pid: int) -> bool:
    """Whether a process is a systemd-notify(1) that sends READY=1, or has sent it: a zombie has no
    arguments any more."""
    words = processes.arguments(pid)
    return "--ready" in words or (words == [""] and processes.command(pid) == "systemd-notify")


def _is_orphan(lineage: Sequence[int]) -> bool:
    """Whether the sender's parent had ended, so that the controller had become its parent."""
    return len(lineage) > 1 and lineage[1] == os.getpid()


def _why_unknown(lineage: Sequence[int]) -> tuple[str, str]:
    """Why the worker that sent a notification is not known, and what would help."""
    cure = "let the worker itself send it, or a child of its that it waits for"
    if lineage[0] == os.getpid():
        return "it was sent in the name of its sender's parent, and that has ended", cure
    if _is_orphan(lineage):
        return "its parent has ended, and nothing tells whose it is", cure
    if len(lineage) < 2:
        return "it had ended before its message was read", f"{cure}, without --no-block"
    return "it is no process of a worker", cure
