"""What a service is to be: from command line, environment and file to one frozen value. Pure.

Command line > STEER_* environment > file > default, key by key, so that an error can
name where a value came from.
"""

import re
from collections.abc import Mapping, Sequence
from signal import Signals
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from steer import values
from steer.config import address, servers, socket_options
from steer.config.address import Bind
from steer.config.socket_options import Setting
from steer.errors import ConfigError
from steer.policy.builtin import AUTO, CUSTOM_SUFFIX, POLICIES
from steer.values import Invalid, plural

MAX_WORKERS = 1024
MAX_WEIGHT = 1000
_GIVEN_AS: Mapping[str, str] = {
    "app": "argument {value}",
    "command": "command after --: {value}",
    "params": "--param: params = {value}",
    "socket_options": "--socket-option: socket_options = {value}",
}
"""How the command line has a key, where it is not an option of the same name."""
DEFAULT_BIND = "127.0.0.1:8080"

SHORTEST_S = 0.05
"""Waiting for less would be a busy loop, and no process is that punctual."""
Seconds = Annotated[float, Meta(ge=0, le=86400)]
"""0, which switches something off or does it at once, or SHORTEST_S and more."""
Wait = Annotated[float, Meta(ge=SHORTEST_S, le=86400)]
"""Seconds that cannot be 0."""
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,62}\Z")]


class Service(msgspec.Struct, frozen=True, kw_only=True):
    """A service's configuration; keys and meanings as in `steer run --help`.

    Args:
        app: "module:callable" for a Python callable; None for the demo or a command.
        command: the worker's command line, with {fd}, {slot}, {port} to be filled in.
        demo: whether the demo is what is wanted where there is neither app nor command.
        workers: how many, or "auto": one for each CPU this process may use.
        policy: "auto", a built-in's name, or the path of a C file.
        keep_privileges: whether workers keep the capabilities that steer itself has, and may
            gain others by executing a program that has some.
        params: "NAME=VALUE", of the policy; the others have the values it declares.
        weights: each worker's share, in the workers' order; missing ones are 1.
        socket_options: "NAME=VALUE", names and values as in `socket_options.OPTIONS`.
        stop_signal: what tells a worker to finish; None: as `servers.SERVERS` has it for the
            command's program, else TERM.
        hang_timeout: seconds that connections may wait while a worker takes none; 0: for ever.
        watchdog: seconds within which a worker has to say WATCHDOG=1; None: it need not.
        adopt_timeout: seconds that workers go on without a controller; 0: none.
    """

    app: Annotated[str, Meta(pattern=r"^[\w.]+:[\w.]+\Z")] | None = None
    command: tuple[str, ...] = ()
    demo: bool = False
    bind: tuple[str, ...] = (DEFAULT_BIND,)
    workers: Annotated[int, Meta(ge=1, le=MAX_WORKERS)] | Literal["auto"] = "auto"
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
    adopt_timeout: Seconds = 30.0
    pid: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json"] = "text"
    control_socket: str | None = None

    @property
    def binds(self) -> tuple[Bind, ...]:
        return tuple(address.parse(text) for text in self.bind)

    @property
    def service_name(self) -> str:
        """The given name, else the app's module, else the command's, else "demo"."""
        if self.name:
            return self.name
        if self.app:
            return self.app.partition(":")[0].replace(".", "-")
        return self.command[0].rpartition("/")[2] if self.command else "demo"

    @property
    def settings(self) -> tuple[Setting, ...]:
        """All that sockets are given, defaults too."""
        all_of_them = socket_options.parse(self.socket_options)
        protocols = {bind.protocol for bind in self.binds}
        return tuple(each for each in all_of_them if protocols & set(each.option.protocols))

    @property
    def finish_signal(self) -> Signals:
        """The signal that tells a worker to finish what it has and end."""
        if self.stop_signal is not None:
            return servers.read_signal(self.stop_signal)
        return servers.stop_signal(self.command)

    def weight(self, number: int) -> int:
        return self.weights[number] if number < len(self.weights) else 1


FIELDS = {field.name: field for field in msgspec.structs.fields(Service)}
_NAMED = (AUTO, *POLICIES)
_PROGRAM = r"(?a)[\w./][\w./-]{,79}"
"""A module, or a path that stands where a module's callable is to be named."""
_LISTS = {name for name, field in FIELDS.items() if isinstance(field.default, tuple)}


def load(
    command_line: Mapping[str, Any],
    environment: Mapping[str, str],
    file: Mapping[str, Any] | None,
    path: str,
    *,
    runs: bool = False,
) -> Service:
    """Merge the sources and check every value.

    Args:
        command_line: values given as options, by key; None: not given.
        file: the [service] table, as `read` returns it; None: there is no file.
        path: the file's name, for errors.
        runs: whether the service is to be run, and so has to have something to run: an app, a
            command or the demo. The demo is also what it is if nothing at all was given; a file
            is something, even an empty one.

    Raises:
        ConfigError: names the source, the key, the value and what is allowed.
    """
    merged: dict[str, Any] = {}
    shown: dict[str, str] = {}
    sources = [] if file is None else [path]
    for key, value in (file or {}).items():
        shown[key] = _shown(key, value, path)
        merged[key] = _checked(key, value, shown[key], strict=True)
    for key, (name, text) in _from_environment(environment).items():
        shown[key] = _shown(key, text, name)
        merged[key] = _checked(key, text, shown[key], strict=False)
        sources.append(name)
    for key, value in command_line.items():
        if value is not None and value != ():
            form = _GIVEN_AS.get(key, f"--{key.replace('_', '-')}: {key} = {{value}}")
            shown[key] = form.format(value=values.shown(value))
            merged[key] = _checked(key, value, shown[key], strict=False)
            sources.append(form.partition(":")[0])
    if runs and not sources:
        return Service(demo=True)
    service = Service(**merged)
    _check_whole(service, shown)
    if runs:
        _check_runs_something(service, sources)
    return service


def changed(service: Service, changes: Mapping[str, Any], act: str) -> Service:
    """The configuration with other values, each checked as by `load`.

    Raises:
        ConfigError: names the key, the value and what is allowed.
    """
    checked = {
        key: _checked(key, value, _shown(key, value, act), strict=False)
        for key, value in changes.items()
    }
    result = msgspec.structs.replace(service, **checked)
    _check_whole(result, {key: _shown(key, getattr(result, key), act) for key in FIELDS})
    return result


def read(text: bytes, path: str) -> dict[str, Any]:
    """The [service] table of a configuration file.

    Raises:
        ConfigError: not TOML, or not such a table.
    """
    import tomllib

    act = f"read {path}"
    try:
        document = tomllib.loads(text.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(act, f"not UTF-8 at byte {error.start}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(act, str(error)) from None
    except RecursionError:
        raise ConfigError(act, "lists or tables are nested too deep") from None
    except ValueError:  # of int()
        raise ConfigError(act, "a number has too many digits") from None
    others = sorted(set(document) - {"service"})
    if others:
        if others[0] in FIELDS:
            raise ConfigError(act, f"{others[0]} stands in no table", "write [service] above it")
        unknown = f"unknown table or key {values.shown(others[0])}"
        hint = values.did_you_mean(others[0], ["service"])
        raise ConfigError(act, unknown, _cure(hint, "allowed: [service]"))
    table = document.get("service", {})
    if not isinstance(table, dict):
        raise ConfigError(act, "service is no table", "write [service]")
    return table


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    found: dict[str, tuple[str, Any]] = {}
    if environment.get("WEB_CONCURRENCY"):
        found["workers"] = ("WEB_CONCURRENCY", environment["WEB_CONCURRENCY"])
    for name, text in environment.items():
        key = name.removeprefix("STEER_").lower()
        if name.startswith("STEER_") and key in FIELDS:
            separated = text.split() if key == "command" else re.split(r"\s*,\s*", text.strip())
            found[key] = (name, separated if key in _LISTS else text)
    return found


def _shown(key: str, value: Any, source: str) -> str:
    name = key if key in FIELDS else values.shown(key).strip("'")
    return f"{source}: {name} = {values.shown(value)}"


def _checked(key: str, value: Any, shown: str, *, strict: bool) -> Any:
    if key not in FIELDS:
        hint = values.did_you_mean(key, FIELDS)
        raise ConfigError(
            shown, "unknown key", _cure(hint, f"allowed: {', '.join(sorted(FIELDS))}")
        )
    try:
        _check_texts(value)
        converted = values.convert(value, FIELDS[key].type, strict=strict)
        _check_meaning(key, converted)
    except Invalid as error:
        hint = error.hint or _meant(key, value)
        raise ConfigError(shown, str(error), _cure(hint, _allowed(key))) from None
    return converted


def _meant(key: str, value: Any) -> str:
    """What was probably meant by an app that is none, as a question; else ""."""
    if key != "app" or not isinstance(value, str) or not re.fullmatch(_PROGRAM, value):
        return ""
    if value.endswith(".py") or "/" in value:
        return f"did you mean the command -- {'python ' if value.endswith('.py') else ''}{value}?"
    return f"did you mean '{value}:NAME', a callable in it?"


def _cure(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def _check_texts(value: Any) -> None:
    """Raises Invalid."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str):
            values.check_text(text)


def _check_meaning(key: str, value: Any) -> None:
    """What its type does not tell of a value. Raises Invalid."""
    if FIELDS[key].type == Seconds and 0 < value < SHORTEST_S:
        raise Invalid("too small")
    if key == "policy" and value not in _NAMED and not value.endswith(CUSTOM_SUFFIX):
        raise Invalid("unknown policy", values.did_you_mean(value, _NAMED))
    if key == "bind":
        _check_binds(value)
    if key == "stop_signal" and value is not None:
        servers.read_signal(value)
    if key == "socket_options":
        socket_options.parse(value)


def _check_binds(texts: Sequence[str]) -> None:
    if not texts:
        raise Invalid("no address given")
    binds = [_bind(text) for text in texts]
    for bind in binds:
        if bind.is_multicast:
            raise Invalid(f"{bind.label} is multicast or broadcast: {address.COPIES}")
        if binds.count(bind) > 1:
            raise Invalid(f"{bind.label} is given twice")


def _bind(text: str) -> Bind:
    try:
        return address.parse(text)
    except ConfigError as error:
        raise Invalid(f"{error.what}: {error.cause}", address.did_you_mean(text)) from None


def _allowed(key: str) -> str:
    words = {
        "app": "MODULE:CALLABLE",
        "backend": "auto, ebpf, cbpf, kernel",
        "backlog": "1 to 65535",
        "bind": address.ALLOWED,
        "env": "NAME=VALUE",
        "hang": "replace, skip",
        "hang_timeout": f"seconds, 0 (for ever) or from {SHORTEST_S:g} to 86400",
        "log_format": "text, json",
        "log_level": "debug, info, warning, error",
        "name": "letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit",
        "params": "NAME=VALUE",
        "policy": f"{', '.join(_NAMED)}, or a path/to/file{CUSTOM_SUFFIX}",
        "socket_options": socket_options.ALLOWED,
        "stop_signal": servers.ALLOWED,
        "weights": f"whole numbers from 1 to {MAX_WEIGHT}",
        "workers": f"1 to {MAX_WORKERS}, or auto",
    }
    allowed = words.get(key) or _ALLOWED_TYPES.get(FIELDS[key].type, "")
    return f"allowed: {allowed}" if allowed else ""


_ALLOWED_TYPES: Mapping[Any, str] = {
    bool: "true, false",
    Seconds: f"seconds, 0 or from {SHORTEST_S:g} to 86400",
    Wait: f"seconds, from {SHORTEST_S:g} to 86400",
    Wait | None: f"seconds, from {SHORTEST_S:g} to 86400",
}


def _check_whole(service: Service, shown: Mapping[str, str]) -> None:
    """What no single key can tell. Raises ConfigError."""
    weights, workers = service.weights, service.workers
    if service.app and service.command:
        raise ConfigError(_together(shown, "app", "command"), "both are given", "give one")
    if isinstance(workers, int) and len(weights) > workers:
        raise ConfigError(
            _together(shown, "weights", "workers"),
            f"{plural(len(weights), 'weight')} for {plural(workers, 'worker')}",
            "give each worker one at most",
        )
    _check_options_have_sockets(service, shown)
    if weights and service.policy == "kernel":
        raise ConfigError(
            _together(shown, "weights", "policy"),
            "the kernel's own hash knows no weights",
            f"allowed: {', '.join(name for name in _NAMED if name != 'kernel')}",
        )


def _check_runs_something(service: Service, sources: Sequence[str]) -> None:
    """Raises ConfigError: what to run was forgotten, and the demo would serve in its place."""
    if service.app or service.command or service.demo:
        return
    raise ConfigError(
        f"find what to run in {', '.join(sources)}",
        "neither an app nor a command is given",
        "give one: MODULE:CALLABLE or -- COMMAND (in a file: app or command); or have the demo"
        " run: --demo (demo = true)",
    )


def _together(shown: Mapping[str, str], one: str, other: str) -> str:
    """Both; where they are from is named once if it is the same."""
    source = shown[one].removesuffix(shown[one].partition(": ")[2])
    return f"{shown[one]} and {shown[other].removeprefix(source)}"


def _check_options_have_sockets(service: Service, shown: Mapping[str, str]) -> None:
    """Raises ConfigError."""
    protocols = [bind.protocol for bind in service.binds]
    settings = socket_options.parse(service.socket_options)
    if unused := socket_options.unused_setting(settings, protocols):
        raise ConfigError(
            shown["socket_options"],
            f"{unused.name} is for {' and '.join(unused.option.protocols).upper()}, and no bind is",
            "leave it out, or add such a bind",
        )


def as_toml(service: Service) -> str:
    """The configuration as a file that gives the same one; keys without a value left out."""
    lines = ["[service]"]
    for key in FIELDS:
        value = getattr(service, key)
        if value is not None and value != ():
            # What JSON writes of strings, numbers, booleans and lists of them is TOML too.
            lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)
