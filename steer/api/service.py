"""Runs a service from Python: `steer.run`, `steer.Config` and `steer.Service`."""

from __future__ import annotations

import gc
import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict

from steer.child.api import Worker
from steer.config import server_options, sources
from steer.config.service import FIELDS
from steer.controller import run as running
from steer.errors import ConfigError, ControlError
from steer.linux import family, fork, processes, title
from steer.linux.log import Log

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Unpack

_SCRIPT = "__main__"
"""The module that Python makes of the file that it runs."""
_NO_FILE = "python"
"""The name of a service whose program has no file, as with `python -c`."""
Application = Callable[[Worker], object]


class Settings(TypedDict, total=False):
    """The options of `steer run`, with the same names and defaults."""

    app: str | Application
    server: Literal["auto", "uvicorn", "hypercorn", "waitress"]
    server_options: Mapping[str, object]
    command: Sequence[str]
    demo: bool
    preload: bool
    bind: str | Sequence[str]
    workers: int | Literal["auto"]
    spares: int
    socket: Literal["inherit", "adopt"]
    instances: int
    reload_signal: str
    policy: str
    params: Mapping[str, int]
    backend: Literal["auto", "ebpf", "cbpf", "kernel"]
    strict: bool
    weights: Sequence[int]
    name: str
    user: str
    group: str
    keep_privileges: bool
    env: Mapping[str, str]
    chdir: str
    backlog: int
    socket_options: Mapping[str, str | int]
    graceful_timeout: float
    stop_signal: str
    ready_timeout: float
    hang_timeout: float
    hang: Literal["replace", "skip"]
    watchdog: float
    max_memory: int | str
    max_lifetime: float | str
    reload_on_change: bool
    adopt_timeout: float
    pid: str
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    control_socket: str


class Config:
    """The checked configuration of a service. Files and STEER_* variables are not read.

    Args:
        app: "module:callable", a function of a module, or an object that a variable of the script
            has. Each worker process calls it with a `Worker`, or has `server` serve it. Instead of
            it, give `command`, a command line, or `demo=True`.
        settings: see `Settings`. Times are in seconds. The default of `name` for a function of a
            script is the name of its file, "shop" for "shop.py".

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """

    def __init__(self, **settings: Unpack[Settings]) -> None:
        given = {key: _plain(key, value) for key, value in settings.items()}
        if str(given.get("app")).startswith(f"{_SCRIPT}:") and given.get("name") is None:
            given["name"] = _name_of_script()
        self.service = sources.load({}, {}, given, "steer.Config", runs=True)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.service == other.service

    def __hash__(self) -> int:
        return hash(self.service)

    def __repr__(self) -> str:
        changed = {
            key: value
            for key, field in FIELDS.items()
            if (value := getattr(self.service, key)) != field.default
        }
        return f"Config({', '.join(f'{key}={value!r}' for key, value in changed.items())})"


class Service:
    """A service that runs in this process, as `steer run` does.

    Workers are forked from this process: start threads only in workers, or afterwards. While it
    runs, this process handles SIGTERM, SIGINT, SIGHUP and the others that docs/RELOAD.md names.
    Afterwards steer restores the signal handlers, the garbage collector's settings, the limit on
    open files, the name and title that ps(1) shows, and whether the process is a child subreaper.
    On SIGUSR2 the whole program is started again, and adopts its workers.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self) -> None:
        """Run until the service is told to end, by a signal or by `steer stop`.

        Raises:
            ControlError: this is not the main thread: Python handles signals only there.
            SteerError: the service could not be started, or all its workers failed.
        """
        if threading.current_thread() is not threading.main_thread():
            cure = "call it in the main thread, or start a process for it"
            raise ControlError("run a service", "this is not the main thread", cure)
        service = self.config.service
        log = Log(service.log_level, service.log_format)
        with _process_kept():
            if service.adopts:
                from steer.attach import adopted

                adopted.run(service, os.environ, log, lambda: service, is_in_program=True)
            else:
                running.run(service, os.environ, log, lambda: service, is_in_program=True)


def run(app: str | Application | None = None, /, **settings: Unpack[Settings]) -> None:
    """Run a service until it is told to end: `Service(Config(app=app, ...)).run()`.

    Args:
        app: see `Config`.

    Raises:
        ConfigError: see `Config`.
        SteerError: see `Service.run`.
    """
    if app is not None:
        settings["app"] = app
    Service(Config(**settings)).run()


def _plain(key: str, value: object) -> object:
    """The value in the form of a configuration file."""
    if key == "app" and callable(value):
        return _name_of(value)
    if isinstance(value, Mapping) and key == "server_options":
        return server_options.from_table(value, "steer.Config")
    if isinstance(value, Mapping):
        return [f"{name}={each}" for name, each in value.items()]
    if key == "bind" and isinstance(value, str):
        return [value]
    return list(value) if isinstance(value, tuple) else value


def _name_of(function: Callable[..., object]) -> str:
    """The name "module:callable" by which a worker can import it. Raises ConfigError."""
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if not name:  # an object, such as an application of a framework
        variables = vars(sys.modules[_SCRIPT]).items()
        module = _SCRIPT
        name = next((key for key, value in variables if value is function), "")
    if not module or not name.replace(".", "").isidentifier():
        cure = 'define it in a module, or name it: "module:callable"'
        raise ConfigError(f"serve {function!r}", "workers cannot find it by a name", cure)
    return f"{module}:{name}"


def _name_of_script() -> str:
    """The name of the file of the running script, with "-" for what a service's name cannot have.
    For a directory or a package that is run, this is its name."""
    path = Path(getattr(sys.modules[_SCRIPT], "__file__", None) or _NO_FILE).absolute()
    name = path.parent.name if path.stem == _SCRIPT else path.stem
    return re.sub(r"(?a)[^\w.-]", "-", name).lstrip("_.-")[:63] or _NO_FILE


@contextmanager
def _process_kept() -> Iterator[None]:
    """Restore what the controller changes in this process, which continues after the service."""
    is_collecting, thresholds = gc.isenabled(), gc.get_threshold()
    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    title_shown, name = title.saved(), processes.command(os.getpid())
    is_subreaper = family.is_subreaper()
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        resource.setrlimit(resource.RLIMIT_NOFILE, files)
        gc.unfreeze()
        gc.set_threshold(*thresholds)
        (gc.enable if is_collecting else gc.disable)()
        family.set_subreaper(is_subreaper)
        title.restore(title_shown)
        if name is not None:
            fork.rename(name)
