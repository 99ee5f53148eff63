"""Recognizes objects that steer cannot call as a worker, and says how to run them. Pure.

Only signatures are judged, by what ASGI (https://asgi.readthedocs.io, "Applications") and WSGI
(PEP 3333) define. An object that takes one argument is accepted, unless a call would run none of
its code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

_ASGI = "run a server for it: steer run ... -- uvicorn {app} --fd {{fd}}"
_ASGI_UNSEEN = "run a server for it: steer run ... -- uvicorn --interface asgi3 {app} --fd {{fd}}"
_ASGI_FACTORY = "run a server for it: steer run ... -- uvicorn --factory {app} --fd {{fd}}"
_WSGI = "run a server for it: steer run ... -- gunicorn -w 1 {app}"
_WSGI_DOTTED = "run a server for it: steer run ... -- hypercorn {app} --bind fd://{{fd}}"
"""For `module:a.b`: gunicorn does not import an attribute of an attribute."""
_FACTORY = (
    "if it returns an application, run a server: steer run ... -- gunicorn -w 1 '{app}()', "
    "or for ASGI: steer run ... -- uvicorn --factory {app} --fd {{fd}}"
)
_AIOHTTP = (
    "run a server for it: "
    "steer run ... -- gunicorn -w 1 --worker-class aiohttp.GunicornWebWorker {app}"
)
_WORKER = "give a function that takes one argument, the worker; see examples/"
_SOCKETS = (
    "give a function of the worker, that has a server listen on worker.sockets; see examples/"
)
_AWAIT = "give a plain function that calls asyncio.run(...)"
_ITERATE = "give a plain function, without yield"


def why_not(found: Callable[..., object], app: str) -> str:
    """Why an object cannot be called with a worker, and what to type instead; "": it can be, or its
    signature does not show whether it can be.

    Args:
        app: its name, MODULE:CALLABLE.
    """
    try:
        looks, cure = _judge(found)
    # Reading the attributes of a user's object may run any code. If that fails, call the object and
    # let the call report the error.
    except Exception:  # noqa: BLE001
        return ""
    if cure == _WSGI and "." in app.partition(":")[2]:
        cure = _WSGI_DOTTED
    return f"{looks}; {cure.format(app=app)}" if looks else ""


def _judge(found: Callable[..., object]) -> tuple[str, str]:
    """What an object looks like, and how to run it; both are "" if it can be called with a worker.

    Raises:
        TypeError, ValueError: the object has no signature.
    """
    if inspect.isclass(found):
        return _judge_class(found)
    takes, waits = _takes(found), _is_async(found)
    asgi3 = "it looks like an ASGI 3 application (scope, receive, send)"
    if waits and takes(3):
        return asgi3, _ASGI if _uvicorn_sees(found) else _ASGI_UNSEEN
    if takes(1):
        return _judge_call(found, waits)
    if takes(3):
        return asgi3, _ASGI_UNSEEN
    if takes(2) and not waits:
        return "it looks like a WSGI application (environ, start_response)", _WSGI
    if type(found).__module__.startswith("aiohttp."):
        return "it looks like an application of aiohttp", _AIOHTTP
    if takes(0):
        return "it takes no argument, so no worker", _FACTORY
    return f"it takes {inspect.signature(found)}, not one argument", _WORKER


def _judge_call(found: Callable[..., object], waits: bool) -> tuple[str, str]:
    """As `_judge`, for an object that takes one argument: would a call run its code?

    Args:
        waits: whether it is a coroutine function.
    """
    if waits:
        return "it is a coroutine function, which nobody would await", _AWAIT
    if inspect.isgeneratorfunction(_code(found)):
        return "it is a generator function, which nobody would iterate", _ITERATE
    # The name of the only argument may show that it is not meant to be a worker.
    return _CALLED.get(" ".join(inspect.signature(found).parameters), ("", ""))


_CALLED = {
    "scope": ("it looks like an ASGI 2 application, a function of (scope)", _ASGI),
    "request": ("it looks like a handler of requests, a function of (request)", _SOCKETS),
}


def why_not_returned(returned: object, app: str) -> str:
    """Why a callable did not serve, and what to type instead, judged by what it returned; "": that
    shows nothing.

    Args:
        app: its name, MODULE:CALLABLE.
    """
    if inspect.iscoroutine(returned):
        returned.close()  # else Python warns that nobody awaited it
        return f"it returned a coroutine, which nobody awaits; {_AWAIT}"
    if inspect.isgenerator(returned):
        return f"it returned a generator, which nobody iterates; {_ITERATE}"
    if not callable(returned):
        return ""
    if _is_async(returned):
        return f"it returned what looks like an ASGI application; {_ASGI_FACTORY.format(app=app)}"
    return f"it returned a callable, which nobody calls; {_FACTORY.format(app=app)}"


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
    """A function that says whether `found` takes a number of positional arguments."""
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


def _uvicorn_sees(found: Callable[..., object]) -> bool:
    """Whether uvicorn recognizes it as ASGI 3 without --interface (uvicorn.config.Config.load)."""
    return inspect.iscoroutinefunction(found if inspect.isfunction(found) else type(found).__call__)


def _code(found: Callable[..., object]) -> Callable[..., object]:
    """The function that a call executes: for an instance, its class's __call__."""
    is_function = inspect.isroutine(found) or hasattr(found, "func")
    return found if is_function else type(found).__call__
