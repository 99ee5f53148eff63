"""What an application looks like that is no callable for a worker, and how to run it. Pure.

Judged by signatures alone: ASGI (https://asgi.readthedocs.io, "Applications") and WSGI (PEP 3333).
Whatever can be called with one argument is let run, unless calling it would run nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

_ASGI = "run a server for it: steer run ... -- uvicorn {app} --fd {{fd}}"
_ASGI_FACTORY = "run a server for it: steer run ... -- uvicorn --factory {app} --fd {{fd}}"
_WSGI = "run a server for it: steer run ... -- gunicorn -w 1 {app}"
_FACTORY = (
    "if it returns an application, run a server: steer run ... -- gunicorn -w 1 '{app}()', "
    "or for ASGI: steer run ... -- uvicorn --factory {app} --fd {{fd}}"
)
_WORKER = "give a function that takes one argument, the worker; see examples/"
_AWAIT = "give a plain function that calls asyncio.run(...)"
_ITERATE = "give a plain function, without yield"


def why_not(found: Callable[..., object], app: str) -> str:
    """Why an object cannot be called with a worker, and what to type instead; "" if it can, or
    if its signature does not tell.

    Args:
        app: its name, MODULE:CALLABLE.
    """
    try:
        looks, cure = _judge(found)
    # An object of the user's may do anything when it is looked at: its call will show.
    except Exception:  # noqa: BLE001
        return ""
    return f"{looks}; {cure.format(app=app)}" if looks else ""


def _judge(found: Callable[..., object]) -> tuple[str, str]:
    """What it looks like, and the cure; twice "" if it can be called.

    Raises:
        TypeError, ValueError: it has no signature.
    """
    if inspect.isclass(found):
        return _judge_class(found)
    takes, waits = _takes(found), _is_async(found)
    if waits and takes(3):
        return "it looks like an ASGI 3 application (scope, receive, send)", _ASGI
    if takes(1):
        return _judge_call(found, waits)
    if takes(3):
        return "it looks like an ASGI 3 application (scope, receive, send)", _ASGI
    if takes(2) and not waits:
        return "it looks like a WSGI application (environ, start_response)", _WSGI
    if takes(0):
        return "it takes no argument, so no worker", _FACTORY
    return f"it takes {inspect.signature(found)}, not one argument", _WORKER


def _judge_call(found: Callable[..., object], waits: bool) -> tuple[str, str]:
    """Of what takes one argument: whether its code runs when it is called."""
    if waits:
        return "it is a coroutine function, which nobody would await", _AWAIT
    if inspect.isgeneratorfunction(_code(found)):
        return "it is a generator function, which nobody would iterate", _ITERATE
    return "", ""


def _judge_class(found: type) -> tuple[str, str]:
    takes = _takes(found)
    call = inspect.getattr_static(found, "__call__")
    instances_wait = inspect.iscoroutinefunction(call)
    if instances_wait and takes(1) and _takes(call)(3):  # with self
        return "it looks like an ASGI 2 application, a class of (scope)", _ASGI
    if instances_wait and takes(0) and _takes(call)(4):
        return "it is a class of ASGI 3 applications, not one of them", _ASGI_FACTORY
    if takes(1):
        return "", ""
    if takes(2):
        return "it looks like a WSGI application, a class of (environ, start_response)", _WSGI
    return "it is a class that does not take one argument", _WORKER


def _takes(found: Callable[..., object]) -> Callable[[int], bool]:
    """Whether it can be called with so many arguments by position."""
    signature = inspect.signature(found)

    def takes(count: int) -> bool:
        try:
            signature.bind(*[None] * count)
        except TypeError:
            return False
        return True

    return takes


def _is_async(found: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(found) or inspect.iscoroutinefunction(_code(found))


def _code(found: Callable[..., object]) -> Callable[..., object]:
    """What is executed when it is called: of an object, its class's __call__."""
    is_function = inspect.isroutine(found) or hasattr(found, "func")
    return found if is_function else type(found).__call__
