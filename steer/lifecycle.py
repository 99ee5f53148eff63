"""The life of a worker: state × event → next state and commands. Pure.

May live here: what follows from what. May not: clocks, processes, sockets. The
controller reports events and carries the commands out.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    STARTING = "starting"
    READY = "ready"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    GONE = "gone"


class Event(Enum):
    READY = "it can serve"
    EXITED = "its process ended"
    LATE = "not ready within ready_timeout: killed"
    STOP = "it is no longer wanted"
    OVERDUE = "not finished in its time: killed"
    RETRY = "its time to back off is over"


class Command(Enum):
    ACTIVATE = "put it into the table"
    DEACTIVATE = "take it out of the table"
    TERMINATE = "send SIGTERM"
    KILL = "send SIGKILL"
    BACK_OFF = "start another after a while"
    SPAWN = "start a process"
    FORGET = "drop it from the service"


S, E, C = State, Event, Command
Step = tuple[State, tuple[Command, ...]]

TRANSITIONS: Mapping[State, Mapping[Event, Step]] = {
    S.STARTING: {
        E.READY: (S.READY, (C.ACTIVATE,)),
        E.LATE: (S.STARTING, (C.KILL,)),
        E.EXITED: (S.BACKOFF, (C.BACK_OFF,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.READY: {
        E.EXITED: (S.BACKOFF, (C.DEACTIVATE, C.BACK_OFF)),
        # Out of the table first, or its last connections would come after the signal.
        E.STOP: (S.STOPPING, (C.DEACTIVATE, C.TERMINATE)),
    },
    S.STOPPING: {
        E.OVERDUE: (S.STOPPING, (C.KILL,)),
        E.EXITED: (S.GONE, (C.FORGET,)),
    },
    S.BACKOFF: {
        E.RETRY: (S.STARTING, (C.SPAWN,)),
        E.STOP: (S.GONE, (C.FORGET,)),
    },
    S.GONE: {},
}


def step(state: State, event: Event) -> Step:
    """What happens next; an event that means nothing in a state changes nothing."""
    return TRANSITIONS[state].get(event, (state, ()))


STABLE_S = 10.0
"""A worker that served this long is not in a crash loop."""


def backoff_s(failures: int) -> float:
    """How long to wait before the next start, after so many failures in a row.

    The first restart is at once: most crashes are not loops.
    """
    return 0.0 if failures <= 1 else min(30.0, 0.25 * 2.0 ** min(failures - 2, 7))
