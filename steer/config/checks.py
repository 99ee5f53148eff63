"""Checks the values of a configuration, each alone and then together. Pure.

An error names where a value came from, the key, the value and what is allowed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from steer import values
from steer.config import address, servers, socket_options
from steer.config.address import Bind
from steer.config.service import (
    ADOPT,
    FIELDS,
    INHERIT,
    MAX_WEIGHT,
    MAX_WORKERS,
    NO_SIGNAL,
    SHORTEST_S,
    Seconds,
    Service,
    Wait,
)
from steer.errors import ConfigError
from steer.policy.builtin import AUTO, CUSTOM_SUFFIX, KERNEL, POLICIES
from steer.values import Invalid, plural

_POLICY_NAMES = (AUTO, *POLICIES)
_MODULE_OR_PATH = r"(?a)[\w./][\w./-]{,79}"
"""What users type as an app if they forget the callable, or mean a command."""


class Origin(NamedTuple):
    """Where a value came from.

    Args:
        source: an option, a variable, a file, an argument.
        setting: the key and the value; "" if the source names both.
    """

    source: str
    setting: str = ""

    def __str__(self) -> str:
        return f"{self.source}: {self.setting}" if self.setting else self.source


def origin_of(key: str, value: Any, source: str) -> Origin:
    """The origin of a value of a key, which may be unknown."""
    name = key if key in FIELDS else values.shown(key).strip("'")
    return Origin(source, f"{name} = {values.shown(value)}")


def checked(key: str, value: Any, origin: Origin, *, strict: bool) -> Any:
    """A value converted to the type of its key.

    Args:
        origin: where the value came from, for errors.
        strict: whether the value must have the type already; else a string is converted.

    Raises:
        ConfigError: there is no such key, or the value is not allowed.
    """
    if key not in FIELDS:
        hint = values.did_you_mean(key, FIELDS)
        allowed = f"allowed: {', '.join(sorted(FIELDS))}"
        raise ConfigError(str(origin), "unknown key", cure(hint, allowed))
    try:
        _check_texts(value)
        converted = values.convert(value, FIELDS[key].type, strict=strict)
        _check_meaning(key, converted)
    except Invalid as error:
        hint = error.hint or _guess_app(key, value)
        raise ConfigError(str(origin), str(error), cure(hint, _allowed(key))) from None
    return converted


def _guess_app(key: str, value: Any) -> str:
    """A question that names what the user probably meant by a wrong app; "": no guess."""
    if key != "app" or not isinstance(value, str) or not re.fullmatch(_MODULE_OR_PATH, value):
        return ""
    if value.endswith(".py") or "/" in value:
        return f"did you mean the command -- {'python ' if value.endswith('.py') else ''}{value}?"
    return f"did you mean '{value}:NAME', a callable in it?"


def cure(*parts: str) -> str:
    """One cure from several parts, without those that are ""."""
    return " ".join(part for part in parts if part)


def _check_texts(value: Any) -> None:
    """Raises Invalid."""
    for text in value if isinstance(value, list | tuple) else (value,):
        if isinstance(text, str):
            values.check_text(text)


def _check_meaning(key: str, value: Any) -> None:
    """Check what the type of a key does not express. Raises Invalid."""
    if FIELDS[key].type == Seconds and 0 < value < SHORTEST_S:
        raise Invalid("too small")
    if key == "policy" and value not in _POLICY_NAMES and not value.endswith(CUSTOM_SUFFIX):
        raise Invalid("unknown policy", values.did_you_mean(value, _POLICY_NAMES))
    if key == "bind":
        _check_binds(value)
    if key == "stop_signal" and value is not None:
        servers.read_signal(value)
    if key == "reload_signal" and value not in (None, NO_SIGNAL):
        servers.read_reload_signal(value)
    if key == "socket_options":
        socket_options.parse(value)
    if key in ("max_memory", "max_lifetime") and value is not None:
        from steer.config import quantities

        quantities.READ[key](value)


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
    from steer.config import quantities

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
        "max_lifetime": quantities.LIFETIME_ALLOWED,
        "max_memory": quantities.SIZE_ALLOWED,
        "name": "letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit",
        "instances": f"1 to {MAX_WORKERS}",
        "params": "NAME=VALUE",
        "policy": f"{', '.join(_POLICY_NAMES)}, or a path/to/file{CUSTOM_SUFFIX}",
        "server": "auto, uvicorn, hypercorn, waitress",
        "server_options": "NAME=VALUE",
        "reload_signal": servers.RELOAD_ALLOWED,
        "socket": f"{INHERIT}, {ADOPT}",
        "socket_options": socket_options.ALLOWED,
        "spares": f"0 to {MAX_WORKERS}",
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


def check_together(service: Service, origins: Mapping[str, Origin]) -> None:
    """Check that the values of different keys fit together.

    Args:
        origins: where the values came from, by key.

    Raises:
        ConfigError: they do not.
    """
    weights, workers = service.weights, service.workers
    if service.app and service.command:
        raise ConfigError(
            _together(origins["app"], origins["command"]), "both are given", "give one"
        )
    if isinstance(workers, int) and len(weights) > workers:
        raise ConfigError(
            _together(origins["weights"], origins["workers"]),
            f"{plural(len(weights), 'weight')} for {plural(workers, 'worker')}",
            "give each worker one at most",
        )
    _check_options_have_sockets(service, origins)
    _check_server(service, origins)
    _check_adopts(service, origins)
    if weights and service.policy == KERNEL:
        raise ConfigError(
            _together(origins["weights"], origins["policy"]),
            "the kernel's own hash knows no weights",
            f"allowed: {', '.join(name for name in _POLICY_NAMES if name != KERNEL)}",
        )


def _check_server(service: Service, origins: Mapping[str, Origin]) -> None:
    """Raises ConfigError: no server can run with that."""
    if service.server is None:
        return
    if service.command:
        both = _together(origins["server"], origins["command"])
        raise ConfigError(both, "a command runs a server of its own", "leave one of them out")
    other = next((bind for bind in service.binds if bind.protocol != "tcp"), None)
    if other is not None:
        both = _together(origins["server"], origins["bind"])
        raise ConfigError(both, f"{other.label} is not TCP", "leave that bind out")


def check_has_app(service: Service, origins: Mapping[str, Origin]) -> None:
    """Check that there is an app, if one is to be preloaded or served by a server. Raises
    ConfigError."""
    if service.preload and service.app is None:
        cure = "give one: app = 'MODULE:NAME' (on the command line: MODULE:NAME)"
        cause = "a command is no app" if service.command else "no app is given"
        raise ConfigError(str(origins["preload"]), f"{cause} that could be preloaded", cure)
    if service.server_options and service.server is None:
        cure = "give one: server = 'uvicorn' (on the command line: --server uvicorn)"
        raise ConfigError(str(origins["server_options"]), "no server is given", cure)
    if service.server is not None and service.app is None:
        cure = "give one: app = 'MODULE:NAME' (on the command line: MODULE:NAME)"
        raise ConfigError(str(origins["server"]), "no app is given that it could serve", cure)


def check_runs_something(service: Service, sources: Sequence[str]) -> None:
    """Check that the configuration says what to run. The demo must be asked for: it must not serve
    in place of an app that the user forgot.

    Args:
        sources: where the configuration came from.

    Raises:
        ConfigError: there is neither an app nor a command, and `demo` is false.
    """
    if service.app or service.command or service.demo:
        return
    raise ConfigError(
        f"find what to run in {', '.join(sources)}",
        "neither an app nor a command is given",
        "give one: app, command or demo = true (on the command line: MODULE:CALLABLE, -- COMMAND "
        "or --demo)",
    )


def _together(one: Origin, other: Origin | None = None) -> str:
    """The origins; a source that they share is named once."""
    if other is None:
        return str(one)
    return f"{one} and {other.setting if one.source == other.source else other}"


def _check_adopts(service: Service, origins: Mapping[str, Origin]) -> None:
    """Raises ConfigError: something does not fit to listeners that the command opens itself."""
    if not service.adopts:
        for key in ("instances", "reload_signal"):
            origin = origins.get(key)
            if origin and getattr(service, key) != FIELDS[key].default:
                cause = f"it is for servers that open their listeners themselves, with {_ADOPT}"
                raise ConfigError(str(origin), cause, "leave it out")
        return
    for key, is_wrong, cause, cure in _NOT_ADOPTED:
        if is_wrong(service):
            raise ConfigError(_together(origins["socket"], origins.get(key)), cause, cure)


_ADOPT = f"socket = {ADOPT}"
_OPENS = "the server opens its listeners itself"
_NOT_ADOPTED: Sequence[tuple[str, Callable[[Service], bool], str, str]] = (
    (
        "command",
        lambda service: not service.command,
        "there is no command whose listeners could be adopted",
        "give one after --",
    ),
    (
        "command",
        lambda service: any("{fd" in word for word in service.command),
        f"{_OPENS}, so there is no descriptor for {{fd}}",
        "have it listen on the address, with {port} for the port",
    ),
    (
        "bind",
        lambda service: any(bind.protocol != "tcp" for bind in service.binds),
        "only listeners of TCP can be adopted",
        "give addresses of TCP",
    ),
    (
        "backend",
        lambda service: service.backend == "cbpf",
        "only eBPF steers listeners that a server opens itself",
        "allowed: auto, ebpf, kernel",
    ),
    (
        "spares",
        lambda service: service.spares > 0,
        f"{_OPENS}, so a spare one would get connections, too",
        "leave out spares",
    ),
    (
        "socket_options",
        lambda service: bool(service.socket_options),
        _OPENS,
        "set the option in the server",
    ),
)
"""What cannot be together with adopted listeners: a key, when, why and what to do."""


def _check_options_have_sockets(service: Service, origins: Mapping[str, Origin]) -> None:
    """Raises ConfigError: a socket option applies to no bind."""
    protocols = [bind.protocol for bind in service.binds]
    settings = socket_options.parse(service.socket_options)
    if unused := socket_options.unused_setting(settings, protocols):
        raise ConfigError(
            str(origins["socket_options"]),
            f"{unused.name} is for {' and '.join(unused.option.protocols).upper()}, and no bind is",
            "leave it out, or add such a bind",
        )
