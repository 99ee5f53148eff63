"""The functions of an application's module that steer calls when it preloads the application."""

from __future__ import annotations

import sys
from collections.abc import Callable

from steer.child.api import Worker
from steer.child.launch import Unloadable
from steer.child.loading import in_words, where
from steer.config.service import Service

BEFORE_FORK, AFTER_FORK = "steer_preload", "steer_post_fork"


def before_fork(service: Service) -> None:
    """Call `steer_preload()`, if the module has it: it loads what workers can share.

    Raises:
        Unloadable: it failed.
    """
    _call(service, BEFORE_FORK)


def after_fork(service: Service, worker: Worker) -> None:
    """Call `steer_post_fork(worker)`, if the module has it: it opens what each worker needs for
    itself.

    Raises:
        Unloadable: it failed.
    """
    _call(service, AFTER_FORK, worker)


def _call(service: Service, name: str, *arguments: object) -> None:
    module = sys.modules.get((service.app or "").partition(":")[0])
    hook: Callable[..., object] | None = getattr(module, name, None)
    if hook is None:
        return
    try:
        hook(*arguments)
    # It is the user's code, which may raise anything.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        raise Unloadable(f"{name}: {in_words(error)}", where(error)) from None
