"""Creates a custom policy from a commented template."""

from __future__ import annotations

from pathlib import Path

from steer.errors import ConfigError
from steer.loader import find
from steer.policy import builtin

_TEMPLATE = Path(__file__).with_name("template.c")


def begin(name: str) -> Path:
    """Write the template as NAME.c into the current directory.

    Raises:
        ConfigError: the file exists or cannot be written, or the name is not allowed.
    """
    name = name.removesuffix(builtin.CUSTOM_SUFFIX)
    act = f"write {name}{builtin.CUSTOM_SUFFIX}"
    find.check_name(name, act)
    file = Path(name + builtin.CUSTOM_SUFFIX)
    try:
        with file.open("x") as stream:
            stream.write(_TEMPLATE.read_text().replace("@NAME@", name))
    except FileExistsError:
        raise ConfigError(act, "the file exists", "give it another name") from None
    except OSError as error:
        raise ConfigError.from_oserror(act, error) from None
    return file
