"""Sockets and groups as `steer inspect` has them, made up."""

from __future__ import annotations

from typing import Any

from steer.inspect.schema import Group, Process, Socket
from steer.inspect.seen import Seen


def seen(address: str = "127.0.0.1", port: int = 80, **changes: Any) -> Seen:
    return Seen(
        **{
            "protocol": "tcp",
            "address": address,
            "port": port,
            "is_v6only": False,
            "device": 0,
            "netns": 1,
            "uid": 0,
            "inode": 10,
            "cookie": 0,
            "queued": 0,
            "backlog": 128,
            "drops": 0,
            "cgroup": None,
            "is_connected": False,
            **changes,
        }
    )


def process(pid: int, waits: str | None = "epoll", command: str = "server") -> Process:
    return Process(pid, command, [0], waits)


def sock(*processes: Process, inode: int = 10, queued: int = 0, **changes: Any) -> Socket:
    return Socket(
        **{
            "cookie": None,
            "inode": inode,
            "processes": list(processes),
            "queued": queued,
            "backlog": 128,
            "drops": 0,
            **changes,
        }
    )


def group(*sockets: Socket, **changes: Any) -> Group:
    return Group(
        **{
            "protocol": "tcp",
            "address": "0.0.0.0",
            "port": 80,
            "kind": "reuseport",
            "uid": 0,
            "user": "root",
            "netns": 1,
            "netns_name": None,
            "is_elsewhere": False,
            "device": 0,
            "program": None,
            "program_known": True,
            "sockets": list(sockets),
            **changes,
        }
    )
