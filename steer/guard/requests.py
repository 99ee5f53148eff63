"""Takes requests at the control socket while there is no controller.

`control.server` does that for a controller. This one needs no event loop, which would take much
memory in a guard process: it registers callbacks with a selector of its caller.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, BaseSelector

import msgspec

from steer.control import peer
from steer.control.protocol import (
    BACKLOG,
    NOT_COMPLETE,
    REQUEST_MAX_BYTES,
    SILENT_MAX,
    TIMEOUT_S,
    TOO_LONG,
    Request,
    decode_request,
)

_CHUNK_BYTES = 16384
_PAUSE_S = 0.05
"""How long to wait after a connection could not be taken."""


class Connection:
    """One connection, with one request."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self.since_s = time.monotonic()
        self.data = bytearray()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def pid(self) -> int:
        """The process id of the client."""
        return peer.credentials(self._socket)[0]

    def has_more(self, end_s: float) -> bool:
        """Wait until `end_s` for more to read. Returns whether there is any."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(max(0.0, end_s - time.monotonic()) * 1000))

    def read(self) -> bool:
        """Read what is there. Returns whether more may follow."""
        try:
            data = self._socket.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return True
        except ConnectionError:
            return False
        self.data += data
        return bool(data)

    def request(self) -> Request:
        """The request. Raises ValueError: it is not a request, see `decode_request`."""
        line, end, _ = self.data.partition(b"\n")
        if len(line) > REQUEST_MAX_BYTES:
            raise ValueError(TOO_LONG)
        if not end:
            raise ValueError(NOT_COMPLETE)
        return decode_request(bytes(line), self._socket)

    def answer(self, answer: Mapping[str, object], fds: Sequence[int] = ()) -> None:
        """Answer and close the connection. An answer is short enough for the empty socket
        buffer."""
        with self._socket as sock, suppress(OSError):
            socket.send_fds(sock, [msgspec.json.encode(answer) + b"\n"], fds)


class StandbyServer:
    """Passes complete requests to `handle`, and limits all other connections.

    Args:
        control: the listening control socket; the caller closes it.
        handle: takes a request and its connection, and answers it now or later.
        refuse: makes the answer from the reason for a refusal.
    """

    def __init__(
        self,
        control: socket.socket,
        selector: BaseSelector,
        handle: Callable[[Request, Connection], None],
        refuse: Callable[[str], Mapping[str, object]],
    ) -> None:
        self._control = control
        self._selector = selector
        self._handle = handle
        self._refuse = refuse
        self._connections: dict[Connection, None] = {}
        self._listen()

    def _listen(self) -> None:
        self._control.setblocking(False)
        # listen(2) again: it records this process as the peer that clients see (unix(7),
        # SO_PEERCRED).
        self._control.listen(BACKLOG)
        self._selector.register(self._control, EVENT_READ, self._on_connection)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Take no connections meanwhile: the descriptor may be replaced by another socket."""
        self._selector.unregister(self._control)
        try:
            yield
        finally:
            self._listen()

    @property
    def is_busy(self) -> bool:
        return bool(self._connections)

    def let_go(self) -> None:
        """Close connections that have sent no complete request within the timeout."""
        limit_s = time.monotonic() - TIMEOUT_S
        for connection in [each for each in self._connections if each.since_s < limit_s]:
            self._finish(connection)

    def close(self, within_s: float) -> None:
        """Take no more connections. Those that are open may still send a request within
        `within_s`."""
        self._selector.unregister(self._control)
        end_s = time.monotonic() + within_s
        for connection in list(self._connections):
            while connection in self._connections and connection.has_more(end_s):
                self._on_data(connection)
            if connection in self._connections:
                self._finish(connection)

    def _on_connection(self) -> None:
        if len(self._connections) >= SILENT_MAX:
            self._finish(next(iter(self._connections)))
        try:
            sock, _ = self._control.accept()
        except BlockingIOError:
            return
        except OSError:  # no descriptor to be had, say
            time.sleep(_PAUSE_S)
            return
        connection = Connection(sock)
        self._connections[connection] = None
        self._selector.register(connection, EVENT_READ, lambda: self._on_data(connection))

    def _on_data(self, connection: Connection) -> None:
        more = connection.read()
        if not more or b"\n" in connection.data or len(connection.data) > REQUEST_MAX_BYTES:
            self._finish(connection)

    def _finish(self, connection: Connection) -> None:
        del self._connections[connection]
        self._selector.unregister(connection)
        try:
            request = connection.request()
        except ValueError as error:
            connection.answer(self._refuse(str(error)))
        else:
            self._handle(request, connection)
