"""Clients that wait for an answer, and workers that keep them waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack
from itertools import count
from typing import Any

from steer.linux import activity, processes
from testkit.harness import CPUS, PORT, pinned
from testkit.processes import DEADLINE_S, eventually, is_ready
from testkit.service import Service

BIND = ("-b", f"127.0.0.1:{PORT}")


def request(target: str = "/") -> socket.socket:
    """A connection with a request sent."""
    sock = socket.create_connection(("127.0.0.1", PORT), DEADLINE_S)
    sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    return sock


def answer(sock: socket.socket) -> dict[str, Any]:
    """The JSON of it. Raises ConnectionResetError where it is dropped."""
    with sock, sock.makefile("rb") as stream:
        head, _, body = stream.read().partition(b"\r\n\r\n")
    assert b" 200 " in head, head
    found: dict[str, Any] = json.loads(body)
    return found


def is_answered(sock: socket.socket) -> bool:
    """Or dropped."""
    return is_ready(sock)


def is_port_free() -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", PORT))
        except OSError:
            return False
        return True


def queue(
    running: Service, clients: ExitStack, number: int, *workers: dict[str, Any], target: str = "/"
) -> list[socket.socket]:
    """Requests until so many have gone to these workers; the others are answered."""
    slots = [worker["slot"] for worker in workers]
    waiting: list[socket.socket] = []
    before = _selected(running, slots)
    for turn in count():
        if len(waiting) == number:
            return waiting
        with pinned(CPUS[turn % len(CPUS)]):
            sock = clients.enter_context(request(target))
        if _selected(running, slots) > before + len(waiting):
            waiting.append(sock)
        else:
            answer(sock)
    raise AssertionError


def _selected(running: Service, slots: list[int]) -> int:
    selected = running.selected()
    return sum(selected[slot] for slot in slots)


def send(worker: dict[str, Any], number: int) -> None:
    """A signal to all processes of a worker."""
    for pid in processes.descendants(worker["pid"]):
        os.kill(pid, number)


def freeze(worker: dict[str, Any]) -> None:
    """Until all of it stands still."""
    send(worker, signal.SIGSTOP)
    family = processes.descendants(worker["pid"])
    eventually(lambda: all(activity.is_stopped(pid) for pid in family))


def http_get(
    host: str, port: int, target: str = "/", source: str = ""
) -> tuple[dict[str, str], dict[str, Any]]:
    """One request in a connection of its own: header fields by lower-case name, and the JSON.

    Args:
        source: address to come from; any if not given.
    """
    here = (source, 0) if source else None
    with socket.create_connection((host, port), DEADLINE_S, here) as sock:
        sock.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        with sock.makefile("rb") as answer:
            head, _, body = answer.read().partition(b"\r\n\r\n")
    fields = (line.partition(": ") for line in head.decode().split("\r\n")[1:])
    return {name.lower(): value for name, _, value in fields}, json.loads(body)


def udp_ask(host: str, port: int, data: bytes = b"") -> dict[str, Any]:
    """One datagram from a socket of its own, and the answer's JSON."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect((host, port))
        sock.send(data)
        answer: dict[str, Any] = json.loads(sock.recv(65536))
        return answer
