"""What the guard stores for the next controller: one schema, with a number.

Entries of the guard, by key:

    service         a `PersistedService`, which has the number of the schema
    generation N    the configuration of generation N, a `Service`
    worker N        see `workers.stored_worker`
    selection       see `workers.stored_selection`; the backend adds values and descriptors
    mailbox         the notification socket, and what was read from it

Raise SCHEMA if a change would make another release misunderstand an entry. A field that has a
default may be added without that.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import msgspec

from steer import abi
from steer.config.candidates import BackendCandidate
from steer.config.service import Service
from steer.errors import ControlError
from steer.guard.client import GuardClient
from steer.guard.entry import Entry
from steer.guard.store import NOTIFICATIONS, SELECTION
from steer.policy.declarations import Declared

SCHEMA = 2
_SERVICE, _GENERATION, _WORKER = "service", "generation ", "worker "


class PersistedService(msgspec.Struct, frozen=True, kw_only=True):
    """A service as a whole.

    Args:
        schema, maps_version: the versions of the build that stored it, see SCHEMA and
            `abi.MAPS_VERSION`.
        backend: the backend in force, and why no better one is used.
        slots, hash_length: the sizes of the maps.
        generation: the number of the generation in force.
        configured: the configuration of the start or of the last reload.
        policy: the policy in force.
        policy_reason: why `auto` became this policy; None: the user named the policy.
        declared, digest: the declarations of the policy and a digest of its text. Its file may have
            changed, or be gone, when a controller adopts the service.
        notify: the address of the notification socket.
        activated: see `WorkerPool`.
    """

    schema: int = SCHEMA
    maps_version: int = abi.MAPS_VERSION
    started_s: float
    backend: BackendCandidate
    slots: int
    hash_length: int
    generation: int
    configured: Service
    policy: str
    policy_reason: str | None
    declared: Declared
    digest: str
    notify: str
    activated: int = 0


class Persisted:
    """The entries that a guard has of a service, decoded.

    Attributes:
        generations: configurations by the number of the generation.
        workers: entries by their keys.

    Raises:
        ControlError: another version of steer has stored the entries.
        msgspec.MsgspecError, LookupError, TypeError, ValueError: the entries have our version
            number, and yet cannot be decoded.
    """

    def __init__(self, name: str, entries: Mapping[str, Entry]) -> None:
        stored = entries[_SERVICE].value
        _refuse_other_versions(name, msgspec.json.decode(stored, type=dict[str, Any]))
        self.service = msgspec.json.decode(stored, type=PersistedService)
        self.generations: Mapping[int, Service] = {
            int(key.removeprefix(_GENERATION)): msgspec.json.decode(entry.value, type=Service)
            for key, entry in entries.items()
            if key.startswith(_GENERATION)
        }
        self.workers = {key: each for key, each in entries.items() if key.startswith(_WORKER)}
        self.selection = entries[SELECTION]
        self.notifications = entries[NOTIFICATIONS]


def _refuse_other_versions(name: str, found: Mapping[str, Any]) -> None:
    """Compare the version numbers, which every version can read. Entries from before schema 1 have
    none.

    Raises:
        ControlError: another version of steer has stored the entries.
    """
    schema, maps_version = found.get("schema", 0), found.get("maps_version", 0)
    if schema != SCHEMA:
        what = f"stored in schema {schema}" if schema else "stored before schema 1"
        raise other_version(name, f"it is {what}, and this version reads schema {SCHEMA}")
    if maps_version != abi.MAPS_VERSION:
        ours = f"and this version has maps of version {abi.MAPS_VERSION}"
        raise other_version(name, f"its maps are of version {maps_version}, {ours}")


def other_version(name: str, how: str) -> ControlError:
    """The error that another version of steer has stored the entries of a service.

    Args:
        how: how that shows, in words.
    """
    cure = f"`steer stop {name}` before you start it"
    return ControlError(f"adopt {name}", f"another version of steer has left it: {how}", cure)


def put_service(guard: GuardClient, service: PersistedService) -> None:
    guard.put(_SERVICE, msgspec.json.encode(service))


def put_generation(guard: GuardClient, number: int, service: Service) -> None:
    guard.put(f"{_GENERATION}{number}", msgspec.json.encode(service))


def drop_generations(guard: GuardClient, used: Collection[int]) -> None:
    """Drop the generations whose numbers are not in `used`."""
    for key in [key for key in guard.entries if key.startswith(_GENERATION)]:
        if int(key.removeprefix(_GENERATION)) not in used:
            guard.drop(key)
