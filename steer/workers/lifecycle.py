"""The life of a worker: state × event → next state and commands. Pure.

This module decides; it has no clocks, processes or sockets. `transitions` reports the events and
carries out the commands.
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
    READY = "it is ready"
    EXITED = "its process ended"
    LATE = "not ready within ready_timeout: killed"
    DRAIN = "a drain is requested"
    LEAVES = "it says that it is about to exit (STOPPING=1)"
    UNDRAIN = "the drain is undone"
    STUCK = "it is hung: its accept queue is not draining, or it missed its watchdog"
    BACK = "it is no longer hung"
    RETIRE = "it is replaced, or no longer needed"
    DRAINED = "its accept queue is empty"
    STOP = "the service stops"
    OVERDUE = "not finished in time: killed"
    RETRY = "its backoff is over"


class Command(Enum):
    ACTIVATE = "put it into the table"
    DEACTIVATE = "take it out of the table"
    REPLACE = "put a spare into its place, if one is ready"
    MIGRATE_QUEUE = "migrate its accept queue"
    DRAIN = "wait until its accept queue is empty"
    TERMINATE = "tell it to finish"
    KILL = "send SIGKILL"
    BACK_OFF = "start it again after a backoff"
    SPAWN = "start a process"
    FORGET = "drop it from the pool"


S, E, C = State, Event, Command
Step = tuple[State, tuple[Command, ...]]

TRANSITIONS: Mapping[State, Mapping[Event, Step]] = {
    S.STARTING: {
        E.READY: (S.READY, (C.ACTIVATE,)),
        E.LATE: (S.STARTING, (C.KILL,)),
        E.EXITED: (S.BACKOFF, (C.REPLACE, C.BACK_OFF)),
        E.RETIRE: (S.STOPPING, (C.TERMINATE,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.READY: {
        E.EXITED: (S.BACKOFF, (C.DEACTIVATE, C.REPLACE, C.BACK_OFF)),
        E.DRAIN: (S.DRAINING, (C.DEACTIVATE,)),
        E.LEAVES: (S.DRAINING, (C.DEACTIVATE, C.REPLACE)),
        # It leaves the table before its queue is migrated, or connections would come back to it.
        E.STUCK: (S.HUNG, (C.DEACTIVATE, C.REPLACE, C.MIGRATE_QUEUE)),
        # It leaves the table first, or its last connections would come after the signal.
        E.RETIRE: (S.STOPPING, (C.DEACTIVATE, C.DRAIN)),
        E.STOP: (S.STOPPING, (C.DEACTIVATE, C.TERMINATE)),
    },
    S.DRAINING: {
        E.UNDRAIN: (S.READY, (C.ACTIVATE,)),
        E.EXITED: (S.BACKOFF, (C.REPLACE, C.BACK_OFF)),
        E.RETIRE: (S.STOPPING, (C.DRAIN,)),
        E.STOP: (S.STOPPING, (C.TERMINATE,)),
    },
    S.HUNG: {
        E.BACK: (S.READY, (C.ACTIVATE,)),
        E.DRAIN: (S.DRAINING, ()),
        E.LEAVES: (S.DRAINING, ()),
        E.EXITED: (S.BACKOFF, (C.REPLACE, C.BACK_OFF)),
        # It may have been busy rather than hung, so it gets the same time to finish as others.
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
    """The next state and the commands. An event without meaning in a state changes nothing."""
    return TRANSITIONS[state].get(event, (state, ()))


STABLE_S = 10.0
"""A worker that has served this long is not in a crash loop."""
_LONGEST_S, _LONGEST_WHEN_SERVED_S = 30.0, 1.0


def backoff_s(failures: int, served: bool) -> float:
    """How long to wait before the next start, after so many failures in a row.

    The first restart is immediate, as most crashes do not repeat. A worker that has served before
    is started again within a second, whatever kills it.
    """
    longest_s = _LONGEST_WHEN_SERVED_S if served else _LONGEST_S
    return 0.0 if failures <= 1 else min(longest_s, 0.25 * 2.0 ** min(failures - 2, 7))
