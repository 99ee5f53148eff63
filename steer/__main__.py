"""The `steer` command, from its first instruction."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable


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
    from steer.cli import main as cli

    gc.enable()
    return cli.main


def _without_click(name: str = "", *arguments: str) -> Callable[[], None] | None:
    """`run`, `status`, and what acts on a running service, as they are mostly given."""
    if "_STEER_COMPLETE" in os.environ:
        return None
    if name == "run":
        from steer.cli import options

        if (given := options.plain(arguments)) is not None:
            _import_msgspec()
            from steer.cli import entry, run

            return lambda: entry.guarded(lambda: run.perform(given))
    elif name == "status":
        _import_msgspec()
        from steer.cli import entry, status

        if (asked := status.plain(arguments)) is not None:
            return lambda: entry.guarded(lambda: status.perform(asked))
    else:
        from steer.cli import ask

        if name in ask.COMMANDS:
            _import_msgspec()
            from steer.cli import entry

            if (act := ask.plain(name, arguments)) is not None:
                return lambda: entry.guarded(act)
    return None


def _import_msgspec() -> None:
    """Without typing_extensions, which it uses where that is installed. It takes as long as msgspec
    itself, and since Python 3.11 has nothing for msgspec that `typing` has not."""
    if "typing_extensions" in sys.modules:
        return
    sys.modules["typing_extensions"] = None  # type: ignore[assignment]
    try:
        import msgspec  # noqa: F401
    finally:
        del sys.modules["typing_extensions"]


if __name__ == "__main__":
    main()
