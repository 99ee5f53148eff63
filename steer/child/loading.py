"""Loads what a worker runs: a Python callable, a server with its application, or the demo.

This needs no socket, and may happen before the fork, once for many workers.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from steer.child import privileges
from steer.child.api import Worker
from steer.child.launch import Unloadable
from steer.config.service import Service

_OURS = os.path.dirname(__file__)


def import_for(service: Service) -> None:
    """Import the modules that only some workers need, as imports take time. This happens before the
    change of user, as another user may not be able to read the files."""
    if service.command:
        from steer.child import command  # noqa: F401

        return
    from steer.child import calling  # noqa: F401

    if not service.app:
        from steer.child import demo  # noqa: F401

        return
    from steer.config import applications  # noqa: F401

    if service.user is not None:
        import traceback  # noqa: F401


def load(service: Service) -> Callable[[Worker], object]:
    """Import the callable of the service, or the demo if it has none.

    Raises:
        Unloadable
    """
    if service.app is None:
        from steer.child import demo

        return demo.serve
    module_name, _, path = service.app.partition(":")
    try:
        if "" not in sys.path:
            sys.path.insert(0, os.getcwd())
        found: object = importlib.import_module(module_name)
        for name in path.removesuffix("()").split("."):
            found = getattr(found, name)
        if path.endswith("()"):
            found = found()  # type: ignore[operator]
    # An import runs the user's code, which may raise anything.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        known = _why_not_found(error, service)
        raise Unloadable(f"{in_words(error)}{known and '; '}{known}", where(error)) from None
    if not callable(found):
        raise Unloadable(f"{path} is not callable")
    if service.server is not None:
        return _load_server(found, service)
    from steer.config import applications

    if why := applications.why_not(found, service.app):
        raise Unloadable(why)
    return found


def _load_server(found: Callable[..., object], service: Service) -> Callable[[Worker], object]:
    """Have the server of the service serve an application. Raises Unloadable."""
    from steer.child.servers import adapters

    try:
        return adapters.load(found, service)
    except Unloadable:
        raise
    # A server checks the values of its options, and may raise anything.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        given = ", ".join(service.server_options)
        what = f"{service.server} with {given}" if given else service.server
        words = "it gave up" if isinstance(error, SystemExit) else in_words(error)
        raise Unloadable(f"{what}: {words}", where(error)) from None


def _why_not_found(error: BaseException, service: Service) -> str:
    """What may prevent our user from reading a module that seems to be missing."""
    if isinstance(error, ImportError | PermissionError):
        with suppress(OSError):  # the current directory was removed
            return privileges.described(privileges.to_imports(service))
    return ""


def in_words(error: BaseException) -> str:
    """An error as text. Its class may be the user's, and its __str__ may fail."""
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # noqa: BLE001
        return name


def where(error: BaseException) -> str:
    """The lines of the user's code that led to an error, without importlib's and steer's."""
    import traceback

    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "importlib" not in frame.filename and not frame.filename.startswith(_OURS)
    ]
    lines = [f"{frame.filename}:{frame.lineno}: {frame.line}" for frame in frames]
    if isinstance(error, SyntaxError):
        lines.append(f"{error.filename}:{error.lineno}: {(error.text or '').strip()}")
    return "\n".join(lines)
