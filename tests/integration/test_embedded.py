"""The embedded servers are real processes: they answer, keep data, and never outlive their user."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from sdxs import embedded
from sdxs.errors import AlreadyExists, PermissionDenied, Unavailable
from sdxs.settings import Settings
from sdxs.store import open_store


def settings(variables: dict[str, str]) -> Settings:
    return Settings.model_validate({name.removeprefix("SDXS_").lower(): value for name, value in variables.items()})


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_redis_keeps_its_data(tmp_path: Path) -> None:
    with embedded.redis_server(tmp_path) as variables, redis.Redis.from_url(variables["SDXS_REDIS_URL"]) as client:
        client.xadd("jobs", {"id": "1"})
        port = client.get_connection_kwargs()["port"]
    assert not listens(port)
    with embedded.redis_server(tmp_path) as variables, redis.Redis.from_url(variables["SDXS_REDIS_URL"]) as client:
        assert client.xlen("jobs") == 1


def test_s3_keeps_its_data_and_keys(tmp_path: Path) -> None:
    with embedded.s3_server(tmp_path) as first:
        open_store(settings(first), "models").put_bytes("models/a", b"weights")
    assert (tmp_path / "credentials.json").stat().st_mode & 0o077 == 0
    with embedded.s3_server(tmp_path) as second:
        assert second["SDXS_S3_SECRET_KEY"] == first["SDXS_S3_SECRET_KEY"]
        assert open_store(settings(second), "models").get_bytes("models/a") == b"weights"
        with pytest.raises(PermissionDenied):
            open_store(settings({**second, "SDXS_S3_ACCESS_KEY": "", "SDXS_S3_SECRET_KEY": ""}), "models").exists("models/a")


def test_two_s3_servers_do_not_meet(s3_variables: dict[str, str], tmp_path: Path) -> None:
    with embedded.s3_server(tmp_path) as variables:
        open_store(settings(variables), "models").put_bytes("only-here", b"")
        assert not open_store(settings(s3_variables), "models").exists("only-here")


USER = """
import sys
from pathlib import Path
from sdxs.embedded import redis_server

with redis_server(Path(sys.argv[1])) as variables:
    print(variables["SDXS_REDIS_URL"].rpartition(":")[2].partition("/")[0], flush=True)
    sys.stdin.read()
"""


def test_a_server_ends_with_a_killed_user(tmp_path: Path) -> None:
    command = [sys.executable, "-c", USER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}) as process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        assert listens(port)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while listens(port):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_server_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "appendonlydir").write_text("in the way")
    monkeypatch.setattr(embedded, "START_SECONDS", 10)
    with pytest.raises(Unavailable, match="appendonlydir"), embedded.redis_server(tmp_path):
        pass


def test_missing_starts_what_is_not_named(tmp_path: Path) -> None:
    named = Settings(redis_url="redis://elsewhere:6379/0")
    with embedded.missing(named, tmp_path) as variables:
        assert "SDXS_REDIS_URL" not in variables
        assert not open_store(settings(variables), "models").exists("k")
        with pytest.raises(AlreadyExists, match="in use"), embedded.missing(named, tmp_path):
            pass
    with embedded.missing(Settings(redis_url="redis://x", store_url="s3://x"), tmp_path) as variables:
        assert variables == {}
