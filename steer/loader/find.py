"""From what is asked for as a policy to the policy: a built-in's name, or a file of C."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from steer.errors import ConfigError, SteerError
from steer.loader import compile
from steer.policy import declarations
from steer.policy.builtin import AUTO, AUTO_BECOMES, OWN_SUFFIX, POLICIES, Policy, auto, own
from steer.policy.declarations import Declared
from steer.values import did_you_mean, shown

_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}"


def find(asked: str) -> Policy:
    """The policy of that name, `auto`, or, where it ends in ".c", the one in that file.

    Raises:
        ConfigError: there is none, or the file's name cannot be a policy's.
        CompileError: what the file declares cannot be; or it cannot be read.
    """
    if asked.endswith(OWN_SUFFIX):
        return _own(Path(os.path.abspath(asked)))
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


def find_or_not(asked: str) -> Policy:
    """As `find`; what is wrong with one of the user's own is its `problem`."""
    try:
        return find(asked)
    except SteerError as error:
        if not asked.endswith(OWN_SUFFIX):
            raise
        broken = own(Path(asked).stem, asked, Declared(), "")
        return msgspec.structs.replace(broken, problem=error)


def prepare(asked: str) -> Policy:
    """The policy, compiled if it is the user's own: that takes its time, and is not done again.

    Raises:
        As `find`; CompileError: it does not compile.
    """
    policy = find(asked)
    return compiled(policy) if policy.is_own else policy


def compiled(policy: Policy) -> Policy:
    """One of the user's own, as it is once it has been compiled: only then is it known what it
    is made from. Raises CompileError."""
    return msgspec.structs.replace(policy, digest=compile.load(file_of(policy)).digest)


def as_left(asked: str, says: Declared, digest: str) -> Policy:
    """The policy of that name as another controller had it, whatever is in the file by now."""
    if asked.endswith(OWN_SUFFIX):
        return own(Path(asked).stem, asked, says, digest)
    return msgspec.structs.replace(POLICIES[asked], declared=says)


def file_of(policy: Policy) -> Path:
    """Where the C of a policy that has any is."""
    assert policy.source is not None
    if policy.is_own:
        return Path(policy.source)
    return compile.sources() / f"{policy.source}.c"


def check_name(name: str, act: str) -> None:
    """Raises ConfigError: a policy of one's own cannot be called that."""
    if name in (AUTO, *POLICIES):
        raise ConfigError(act, f"there is a built-in policy {name}", "give it another name")
    if not re.fullmatch(_NAME, name):
        allowed = "letters, digits, '.', '_' and '-', 63 at most, the first a letter or digit"
        raise ConfigError(act, f"{shown(name)} cannot be a policy's name", f"allowed: {allowed}")


def _own(source: Path) -> Policy:
    act = f"read {source}"
    check_name(source.stem, act)
    says = declarations.parse(compile.text(source), act)
    return own(source.stem, str(source), says, compile.version(source))
