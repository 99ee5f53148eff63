"""Clients that wait for an answer, and workers that keep them waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import ExitStack
from itertools import count
from typing import Any

from crew import CPUS, PORT, pinned
from support import DEADLINE_S, Service, eventually, is_ready

from steer.linux import activity, processes

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
