"""Runs slow steps of a start, and answers signals and requests meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Callable
from selectors import DefaultSelector
from typing import TypeVar

from steer.control.protocol import Request
from steer.guard.requests import Connection, StandbyServer
from steer.linux import signals

_LOOK_S = 0.05
_LAST_S = 0.0
T = TypeVar("T")


def run_answering(act: str, do: Callable[[], T], control: socket.socket | None = None) -> T:
    """Call `do` in a thread of its own, and return its result or raise its error.

    Args:
        act: what `do` does, in words, for answers.
        control: the control socket, if there is one already. The request `stop` ends this process;
            any other request is answered by asking the client to try again.

    Raises:
        NoThread: no thread can be started.
        SystemExit: a signal or a request ends this process. The thread is not waited for.
    """
    from steer.linux import threads

    outcome: list[Callable[[], T]] = []

    def call() -> None:
        try:
            value = do()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failed = error  # Python deletes `error` at the end of this block
            outcome.append(lambda: _raise(failed))
        else:
            outcome.append(lambda: value)

    thread = threads.start(call)
    thread.join(_LOOK_S)  # usually `do` is quick
    with DefaultSelector() as selector:
        server = None
        try:
            while thread.is_alive():
                if server is None and control is not None:
                    server = StandbyServer(
                        control, selector, lambda *told: _answer(act, *told), _refusal
                    )
                for key, _ in selector.select(0):
                    key.data()
                if server is not None:
                    server.let_go()
                signals.pause(0)
                thread.join(_LOOK_S)
        finally:
            if server is not None:
                server.close(_LAST_S)
    return outcome[0]()


def _raise(error: BaseException) -> T:  # type: ignore[type-var]
    raise error


def _answer(act: str, request: Request, connection: Connection) -> None:
    """Answer a request. Raises SystemExit: the request is `stop`."""
    command = request.get("command")
    if command == "stop":
        connection.answer({"ok": True})
        raise SystemExit(0)
    # A client that asks for the status gets this answer now; any other client is to ask again.
    connection.answer({**_refusal(f"it is starting: {act}"), "again": command != "status"})


def _refusal(why: str) -> dict[str, object]:
    return {"ok": False, "error": why}
