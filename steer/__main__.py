"""The `steer` command, from its first instruction."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def main() -> None:
    """Until there is somebody to handle it ctrl-C simply ends us, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where the parent left it ignored, the kernel would reap our children itself (wait(2)).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    # What is imported stays: to look for garbage among it is for nothing.
    gc.disable()
    try:
        perform = _command()
    except ImportError as error:
        sys.exit(f"steer: {error}; install it again: pip install --force-reinstall steer-reuseport")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    perform()


def _command() -> Callable[[], None]:
    """What is asked for."""
    perform = _without_click(*sys.argv[1:])
    if perform is not None:
        return perform
    from steer import cli

    gc.enable()
    return cli.main


def _without_click(name: str = "", *arguments: str) -> Callable[[], None] | None:
    """`run` and `status`, as they are mostly given."""
    if "_STEER_COMPLETE" in os.environ:
        return None
    if name == "run":
        from steer import options

        if (given := options.plain(arguments)) is not None:
            _import_msgspec()
            from steer import entry, run

            return lambda: entry.guarded(lambda: run.perform(given))
    elif name == "status":
        _import_msgspec()
        from steer import entry, look

        if (asked := look.plain(arguments)) is not None:
            return lambda: entry.guarded(lambda: look.perform(asked))
    return None


def _import_msgspec() -> None:
    """Without typing_extensions, which it uses where that is installed. It takes as long as msgspec
    itself, and since Python 3.11 has nothing for msgspec that `typing` has not. And without
    platform, of which uuid, which msgspec imports, wants no more than the system's name."""
    stand_ins: dict[str, Any] = {"typing_extensions": None, "platform": _Platform}
    ours = stand_ins.keys() - sys.modules.keys()
    sys.modules.update((name, stand_ins[name]) for name in ours)
    try:
        import msgspec  # noqa: F401
    finally:
        for name in ours:
            del sys.modules[name]


class _Platform:
    """What uuid asks of the module."""

    @staticmethod
    def system() -> str:
        return os.uname().sysname


if __name__ == "__main__":
    main()
