"""How a command of the VM's ends: with its status, or with words and not a traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from steer.errors import SteerError


def run(command: click.Command, name: str) -> int:
    """Run it, and say what went wrong as `steer` does. Args: name: for its usage."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that what was started is ended
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _leave)
    try:
        return int(command(standalone_mode=False, prog_name=name) or 0)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except SteerError as error:
        print("\n".join(filter(None, (f"vm: {error}", error.detail))), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # who read what we print has had enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        print(f"vm: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
        return 1


def _leave(number: int, _: FrameType | None) -> NoReturn:
    signal.signal(number, signal.SIG_IGN)  # once is enough: what was begun is to be undone
    sys.exit(128 + number)
