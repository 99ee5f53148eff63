"""The configuration of a service: its keys, their types and their defaults. Pure.

`sources` merges the command line, the environment and the configuration file to a configuration;
`checks` checks its values.
"""

from signal import Signals
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from steer.config import address, servers, socket_options
from steer.config.address import Bind
from steer.config.socket_options import Setting
from steer.policy.builtin import AUTO

if TYPE_CHECKING:
    from steer.config.quantities import Lifetime

MAX_WORKERS = 1024
MAX_WEIGHT = 1000
DEFAULT_BIND = "127.0.0.1:8080"
INHERIT: Literal["inherit"] = "inherit"
ADOPT: Literal["adopt"] = "adopt"
"""Values of `Service.socket`."""
NO_SIGNAL = "none"

SHORTEST_S = 0.05
"""The shortest wait: a shorter one would be a busy loop, and no process reacts that fast."""
Seconds = Annotated[float, Meta(ge=0, le=86400)]
"""Seconds: 0, or SHORTEST_S and more. 0 means never or at once, as the key says."""
Wait = Annotated[float, Meta(ge=SHORTEST_S, le=86400)]
"""Seconds that cannot be 0."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")]


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of a service. `steer run --help` explains all keys.

    Args:
        app: "module:callable" for a Python callable, "module:callable()" for what it returns; None:
            the service runs the demo or a command.
        server: the server that serves `app` in each worker; "auto": one that suits the app; None:
            the app is a callable that serves by itself.
        server_options: "NAME=VALUE" with options of that server; see `server_options`.
        command: the command line of a worker. {fd}, {slot} and {port} in it are filled in.
        demo: whether to run the demo if there is neither app nor command.
        preload: whether a template process loads the app once and forks the workers.
        workers: how many workers; "auto": one for each CPU that this process may use. If listeners
            are adopted: how many to wait for; "auto": at least one of each server.
        spares: how many more workers are kept ready to take the places of workers that fail.
        socket: "inherit": steer opens the sockets of workers; "adopt": the command opens them
            itself, and steer takes its listeners in.
        instances: how many servers to start if their listeners are adopted.
        reload_signal: the signal on which a server whose listeners are adopted reloads itself;
            None: the one in `servers.RELOADS`; "none": a reload starts another server instead.
        policy: "auto", the name of a built-in policy, or the path of a C file.
        keep_privileges: whether workers keep the capabilities of steer, and may gain others by
            executing a program that has some.
        params: "NAME=VALUE" for parameters of the policy. A parameter that is not named has the
            default that the policy declares.
        weights: the weight of each worker, by the number of the worker; a missing one is 1.
        socket_options: "NAME=VALUE", with names and values of `socket_options.OPTIONS`.
        stop_signal: the signal that tells a worker to finish; None: the one in `servers.SERVERS`
            for the program of the command, else TERM.
        hang_timeout: seconds that connections may wait while a worker accepts none; 0: no limit.
        watchdog: seconds within which a worker has to send WATCHDOG=1; None: it need not.
        max_memory: the memory of a worker, see `quantities.size_bytes`, above which it is replaced.
        max_lifetime: the time, see `quantities.lifetime`, after which a worker is replaced.
        reload_on_change: whether to reload when a Python file of the application changes.
        adopt_timeout: seconds that workers serve on without a controller; 0: they end with it.
    """

    app: Annotated[str, Meta(pattern=r"^[\w.]+:[\w.]+(\(\))?\Z")] | None = None
    server: Literal["auto", "uvicorn", "hypercorn", "waitress"] | None = None
    server_options: tuple[Annotated[str, Meta(pattern=r"^[^=]+=")], ...] = ()
    command: tuple[str, ...] = ()
    demo: bool = False
    preload: bool = False
    bind: tuple[str, ...] = (DEFAULT_BIND,)
    workers: Annotated[int, Meta(ge=1, le=MAX_WORKERS)] | Literal["auto"] = "auto"
    spares: Annotated[int, Meta(ge=0, le=MAX_WORKERS)] = 0
    socket: Literal["inherit", "adopt"] = INHERIT
    instances: Annotated[int, Meta(ge=1, le=MAX_WORKERS)] = 1
    reload_signal: str | None = None
    policy: str = AUTO
    params: tuple[Annotated[str, Meta(pattern=r"^[^=]+=")], ...] = ()
    backend: Literal["auto", "ebpf", "cbpf", "kernel"] = "auto"
    strict: bool = False
    weights: tuple[Annotated[int, Meta(ge=1, le=MAX_WEIGHT)], ...] = ()
    name: Name | None = None
    user: str | None = None
    group: str | None = None
    keep_privileges: bool = False
    env: tuple[Annotated[str, Meta(pattern=r"^[^=]+=")], ...] = ()
    chdir: str | None = None
    backlog: Annotated[int, Meta(ge=1, le=65535)] = 2048
    socket_options: tuple[Annotated[str, Meta(pattern=r"^[^=]+=")], ...] = ()
    graceful_timeout: Seconds = 30.0
    stop_signal: str | None = None
    ready_timeout: Wait = 30.0
    hang_timeout: Seconds = 2.0
    hang: Literal["replace", "skip"] = "replace"
    watchdog: Wait | None = None
    max_memory: int | str | None = None
    max_lifetime: float | str | None = None
    reload_on_change: bool = False
    adopt_timeout: Seconds = 30.0
    pid: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    control_socket: str | None = None

    @property
    def binds(self) -> tuple[Bind, ...]:
        return tuple(address.parse(text) for text in self.bind)

    @property
    def adopts(self) -> bool:
        """Whether the command opens the listeners itself, and steer takes them in."""
        return self.socket == ADOPT

    @property
    def given_binds(self) -> tuple[Bind, ...]:
        """The binds whose sockets steer opens, and gives to workers."""
        return () if self.adopts else self.binds

    def processes(self, cpus: int) -> int:
        """How many processes to start.

        Args:
            cpus: how many CPUs this process may use.
        """
        if self.adopts:
            return self.instances
        return cpus if self.workers == "auto" else self.workers

    @property
    def own_reload_signal(self) -> Signals | None:
        """The signal on which the command reloads itself; None: it has none, or it is not to."""
        if self.reload_signal is None:
            return servers.reload_signal(self.command)
        if self.reload_signal == NO_SIGNAL:
            return None
        return servers.read_reload_signal(self.reload_signal)

    @property
    def service_name(self) -> str:
        """The name that the user gave, else that of the app's module or of the command's program,
        else "demo"."""
        if self.name:
            return self.name
        if self.app:
            return self.app.partition(":")[0].replace(".", "-")
        return self.command[0].rpartition("/")[2] if self.command else "demo"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """The socket options that apply to the binds, including defaults."""
        settings = socket_options.parse(self.socket_options)
        protocols = {bind.protocol for bind in self.binds}
        return tuple(each for each in settings if protocols & set(each.option.protocols))

    @property
    def max_memory_bytes(self) -> int | None:
        """The most memory of a worker, in bytes; None: no limit."""
        if self.max_memory is None:
            return None
        from steer.config import quantities

        return quantities.size_bytes(self.max_memory)

    @property
    def lifetime(self) -> "Lifetime | None":
        """How long a worker may live; None: no limit."""
        if self.max_lifetime is None:
            return None
        from steer.config import quantities

        return quantities.lifetime(self.max_lifetime)

    @property
    def finish_signal(self) -> Signals:
        """The signal that tells a worker to finish its requests and exit."""
        if self.stop_signal is not None:
            return servers.read_signal(self.stop_signal)
        return servers.stop_signal(self.command)

    def weight(self, number: int) -> int:
        return self.weights[number] if number < len(self.weights) else 1


FIELDS = {field.name: field for field in msgspec.structs.fields(Service)}
