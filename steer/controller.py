"""The controller: one parent process that steers, and never touches a connection.

It carries out a plan step by step and undoes what it did in reverse. When the last
step is done workers are running, and `supervisor` looks after them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress

from steer import ladder
from steer.errors import AppLoadError, ConfigError, KernelError
from steer.fleet import Fleet
from steer.kernel import process, rundir, sockets
from steer.kernel.guard import Guard
from steer.log import Log
from steer.notify import Listener
from steer.plan import Act, Plan, Seat, Step
from steer.steering import Steering, open_backend
from steer.worker import Launch


def run(plan: Plan, environment: Mapping[str, str], log: Log) -> int:
    """Run a service until it is told to end.

    Returns:
        The exit status.

    Raises:
        SteerError: it could not be started.
    """
    # From here on a signal waits until the loop can take it.
    process.hold_signals()
    with ExitStack() as undo:
        started = Controller(plan, environment, log, undo)
        for step in plan.steps():
            _CARRY_OUT[step.act](started, step)
        # Only now, as it takes long to import: the workers are already starting.
        from steer.supervisor import supervise

        supervise(started)
    log.info("ended")
    return 0


def rehearse(plan: Plan, environment: Mapping[str, str]) -> None:
    """Try all of a plan that changes nothing.

    Raises:
        SteerError: what `run` would end with.
    """
    import shutil

    service = plan.service
    process.identity(service.user, service.group)
    if service.chdir is not None and not os.path.isdir(service.chdir):
        raise AppLoadError(f"chdir {service.chdir}", "no such directory")
    if service.command and shutil.which(service.command[0]) is None:
        raise AppLoadError(f"run {service.command[0]}", "no such command")
    rundir.refuse_taken(plan.name, service.control_socket, environment)
    backend, _ = first_that_holds(plan, lambda _: None)
    backend.close()
    for bind in plan.binds:
        sockets.check_free(bind)


def first_that_holds(plan: Plan, warn: Callable[[str], None]) -> tuple[Steering, ladder.Rung]:
    """Open the first rung that holds; each that does not leaves its reason with the next.

    Raises:
        FallbackRefused: --strict, and none but a fallback holds.
    """
    failed: list[tuple[str, KernelError]] = []
    for rung in plan.rungs:
        for backend, error in failed:
            rung = ladder.after(rung, backend, str(error))
        ladder.choose(rung, plan.service.strict)
        try:
            return open_backend(rung.backend, plan), rung
        except KernelError as error:
            failed.append((rung.backend, error))
            if error.detail:
                warn(f"{error}\n{error.detail}")
    raise AssertionError("the kernel's own hash always holds")


class Controller:
    """One service, as far as it is started.

    Args:
        undo: what to undo, in reverse, at the end or when a step fails.
    """

    generation = 1

    def __init__(
        self, plan: Plan, environment: Mapping[str, str], log: Log, undo: ExitStack
    ) -> None:
        self.plan = plan
        self.environment = environment
        self.log = log
        self.started_s = time.monotonic()
        self.rung: ladder.Rung
        self.claim: rundir.Claim
        self.steering: Steering
        self.fleet: Fleet
        self.listener: Listener
        self._undo = undo
        self._identity = process.identity(plan.service.user, plan.service.group)
        self._files = process.allow_descriptors(plan.descriptors)

    def _claim_name(self, _step: Step) -> None:
        service = self.plan.service
        self.claim = rundir.Claim(self.plan.name, service.control_socket, self.environment)
        self._undo.callback(self.claim.release)
        if self.claim.refusals:
            places = "; ".join(self.claim.refusals)
            self.log.info("control socket %s, as not at %s", self.claim.path, places)
        if service.pid:
            self._undo.callback(_write_pid(service.pid))

    def _check_free(self, step: Step) -> None:
        for bind in self.plan.binds:
            if bind.label == step.object:
                sockets.check_free(bind)

    def _load(self, _step: Step) -> None:
        self.steering, rung = first_that_holds(self.plan, self.log.warning)
        self._undo.callback(self.steering.close)
        self.rung = rung

    def _announce(self) -> None:
        plan, rung = self.plan, self.rung
        count = len(plan.seats)
        self.log.info("%s: %d workers, %s on %s", plan.name, count, plan.policy.name, rung.backend)
        if rung.reason:
            self.log.warning("not higher up the ladder: %s", rung.reason)
        if rung.fallback:
            self.log.info("ebpf would add: %s", ladder.EBPF_ADDS)

    def _start_workers(self, _step: Step) -> None:
        self._announce()
        users = {0, os.geteuid(), self._identity.uid or 0}
        self.listener = Listener(frozenset(users))
        self._undo.callback(self.listener.close)
        try:
            guard = Guard(self.plan.service.graceful_timeout)
        except OSError as error:
            raise process.fork_error(error) from None
        self._undo.callback(guard.close)
        plan = self.plan
        self.fleet = Fleet(plan.seats, plan.slots, self.steering, guard, self._launch, self.log)
        self._undo.callback(self.fleet.abandon)
        self.fleet.start(self.claim.others_may_start)

    def _launch(self, seat: Seat, slot: int) -> Launch:
        return Launch(
            self.plan.service,
            self.plan.name,
            self.plan.binds,
            seat,
            slot,
            self.generation,
            self._identity,
            self.listener.address,
            self._files,
            os.getpid(),
        )


_CARRY_OUT: dict[Act, Callable[[Controller, Step], None]] = {
    Act.CLAIM: Controller._claim_name,
    Act.CHECK_FREE: Controller._check_free,
    Act.LOAD: Controller._load,
    Act.START: Controller._start_workers,
}


def _write_pid(path: str) -> Callable[[], None]:
    """Write our process id; the result removes the file if it is still ours.

    Raises:
        ConfigError: it cannot be written, or a living process is in it.
    """
    act = f"write pid file {path}"
    own = f"{os.getpid()}\n"
    try:
        with suppress(FileNotFoundError, ValueError):
            holder = int(_read(path))
            # In a container we may well have the number we had the last time.
            if holder != os.getpid() and process.is_running(holder):
                raise ConfigError(act, f"it names a running process, {holder}", "stop that first")
        with open(path, "w") as stream:
            stream.write(own)
    except OSError as error:
        raise ConfigError(act, error.strerror or str(error), "name another: --pid FILE") from None

    def remove() -> None:
        with suppress(OSError):
            if _read(path) == own:
                os.unlink(path)

    return remove


def _read(path: str) -> str:
    with open(path) as stream:
        return stream.read()
