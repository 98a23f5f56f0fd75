"""What becomes of embedded servers when the one who started them is killed, or somebody else wants the same folder."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdxs.embedded import missing
from sdxs.errors import AlreadyExists
from sdxs.settings import Settings

HOLDER = """
import sys, time
from pathlib import Path
from sdxs.embedded import missing
from sdxs.settings import Settings

with missing(Settings(store_url="file:///nowhere"), Path(sys.argv[1])) as variables:
    print(variables["SDXS_REDIS_URL"], flush=True)
    time.sleep(1000)
"""


def test_a_killed_starter_leaves_nothing_and_the_folder_is_free_again(tmp_path: Path) -> None:
    settings = Settings(store_url="file:///nowhere")
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        try:
            url = holder.stdout.readline().strip()
            with pytest.raises(AlreadyExists, match="in use"), missing(settings, tmp_path):
                pass
        finally:
            os.kill(holder.pid, signal.SIGKILL)
    end = time.monotonic() + 5
    while _listens(url):
        assert time.monotonic() < end, "the server outlived its starter"
        time.sleep(0.05)
    with missing(settings, tmp_path) as variables:
        assert _listens(variables["SDXS_REDIS_URL"])


def _listens(url: str) -> bool:
    import redis

    try:
        with redis.Redis.from_url(url, socket_timeout=1) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
