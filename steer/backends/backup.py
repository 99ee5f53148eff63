"""Backup listeners: sockets of the controller where connections wait while there is no worker.

They are in the group like the listeners of workers, but are selected only while no worker can be.
The controller never accepts from them. As soon as there is a worker, their queues are moved to it.

Each TCP bind has two, because a listener does not listen for a moment while its queue is moved. If
the last worker dies at that moment, the kernel finds the other one, and resets no connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from itertools import islice

from steer import abi
from steer.backends.connections import Counting
from steer.config.address import Bind
from steer.config.service import Service
from steer.sockets import listeners, port_checks, reuseport

COUNT = abi.BACKUPS

Lend = Callable[[], AbstractContextManager[Mapping[int, socket.socket]]]
"""Lends, by bind, sockets of a worker that serves, and none if nobody does. May raise
KernelError."""
Put = Callable[[int, int], None]
"""Puts a socket into the group's sockarray. Takes its index in the pair, and the descriptor."""
Join = Callable[[int, int, int], None]
"""Puts a socket into a sockarray. Takes the number of the bind, the slot and the descriptor."""


class BackupListeners:
    """The backup listeners of one service; none is open before `open`.

    Args:
        service: says with which backlog and socket options to listen.
        first_slot: the slot after the last one of a worker.
        counting: counts the connections that wait there.
        prepare: called before any is opened. Returns whether their queues can be moved; if not,
            none is opened.
        synchronize: waits until no running program can select by an earlier table.

    Attributes:
        slots: their slots, which come after those of workers; the same in each group.
    """

    def __init__(
        self,
        binds: Sequence[Bind],
        service: Service,
        first_slot: int,
        counting: Counting,
        join: Join,
        prepare: Callable[[], bool],
        synchronize: Callable[[], None],
    ) -> None:
        self.slots = range(first_slot, first_slot + COUNT)
        self._binds, self._service = binds, service
        self._counting, self._join = counting, join
        self._prepare, self._synchronize = prepare, synchronize
        self._stamps: Sequence[int] = ()
        self._has_served = False
        self._pairs = [Pair(self._count, partial(self._put, at)) for at in range(len(binds))]

    def _count(self, index: int, fd: int) -> None:
        self._counting.add_listener(self.slots[index], fd, self._stamps[index])

    def _put(self, bind: int, index: int, fd: int) -> None:
        self._join(bind, self.slots[index], fd)

    def _stamp(self) -> None:
        self._stamps = [self._counting.slots.begin(slot) for slot in self.slots]

    @property
    def sockets(self) -> Sequence[socket.socket]:
        return [sock for pair in self._pairs for sock in pair.sockets]

    @contextmanager
    def or_lent(self, lend: Lend) -> Iterator[Mapping[int, socket.socket]]:
        """By bind, one of the backup listeners; for a bind without any, a socket of a worker.

        Raises:
            KernelError: see `Lend`.
        """
        listeners = {at: pair.sockets[0] for at, pair in enumerate(self._pairs) if pair.sockets}
        if len(listeners) == len(self._pairs):
            yield listeners
            return
        with lend() as lent:
            yield {**lent, **listeners}

    def open(self) -> None:
        """Open the backup listeners of each TCP bind that has none.

        Raises:
            BindError, KernelError
        """
        can_move = self._prepare()
        self._stamp()
        for pair, bind in zip(self._pairs, self._binds, strict=True):
            if bind.protocol == "tcp" and can_move and not pair.sockets:
                pair.open(bind, self._service)

    def renew(self, service: Service) -> None:
        """Listen with the backlog and socket options of another configuration.

        Raises:
            BindError, KernelError: some listen as before.
        """
        before, self._service = self._service, service
        if (before.backlog, before.settings) == (service.backlog, service.settings):
            return
        self._stamp()
        with ExitStack() as gone:
            for pair, bind in zip(self._pairs, self._binds, strict=True):
                pair.renew(bind, service, gone)
            # As in `empty`: no handshake may be under way to a listener that is closed.
            self._synchronize()

    def empty(self) -> None:
        """Move the connections that wait there to workers."""
        # Otherwise a handshake that is under way could find the socket not listening, and be reset.
        # Not when a service starts, because that would delay the start: such an early client may
        # try again.
        if self._has_served:
            self._synchronize()
        self._has_served = True
        for pair in self._pairs:
            pair.empty()

    def listen_again(self) -> Iterator[tuple[int, int, socket.socket]]:
        """Listen again on each socket that does not: an earlier controller may have been killed
        while it moved a queue.

        Yields:
            the bind, slot and socket of each, to be put into its sockarray.
        """
        for at, pair in enumerate(self._pairs):
            for slot, sock in zip(self.slots, pair.sockets, strict=False):
                if not listeners.waiting(sock).limit:
                    sock.listen(self._service.backlog)
                yield at, slot, sock

    @property
    def numbers(self) -> list[int]:
        """How many backup listeners each bind has, as `receive` needs it."""
        return [len(pair.sockets) for pair in self._pairs]

    def receive(self, numbers: Sequence[int], fds: Iterable[int]) -> None:
        """Take over the backup listeners of an earlier controller.

        Args:
            fds: their descriptors, in the order of `sockets`; `close` closes them.
        """
        rest = iter(fds)
        for pair, number in zip(self._pairs, numbers, strict=True):
            pair.receive(list(islice(rest, number)))
        self._has_served = True

    def shut_down(self) -> None:
        """Take them out of their groups, even while the guard has duplicates."""
        for sock in self.sockets:
            sock.shutdown(socket.SHUT_RDWR)
        self.close()

    def close(self) -> None:
        for pair in self._pairs:
            pair.close()


class Pair:
    """The backup listeners of one bind.

    Args:
        bound: called for each socket before it listens.
        put: called for each socket, and each time it listens again.
    """

    def __init__(self, bound: Put, put: Put) -> None:
        self._bound = bound
        self._put = put
        self.sockets: list[socket.socket] = []

    def open(self, bind: Bind, service: Service) -> None:
        """Raises BindError, KernelError."""
        for index in range(COUNT):
            self.sockets.append(self._member(index, bind, service))
            self._put(index, self.sockets[index].fileno())

    def renew(self, bind: Bind, service: Service, gone: ExitStack) -> None:
        """Replace both by new ones with the backlog and options of another configuration.

        Args:
            gone: shuts the former ones down when it is closed, which moves their queues.

        Raises:
            BindError, KernelError: some listen as before.
        """
        for index, old in enumerate(self.sockets):
            self.sockets[index] = self._member(index, bind, service)
            gone.callback(_end, old)
            self._put(index, self.sockets[index].fileno())

    def _member(self, index: int, bind: Bind, service: Service) -> socket.socket:
        bound = partial(self._bound, index)
        try:
            return reuseport.member(bind, service.backlog, bound, service.settings)
        except OSError as error:
            raise port_checks.bind_error(bind, error) from None

    def receive(self, fds: Sequence[int]) -> None:
        """See `BackupListeners.receive`."""
        self.sockets = [socket.socket(fileno=fd) for fd in fds]

    def empty(self) -> None:
        """Move the connections that wait here to where the group's program selects."""
        for index, sock in enumerate(self.sockets):
            if listeners.waiting(sock).queued:
                listeners.move_queue(sock)
                self._put(index, sock.fileno())

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        self.sockets = []


def _end(sock: socket.socket) -> None:
    """Shut a listener down. To close it is not enough, because the guard has a duplicate."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()
