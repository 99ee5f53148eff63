"""The program that a group had before the attach, to be put back at the end."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack

from steer.loader.foreign import ForeignProgram, SocketArray
from steer.sockets import group_program


class ReplacedProgram:
    """A program of somebody else, with its socket arrays. A socket can be in one socket array only,
    so the arrays are emptied, and filled again at the end with the sockets that still exist.

    Args:
        number: of the program.
        places: of sockets that were taken out already: for each array, their cookies by index.

    Attributes:
        number: the same.

    Raises:
        KernelError: it cannot be opened: CAP_SYS_ADMIN is needed.
    """

    def __init__(self, number: int, places: Sequence[Mapping[int, int]] | None = None) -> None:
        self.number = number
        self._kept: list[tuple[SocketArray, Mapping[int, int]]] = []
        with ExitStack() as undo:
            self._program = undo.enter_context(ForeignProgram(number))
            arrays = [undo.enter_context(each) for each in self._program.socket_arrays()]
            there = [each.cookies() for each in arrays] if places is None else places
            self._kept += zip(arrays, there, strict=True)
            self.close = undo.pop_all().close

    @property
    def places(self) -> list[dict[int, int]]:
        """See `__init__`."""
        return [dict(each) for _, each in self._kept]

    def descriptors(self) -> Sequence[int]:
        """Those that a forked child needs for `put_back`."""
        return [each.fileno() for each in (self._program, *(array for array, _ in self._kept))]

    def take_out(self) -> None:
        """Once another program is attached: free the sockets. Raises KernelError."""
        for array, there in self._kept:
            for index in there:
                array.remove(index)

    def put_back(self, sockets: Iterable[tuple[int, socket.socket]]) -> None:
        """Once no socket is in another array. What is in place already is left as it is.

        Args:
            sockets: those of the group, each with its cookie.

        Raises:
            KernelError
        """
        is_attached = False
        missing = [(array, there.items() - array.cookies().items()) for array, there in self._kept]
        for cookie, sock in sockets:
            for array, places in missing:
                for index in (index for index, each in places if each == cookie):
                    array.put(index, sock.fileno())
            if not is_attached:
                group_program.attach_ebpf(sock.fileno(), self._program.fileno())
                is_attached = True
