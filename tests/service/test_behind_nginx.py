"""Behind a proxy that has one CPU: the default gives each worker its part, `cpu` gives one all."""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from testkit.clients import http_get
from testkit.fixtures import StartService
from testkit.harness import CPUS, PORT, pinned
from testkit.namespaces import Netns
from testkit.processes import eventually

FRONT = 8081
CONFIGURATION = f"""
daemon off;
worker_processes 1;
error_log stderr crit;
events {{}}
http {{
    access_log off;
    server {{
        listen 127.0.0.1:{FRONT};
        location / {{ proxy_pass http://127.0.0.1:{PORT}; }}
    }}
}}
"""
REQUESTS = 60


@pytest.fixture
def nginx(netns: Netns, home: Path) -> Iterator[None]:
    """On the first CPU."""
    (home / "nginx.conf").write_text(CONFIGURATION)
    command = ("nginx", "-c", str(home / "nginx.conf"), "-g", f"pid {home}/nginx.pid;")
    with pinned(CPUS[0]):
        process = subprocess.Popen(command)
    eventually((home / "nginx.pid").exists)
    yield
    process.terminate()
    process.wait()


@pytest.mark.needs("bpf", "nginx")
@pytest.mark.skipif(len(CPUS) < 2, reason="needs a second CPU")
@pytest.mark.parametrize("policy, parts", [("cpu", [0, 60]), ("auto", [30, 30])])
def test_each_worker_gets_its_part(
    service: StartService, nginx: None, policy: str, parts: list[int]
) -> None:
    running = service("-w", "2", "-b", f"127.0.0.1:{PORT}", "--policy", policy)
    seen = Counter(http_get("127.0.0.1", FRONT)[1]["slot"] for _ in range(REQUESTS))
    assert sorted([seen[0], seen[1]]) == pytest.approx(parts, abs=0 if policy == "cpu" else 3)
    assert running.selected() == {slot: seen[slot] for slot in (0, 1)}
