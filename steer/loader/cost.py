"""Measures the cost of a program: nanoseconds per call, minus those of an empty program.

The kernel measures the time (BPF_ENABLE_STATS of bpf(2), Linux 5.8). It reads the clock twice
per run, which the subtraction of the empty program removes. The two programs alternate on the
same sockets.
"""

from __future__ import annotations

import ctypes
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

from steer import abi
from steer.config.address import Bind
from steer.loader import bpf_maps, libbpf, programs
from steer.policy.bytecode import Code
from steer.sockets import group_program, reuseport

EMPTY = Code(["b700000001000000", "9500000000000000"], {})
"""return SK_PASS"""
SLOTS = 4
_ROUNDS = 15
_BATCHES = 3


@contextmanager
def statistics() -> Iterator[None]:
    """Have the kernel measure the time of programs. It stops when the descriptor closes.

    Raises:
        KernelError: not permitted, or the kernel does not support it.
    """
    fd = libbpf.calls().bpf_enable_stats(0)
    if fd < 0:
        raise libbpf.refusal("enable BPF statistics", -fd)
    try:
        yield
    finally:
        os.close(fd)


def run_stats(program: libbpf.Descriptor) -> tuple[int, int]:
    """Nanoseconds and runs of a program so far."""
    with open(f"/proc/self/fdinfo/{program.fileno()}") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["run_time_ns"]), int(fields["run_cnt"])


def cost_ns(program: libbpf.Descriptor, sockets_map: bpf_maps.Map) -> float:
    """The cost per datagram, from one client to SLOTS sockets on loopback.

    Args:
        sockets_map: the program's sockarray, which this function fills.

    Raises:
        KernelError: not permitted.
        OSError: no datagrams can be sent.
    """
    with ExitStack() as stack:
        stack.enter_context(statistics())
        first = _group(sockets_map, stack)
        sender = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.connect(first.getsockname())
        flood = _Flood(sender)
        empty = programs.Program("steer_empty", EMPTY, {}, abi.BPF_SK_REUSEPORT_SELECT)
        stack.enter_context(empty)
        rounds = [
            _mean_ns(program, first, flood) - _mean_ns(empty, first, flood) for _ in range(_ROUNDS)
        ]
    return median(rounds)


def _group(sockets_map: bpf_maps.Map, stack: ExitStack) -> socket.socket:
    """The first socket of a new group. Nothing reads its sockets."""
    first = stack.enter_context(reuseport.member(Bind("udp", "127.0.0.1", 0), 0))
    bind = Bind("udp", *first.getsockname())
    others = [stack.enter_context(reuseport.member(bind, 0)) for _ in range(SLOTS - 1)]
    for slot, sock in enumerate([first, *others]):
        sockets_map.put_socket(slot, sock.fileno())
    return first


def _mean_ns(program: libbpf.Descriptor, member: socket.socket, flood: _Flood) -> float:
    group_program.attach_ebpf(member.fileno(), program.fileno())
    flood.send(1)
    before_ns, before = run_stats(program)
    flood.send(_BATCHES)
    after_ns, after = run_stats(program)
    return (after_ns - before_ns) / (after - before)


class _Message(ctypes.Structure):
    """Mirrors struct mmsghdr of sendmmsg(2). All zeros is an empty datagram to the peer."""

    _fields_ = (("header", ctypes.c_size_t * 7), ("sent_bytes", ctypes.c_size_t))


class _Flood:
    """Sends datagrams a thousand at a time, so that caches are as warm as under load."""

    _BATCH = 1000

    def __init__(self, sender: socket.socket) -> None:
        self._fd = sender.fileno()
        self._messages = (_Message * self._BATCH)()
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg

    def send(self, batches: int) -> None:
        """Raises OSError: a batch was not sent completely."""
        for _ in range(batches):
            sent = self._sendmmsg(self._fd, self._messages, self._BATCH, 0)
            if sent != self._BATCH:
                raise OSError(ctypes.get_errno(), f"sendmmsg sent {sent} of {self._BATCH}")
