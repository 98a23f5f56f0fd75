"""A wire that damages what is written over it, and a store that lies: for tests of checksums."""

import contextlib
import hashlib
import http.server
import socket
import threading
from collections.abc import Callable, Iterator


class DamagingProxy:
    """Between a client and a server: turns `needle` into bytes of the same length, as often as `times` says."""

    def __init__(self, server: str, needle: bytes, times: int) -> None:
        host, _, port = server.rpartition(":")
        self._server, self._needle, self.left, self.damaged = (host, int(port)), needle, times, 0
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"

    @contextlib.contextmanager
    def running(self) -> Iterator["DamagingProxy"]:
        accepting = threading.Thread(target=self._accept)
        accepting.start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            accepting.join()
            self._listener.close()

    def _accept(self) -> None:
        """Until the listener is shut; then every connection is."""
        with contextlib.ExitStack() as open_ones:
            while True:
                try:
                    client = open_ones.enter_context(self._listener.accept()[0])
                except OSError:
                    return
                server = open_ones.enter_context(socket.create_connection(self._server))
                for ways in ((client, server, self._damage), (server, client, bytes)):
                    pumping = threading.Thread(target=self._pump, args=ways)
                    pumping.start()
                    open_ones.callback(pumping.join)
                for end in (client, server):
                    open_ones.callback(_shut, end)

    def _pump(self, source: socket.socket, target: socket.socket, change: Callable[[bytes], bytes]) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(change(data))
        for end in (source, target):
            _shut(end)

    def _damage(self, data: bytes) -> bytes:
        with self._lock:
            if self.left and self._needle in data:
                self.left -= 1
                self.damaged += 1
                return data.replace(self._needle, bytes(len(self._needle)), 1)
        return data


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)


class _Liar(http.server.BaseHTTPRequestHandler):
    """Takes every PUT without a look at its checksums, loses its last byte, and tells the ETag of what it kept."""

    protocol_version = "HTTP/1.1"
    deleted: "list[str]"

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200, hashlib.md5(data[:-1]).hexdigest())

    def do_DELETE(self) -> None:
        self.deleted.append(self.path)
        self._answer(204)

    def _answer(self, status: int, etag: str = "") -> None:
        self.send_response(status)
        self.send_header("content-length", "0")
        if etag:
            self.send_header("etag", f'"{etag}"')
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Silence."""


@contextlib.contextmanager
def lying_store() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths of what was deleted."""
    deleted: list[str] = []
    handler = type("Liar", (_Liar,), {"deleted": deleted})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", deleted
        server.shutdown()
