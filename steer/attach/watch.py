"""Programs on the cgroups where sockets are created: see bpf/attach.c."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from steer import abi
from steer.attach.attachment import Attachment
from steer.attach.counting import TRACEPOINT
from steer.config.address import Bind
from steer.errors import KernelError
from steer.linux import cgroup
from steer.loader import compile, tracing
from steer.loader.bpf_maps import Map
from steer.loader.programs import ATTACH_TYPES, Link, Program
from steer.policy.bytecode import Code

FIELDS = (("sock_common", "skc_num"), ("sock_common", "skc_net.net"), ("net", "ns.inum"))
"""The fields that steer_state reads."""
_POSITION = struct.Struct("=Q")


class Watch:
    """Reports sockets that open and close, until it is closed.

    Args:
        bind: the address of the group.

    Raises:
        KernelError: the kernel refuses the programs.
    """

    def __init__(self, attachment: Attachment, bind: Bind) -> None:
        code = compile.load(compile.sources() / "attach.c").programs
        self._links: dict[int, list[Link]] = {}
        self._attach_types = _attach_types(bind)
        with ExitStack() as undo:
            self._programs = {
                kind: undo.enter_context(
                    Program(
                        f"steer_{kind}", code[kind], attachment.maps, attach_type, bind.protocol
                    )
                )
                for kind, attach_type in self._attach_types.items()
            }
            is_tcp = bind.protocol == "tcp"
            self._tracepoint = is_tcp and self._trace(attachment, code["state"], undo)
            self.events = Ring(attachment.maps["events"])
            undo.callback(self.events.close)
            undo.callback(self._unlink)
            self.close = undo.pop_all().close

    def _trace(self, attachment: Attachment, code: Code, undo: ExitStack) -> bool:
        """Report listeners of all cgroups. Whether the kernel allows that."""
        try:
            attachment.tell_offsets(*(tracing.field_offset(*each) for each in FIELDS))
            target = tracing.tracepoint_number(TRACEPOINT)
            program = undo.enter_context(
                Program("steer_state", code, attachment.maps, abi.BPF_TRACE_RAW_TP, target=target)
            )
            undo.enter_context(tracing.Attached(program))
        except KernelError:
            return False
        return True

    def on(self, cgroups: Iterable[int]) -> None:
        """Attach the programs to more cgroups, given by their numbers. Raises KernelError."""
        for number in cgroups:
            if number not in self._links:
                with cgroup.opened(number) as directory, ExitStack() as undo:
                    links = [
                        undo.enter_context(Link(program, directory, self._attach_types[kind]))
                        for kind, program in self._programs.items()
                        if kind == "closing" or not self._tracepoint
                    ]
                    undo.pop_all()
                    self._links[number] = links

    def _unlink(self) -> None:
        for links in self._links.values():
            for link in links:
                link.close()


def _attach_types(bind: Bind) -> Mapping[str, int]:
    """Of the programs on cgroups, by name. No tracepoint reports that a UDP socket is bound."""
    if bind.protocol == "tcp":
        return {kind: ATTACH_TYPES[kind] for kind in ("closing", "listening")}
    post_bind = abi.BPF_CGROUP_INET6_POST_BIND if bind.is_v6 else abi.BPF_CGROUP_INET4_POST_BIND
    return {"closing": ATTACH_TYPES["closing"], "bound": post_bind}


class Ring:
    """A ring buffer (BPF_MAP_TYPE_RINGBUF). Its records are not read: that there are any means that
    a socket was opened or closed."""

    def __init__(self, events: Map) -> None:
        self._events = events
        self._consumer = mmap.mmap(events.fileno(), mmap.PAGESIZE)
        size = mmap.PAGESIZE
        self._producer = mmap.mmap(events.fileno(), size, prot=mmap.PROT_READ, offset=mmap.PAGESIZE)

    def fileno(self) -> int:
        return self._events.fileno()

    def skip(self) -> None:
        """Drop all records."""
        self._consumer[: _POSITION.size] = self._producer[: _POSITION.size]

    def close(self) -> None:
        self._consumer.close()
        self._producer.close()
