"""The program that a group had before the attach, to be put back at the end."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

import msgspec

from steer.loader.foreign import ForeignProgram, SocketArray
from steer.policy import classic
from steer.sockets import group_program


class StoredProgram(msgspec.Struct, frozen=True):
    """What it takes to put a program back, also after execve(2).

    Args:
        number: of an eBPF program; 0: it is a classic one.
        places: of sockets that were taken out already: for each socket array, their cookies by
            index. None: they are still in.
        classic: the instructions of a classic program, an array of struct sock_filter.
    """

    number: int = 0
    places: list[dict[int, int]] | None = None
    classic: bytes = b""

    def open(self) -> ReplacedProgram:
        """Raises KernelError: CAP_SYS_ADMIN is needed for an eBPF program."""
        return _Ebpf(self) if self.number else _Classic(self)


class ReplacedProgram:
    """A program of somebody else.

    Attributes:
        stored: this, to be opened again.
    """

    def __init__(self, stored: StoredProgram) -> None:
        self.stored = stored

    @property
    def number(self) -> int:
        return self.stored.number

    def descriptors(self) -> Sequence[int]:
        """Those that a forked child needs for `put_back`."""
        return ()

    def take_out(self) -> None:
        """Once another program is attached: free the sockets. Raises KernelError."""

    def put_back(self, sockets: Iterable[tuple[int, socket.socket]]) -> None:
        """Once no socket is in another array. What is in place already is left as it is.

        Args:
            sockets: those of the group, each with its cookie.

        Raises:
            KernelError
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close what is open."""


class _Classic(ReplacedProgram):
    """A classic program. It answers with an index into the kernel's own array of the sockets, which
    attaching another program does not change."""

    def put_back(self, sockets: Iterable[tuple[int, socket.socket]]) -> None:
        for _, sock in sockets:
            group_program.attach_cbpf(sock.fileno(), classic.unpack(self.stored.classic))
            return


class _Ebpf(ReplacedProgram):
    """An eBPF program with its socket arrays. A socket can be in one socket array only, so the
    arrays are emptied, and filled again at the end with the sockets that still exist.

    Raises:
        KernelError: it cannot be opened: CAP_SYS_ADMIN is needed.
    """

    def __init__(self, stored: StoredProgram) -> None:
        self._kept: list[tuple[SocketArray, Mapping[int, int]]] = []
        with ExitStack() as undo:
            self._program = undo.enter_context(ForeignProgram(stored.number))
            arrays = [undo.enter_context(each) for each in self._program.socket_arrays()]
            there = [each.cookies() for each in arrays] if stored.places is None else stored.places
            self._kept += zip(arrays, there, strict=True)
            self._open = undo.pop_all()
        super().__init__(StoredProgram(stored.number, [dict(each) for each in there]))

    def close(self) -> None:
        self._open.close()

    def descriptors(self) -> Sequence[int]:
        return [each.fileno() for each in (self._program, *(array for array, _ in self._kept))]

    def take_out(self) -> None:
        for array, there in self._kept:
            for index in there:
                array.remove(index)

    def put_back(self, sockets: Iterable[tuple[int, socket.socket]]) -> None:
        is_attached = False
        missing = [(array, there.items() - array.cookies().items()) for array, there in self._kept]
        for cookie, sock in sockets:
            for array, places in missing:
                for index in (index for index, each in places if each == cookie):
                    array.put(index, sock.fileno())
            if not is_attached:
                group_program.attach_ebpf(sock.fileno(), self._program.fileno())
                is_attached = True
