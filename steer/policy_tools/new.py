"""Starts a policy of the user's own from a commented template."""

from __future__ import annotations

from pathlib import Path

from steer.errors import ConfigError
from steer.loader import find
from steer.policy import builtin

_TEMPLATE = Path(__file__).with_name("template.c")


def begin(name: str) -> Path:
    """Write a commented starting point as NAME.c here.

    Raises:
        ConfigError: it is there already, cannot be written, or cannot be called that.
    """
    name = name.removesuffix(builtin.OWN_SUFFIX)
    act = f"write {name}{builtin.OWN_SUFFIX}"
    find.check_name(name, act)
    file = Path(name + builtin.OWN_SUFFIX)
    try:
        with file.open("x") as stream:
            stream.write(_TEMPLATE.read_text().replace("@NAME@", name))
    except FileExistsError:
        raise ConfigError(act, "it is there already", "give it another name") from None
    except OSError as error:
        raise ConfigError.from_oserror(act, error) from None
    return file
