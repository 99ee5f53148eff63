"""What may take long before a service has its loop: signals and requests are heard meanwhile."""

from __future__ import annotations

import socket
from collections.abc import Callable
from selectors import DefaultSelector
from typing import TypeVar

from steer.control.protocol import Request
from steer.guard.requests import Connection, StandbyServer
from steer.linux import fork

_LOOK_S = 0.05
_LAST_S = 0.0
T = TypeVar("T")


def while_heard(act: str, do: Callable[[], T], control: socket.socket | None = None) -> T:
    """What `do` returns or raises, called in a thread of its own.

    Args:
        act: in words, for who asks.
        control: the control socket, if there is one by now. `stop` ends us; whoever asks for
            anything else is told to ask again.

    Raises:
        SystemExit: a signal or a request says to end; `do` is not waited for.
    """
    import threading

    outcome: list[Callable[[], T]] = []

    def call() -> None:
        try:
            value = do()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            failed = error
            outcome.append(lambda: _raise(failed))
        else:
            outcome.append(lambda: value)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_LOOK_S)  # most often it was quick
    with DefaultSelector() as selector:
        desk = None
        try:
            while thread.is_alive():
                if desk is None and control is not None:
                    desk = StandbyServer(
                        control, selector, lambda *told: _answer(act, *told), _refusal
                    )
                for key, _ in selector.select(0):
                    key.data()
                if desk is not None:
                    desk.let_go()
                fork.pause(0)
                thread.join(_LOOK_S)
        finally:
            if desk is not None:
                desk.close(_LAST_S)
    return outcome[0]()


def _raise(error: BaseException) -> T:  # type: ignore[type-var]
    raise error


def _answer(act: str, request: Request, talk: Connection) -> None:
    """Raises SystemExit: that is what was asked for."""
    command = request.get("command")
    if command == "stop":
        talk.answer({"ok": True})
        raise SystemExit(0)
    # Who wants to know how it is is told at once.
    talk.answer({**_refusal(f"it is starting: {act}"), "again": command != "status"})


def _refusal(why: str) -> dict[str, object]:
    return {"ok": False, "error": why}
