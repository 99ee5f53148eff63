"""Makes a configuration from the command line, the environment and the configuration file. Pure.

Command line > STEER_* environment > file > default, for each key separately, so that an error can
name where a value came from.
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from steer import values
from steer.config import server_options
from steer.config.checks import (
    Origin,
    check_has_app,
    check_runs_something,
    check_together,
    checked,
    cure,
    origin_of,
)
from steer.config.service import FIELDS, Service
from steer.errors import ConfigError

_LISTS = {name for name, field in FIELDS.items() if isinstance(field.default, tuple)}

_OPTIONS = {
    "params": "--param",
    "server_options": "--server-option",
    "socket_options": "--socket-option",
}
"""Options that do not have the name of their key."""


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
        command_line: values of options, by key; None: the option was not given.
        file: the [service] table, as `read` returns it; None: there is no file.
        path: the path of the file, for errors.
        runs: whether the service will be run. Then it needs an app, a command or the demo. If no
            source says anything, it is the demo; a file counts as a source even if it is empty.

    Raises:
        ConfigError: a value is wrong. The error names the source, the key and what is allowed.
    """
    merged: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    sources = [] if file is None else [path]
    for key, value in (file or {}).items():
        if key == "server_options" and isinstance(value, dict):
            value = server_options.from_table(value, path)
        origins[key] = origin_of(key, value, path)
        merged[key] = checked(key, value, origins[key], strict=True)
    for key, (name, text) in _from_environment(environment).items():
        origins[key] = origin_of(key, text, name)
        merged[key] = checked(key, text, origins[key], strict=False)
        sources.append(name)
    for key, value in command_line.items():
        if value is not None and value != ():
            origins[key] = _given(key, value)
            merged[key] = checked(key, value, origins[key], strict=False)
            sources.append(origins[key].source)
    if runs and not sources:
        return Service(demo=True)
    service = Service(**merged)
    check_together(service, origins)
    if runs:
        check_runs_something(service, sources)
        check_has_app(service, origins)
    return service


def changed(service: Service, changes: Mapping[str, Any], act: str) -> Service:
    """A configuration with other values, which are checked as `load` does.

    Args:
        changes: the new values, by key.
        act: the act that errors name.

    Raises:
        ConfigError: a value is wrong.
    """
    converted = {
        key: checked(key, value, origin_of(key, value, act), strict=False)
        for key, value in changes.items()
    }
    result = msgspec.structs.replace(service, **converted)
    check_together(result, {key: origin_of(key, getattr(result, key), act) for key in FIELDS})
    return result


def read(text: bytes, path: str) -> dict[str, Any]:
    """The [service] table of a configuration file.

    Raises:
        ConfigError: the file is not TOML, or has something else than that table.
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
        raise ConfigError(act, unknown, cure(hint, "allowed: [service]"))
    table = document.get("service", {})
    if not isinstance(table, dict):
        raise ConfigError(act, "service is no table", "write [service]")
    return table


def _given(key: str, value: Any) -> Origin:
    """The origin of a value of the command line."""
    if key == "app":
        return Origin(f"argument {values.shown(value)}")
    if key == "command":
        return Origin("command after --", values.shown(value))
    return origin_of(key, value, _OPTIONS.get(key, f"--{key.replace('_', '-')}"))


def _from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, Any]]:
    """By key: the name of the variable that sets it, and the value."""
    found: dict[str, tuple[str, Any]] = {}
    if environment.get("WEB_CONCURRENCY"):
        found["workers"] = ("WEB_CONCURRENCY", environment["WEB_CONCURRENCY"])
    for name, text in environment.items():
        key = name.removeprefix("STEER_").lower()
        if name.startswith("STEER_") and key in FIELDS:
            separated = text.split() if key == "command" else re.split(r"\s*,\s*", text.strip())
            found[key] = (name, separated if key in _LISTS else text)
    return found


def as_toml(service: Service) -> str:
    """The configuration as a configuration file. Keys without a value are left out."""
    lines = ["[service]"]
    for key in FIELDS:
        value = getattr(service, key)
        if value is not None and value != ():
            # Strings, numbers, booleans and lists of these are written alike in JSON and TOML.
            lines.append(f"{key} = {msgspec.json.encode(value).decode()}")
    return "\n".join(lines)
