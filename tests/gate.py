"""A TCP door in front of a server that a test can shut: connections through it are cut, new ones refused, until it opens again."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sdxs.embedded import free_port


class Gate:
    """Forwards 127.0.0.1:`port` to a server's address."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.target, self.port = target, free_port()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self.open()

    def open(self) -> None:
        """Accept connections."""
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        listener.listen(64)
        self._listener = listener
        threading.Thread(target=self._accept, args=[listener], daemon=True).start()

    def shut(self) -> None:
        """Cut all connections and refuse new ones."""
        assert self._listener is not None
        for one in [self._listener, *self._connections]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._connections.clear()

    def shut_for(self, seconds: float) -> None:
        """Shut now, open again later; returns at once."""
        self.shut()
        timer = threading.Timer(seconds, self.open)
        timer.daemon = True
        timer.start()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(self.target)
                self._connections |= {client, server}
                for source, sink in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=[source, sink], daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)


@contextmanager
def gate(address: str) -> Iterator[Gate]:
    """A gate before host:port."""
    host, _, port = address.rpartition(":")
    made = Gate((host, int(port)))
    try:
        yield made
    finally:
        with suppress(OSError):
            made.shut()
