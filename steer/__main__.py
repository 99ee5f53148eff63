"""The `steer` command, from its first instruction."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    """Until there is somebody to handle it ctrl-C simply ends us, without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Where the parent left it ignored, the kernel would reap our children itself (wait(2)).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        from steer import cli
    except ImportError as error:
        sys.exit(f"steer: {error}; install it again: pip install --force-reinstall steer-reuseport")

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
