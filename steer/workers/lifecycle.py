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
    DRAINING = "draining"
    HUNG = "hung"
    STOPPING = "stopping"
    BACKOFF = "backoff"
    GONE = "gone"


class Event(Enum):
    READY = "it can serve"
    EXITED = "its process ended"
    LATE = "not ready within ready_timeout: killed"
    DRAIN = "it is to get nothing new"
    UNDRAIN = "it may get connections again"
    STUCK = "connections wait and it takes none, or it missed its watchdog"
    BACK = "it waits for connections again"
    RETIRE = "it is no longer wanted; others serve on"
    DRAINED = "nothing waits for it any more"
    STOP = "the service ends"
    OVERDUE = "not finished in its time: killed"
    RETRY = "its time to back off is over"


class Command(Enum):
    ACTIVATE = "put it into the table"
    DEACTIVATE = "take it out of the table"
    MIGRATE_QUEUE = "move what waits for it to others"
    DRAIN = "wait until nothing waits for it"
    TERMINATE = "tell it to finish"
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
        E.RETIRE: (S.STOPPING, (C.TERMINATE,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.READY: {
        E.EXITED: (S.BACKOFF, (C.DEACTIVATE, C.BACK_OFF)),
        E.DRAIN: (S.DRAINING, (C.DEACTIVATE,)),
        # Out of the table before its queue is moved, or that would come back to it.
        E.STUCK: (S.HUNG, (C.DEACTIVATE, C.MIGRATE_QUEUE)),
        # Out of the table first, or its last connections would come after the signal.
        E.RETIRE: (S.STOPPING, (C.DEACTIVATE, C.DRAIN)),
        E.STOP: (S.STOPPING, (C.DEACTIVATE, C.TERMINATE)),
    },
    S.DRAINING: {
        E.UNDRAIN: (S.READY, (C.ACTIVATE,)),
        E.EXITED: (S.BACKOFF, (C.BACK_OFF,)),
        E.RETIRE: (S.STOPPING, (C.DRAIN,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.HUNG: {
        E.BACK: (S.READY, (C.ACTIVATE,)),
        E.DRAIN: (S.DRAINING, ()),
        E.EXITED: (S.BACKOFF, (C.BACK_OFF,)),
        # What was busy and not hung finishes what it has; it is killed no sooner than others.
        E.RETIRE: (S.STOPPING, (C.DRAIN,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.STOPPING: {
        E.DRAINED: (S.STOPPING, (C.TERMINATE,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
        E.OVERDUE: (S.STOPPING, (C.KILL,)),
        E.EXITED: (S.GONE, (C.FORGET,)),
    },
    S.BACKOFF: {
        E.RETRY: (S.STARTING, (C.SPAWN,)),
        E.RETIRE: (S.GONE, (C.FORGET,)),
        E.STOP: (S.GONE, (C.FORGET,)),
    },
    S.GONE: {},
}


def step(state: State, event: Event) -> Step:
    """What happens next; an event that means nothing in a state changes nothing."""
    return TRANSITIONS[state].get(event, (state, ()))


STABLE_S = 10.0
"""A worker that served this long is not in a crash loop."""
_LONGEST_S, _LONGEST_WHEN_SERVED_S = 30.0, 1.0


def backoff_s(failures: int, served: bool) -> float:
    """How long to wait before the next start, after so many failures in a row.

    The first restart is at once: most crashes are not loops. One that could serve is
    never missed for long, whatever keeps killing it.
    """
    longest_s = _LONGEST_WHEN_SERVED_S if served else _LONGEST_S
    return 0.0 if failures <= 1 else min(longest_s, 0.25 * 2.0 ** min(failures - 2, 7))
