"""Finds a policy by the name of a built-in one or the path of a C file."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from steer.errors import ConfigError, SteerError
from steer.loader import compile
from steer.policy import declarations
from steer.policy.builtin import AUTO, AUTO_BECOMES, CUSTOM_SUFFIX, POLICIES, Policy, auto, custom
from steer.policy.declarations import Declared
from steer.values import did_you_mean, shown

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"


def find(asked: str) -> Policy:
    """The built-in policy of that name, `auto`, or, if it ends in ".c", the policy in that file.

    Raises:
        ConfigError: there is none, or the file's name is not allowed for a policy.
        CompileError: the file cannot be read, or has wrong declarations.
    """
    if asked.endswith(CUSTOM_SUFFIX):
        return _custom(Path(os.path.abspath(asked)))
    if asked == AUTO:
        return auto(*map(find, AUTO_BECOMES))
    if asked not in POLICIES:
        allowed = f"allowed: {AUTO}, {', '.join(POLICIES)}, or a path/to/file.c"
        cure = f"{did_you_mean(asked, POLICIES)} {allowed}".lstrip()
        raise ConfigError(f"policy {shown(asked)}", "unknown", cure)
    policy = POLICIES[asked]
    if policy.source is None:
        return policy
    source = file_of(policy)
    says = declarations.parse(compile.text(source), f"read {source}")
    return msgspec.structs.replace(policy, declared=says)


def find_or_problem(asked: str) -> Policy:
    """The same as `find`, but an error of a custom policy is stored as its `problem`."""
    try:
        return find(asked)
    except SteerError as error:
        if not asked.endswith(CUSTOM_SUFFIX):
            raise
        broken = custom(Path(asked).stem, asked, Declared(), "")
        return msgspec.structs.replace(broken, problem=error)


def prepare(asked: str) -> Policy:
    """Find a policy and compile it if it is custom. The result is kept, as compiling is slow.

    Raises:
        ConfigError: as for `find`.
        CompileError: as for `find`, or it does not compile.
    """
    policy = find(asked)
    return compiled(policy) if policy.is_custom else policy


def compiled(policy: Policy) -> Policy:
    """Compile a custom policy and set its digest, which includes all files it is made from.

    Raises:
        CompileError: it does not compile.
    """
    return msgspec.structs.replace(policy, digest=compile.load(file_of(policy)).digest)


def restore(asked: str, says: Declared, digest: str) -> Policy:
    """The policy as an earlier controller had loaded it, even if its file has changed since."""
    if asked.endswith(CUSTOM_SUFFIX):
        return custom(Path(asked).stem, asked, says, digest)
    return msgspec.structs.replace(POLICIES[asked], declared=says)


def file_of(policy: Policy) -> Path:
    """The path of a policy's C file. The policy must have one."""
    assert policy.source is not None
    if policy.is_custom:
        return Path(policy.source)
    return compile.sources() / f"{policy.source}.c"


def check_name(name: str, act: str) -> None:
    """Raises ConfigError: the name is not allowed for a custom policy."""
    if name in (AUTO, *POLICIES):
        raise ConfigError(act, f"there is a built-in policy {name}", "give it another name")
    if not re.fullmatch(_NAME, name):
        allowed = "letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit"
        raise ConfigError(act, f"{shown(name)} cannot be a policy's name", f"allowed: {allowed}")


def _custom(source: Path) -> Policy:
    act = f"read {source}"
    check_name(source.stem, act)
    says = declarations.parse(compile.text(source), act)
    return custom(source.stem, str(source), says, compile.version(source))
