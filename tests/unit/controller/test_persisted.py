"""What a controller of another build has stored is understood, or refused in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import pytest

from steer import abi
from steer.backends import cbpf, ebpf
from steer.config.service import Service
from steer.controller.persisted import SCHEMA, Persisted, PersistedService
from steer.errors import ControlError
from steer.guard.entry import Entry
from steer.guard.store import NOTIFICATIONS, SELECTION
from steer.workers.stored_selection import StoredSelection
from steer.workers.stored_worker import StoredWorker
from testkit import ROOT

STORED = json.loads((ROOT / "tests/golden/stored.json").read_text())
"""By schema and backend, the entries of a service that was really run: as JSON. The mailbox's is
left out. To raise SCHEMA, add the entries of a service of the new one, and keep the old."""
BACKENDS = {"ebpf": ebpf.StoredEbpf, "cbpf": cbpf.StoredCbpf}
OF_SCHEMA = [(backend, key) for backend, found in STORED[str(SCHEMA)].items() for key in found]
MAPS = {1: "8c0113113c9f0588"}
"""By abi.MAPS_VERSION, the digest of the shapes of the maps."""


def entries(stored: Mapping[str, Any]) -> dict[str, Entry]:
    found = {key: Entry(json.dumps(value).encode()) for key, value in stored.items()}
    return {SELECTION: Entry(b""), NOTIFICATIONS: Entry(b""), **found}


def kind_of(key: str) -> Any:
    kinds = {"service": PersistedService, SELECTION: StoredSelection}
    return kinds.get(key) or (Service if key.startswith("generation ") else StoredWorker)


def lost(was: Any, now: Any, where: str = "") -> Iterator[str]:
    """Where something that was stored is not what was understood."""
    if isinstance(was, dict) and isinstance(now, dict):
        for key, value in was.items():
            yield from lost(value, now.get(key), f"{where}.{key}")
    elif isinstance(was, list) and isinstance(now, list) and len(was) == len(now):
        for before, after in zip(sorted(was, key=str), sorted(now, key=str), strict=True):
            yield from lost(before, after, f"{where}[]")
    elif was != now:
        yield f"{where}: {was!r}, understood as {now!r}"


def understood(text: Any, kind: Any) -> Any:
    return json.loads(msgspec.json.encode(msgspec.convert(text, kind, strict=False)))


@pytest.mark.parametrize("backend, key", OF_SCHEMA)
def test_what_a_build_of_this_schema_has_stored_is_understood(backend: str, key: str) -> None:
    """If not, raise SCHEMA: an older service would be misunderstood."""
    stored = STORED[str(SCHEMA)][backend][key]
    assert not list(lost(stored, understood(stored, kind_of(key))))
    if key == SELECTION:
        assert not list(lost(stored["value"], understood(stored["value"], BACKENDS[backend])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_service_of_this_schema_is_read(backend: str) -> None:
    found = Persisted("rec", entries(STORED[str(SCHEMA)][backend]))
    assert found.service.backend.backend == backend
    assert found.generations[found.service.generation].name == "rec"
    assert len(found.workers) == 2


def refusal(**changed: Any) -> str:
    stored = STORED[str(SCHEMA)]["ebpf"]
    with pytest.raises(ControlError) as caught:
        Persisted("web", entries({**stored, "service": {**stored["service"], **changed}}))
    return str(caught.value)


def test_another_schema_is_refused_in_words() -> None:
    words = refusal(schema=SCHEMA + 1)
    assert words == (
        f"adopt web: another version of steer has left it: it is stored in schema {SCHEMA + 1}, "
        f"and this version reads schema {SCHEMA}; `steer stop web` before you start it"
    )


def test_other_maps_are_refused_in_words() -> None:
    assert f"its maps are of version {abi.MAPS_VERSION + 1}" in refusal(
        maps_version=abi.MAPS_VERSION + 1
    )


@pytest.mark.parametrize("schema", [each for each in STORED if each != str(SCHEMA)])
def test_what_an_earlier_build_has_stored_is_refused_in_words(schema: str) -> None:
    with pytest.raises(ControlError, match="another version of steer has left it: it is stored"):
        Persisted("rec", entries(STORED[schema]["ebpf"]))


def test_maps_of_another_shape_have_another_version() -> None:
    """If this fails, raise abi.MAPS_VERSION and add its digest: the maps of a service that is
    adopted would be read wrongly."""
    shapes = repr([(name, msgspec.structs.astuple(spec)) for name, spec in abi.MAPS.items()])
    assert hashlib.sha256(shapes.encode()).hexdigest()[:16] == MAPS[abi.MAPS_VERSION]
    assert max(MAPS) == abi.MAPS_VERSION
