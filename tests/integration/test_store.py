"""Both stores by the same tests: a folder, and a real S3 server."""

from __future__ import annotations

import hashlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from sdxs.embedded import free_port
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed, Unavailable
from sdxs.settings import Settings
from sdxs.store import FileStore, ObjectStore, open_store
from sdxs.store.s3 import S3Store

MINUTE = timedelta(minutes=1)


def s3_settings(variables: dict[str, str], **changes: str) -> Settings:
    """Settings from the SDXS_* variables of the fixture."""
    values = {name.removeprefix("SDXS_").lower(): value for name, value in variables.items()}
    return Settings.model_validate({**values, **changes})


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    """An empty store of either kind."""
    if request.param == "file":
        yield FileStore(tmp_path / "store")
    else:
        variables = request.getfixturevalue("s3_variables")
        place = hashlib.sha256(request.node.name.encode()).hexdigest()[:16]
        yield open_store(s3_settings(variables, store_url=f"s3://sdxs/{place}"), "artifacts")


def test_what_is_written_is_read(store: ObjectStore, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(bytes(range(256)) * 48_000)  # 12 MB: several parts
    store.put_file("a/big", big)
    store.put_bytes("a/b/small", b"\x00small")
    store.get_file("a/big", tmp_path / "deep" / "back")
    assert (tmp_path / "deep" / "back").read_bytes() == big.read_bytes()
    assert store.get_bytes("a/b/small") == b"\x00small"
    assert list(store.list("a/")) == ["a/b/small", "a/big"]
    assert list(store.list("b")) == []


def test_delete_and_absence(store: ObjectStore, tmp_path: Path) -> None:
    store.put_bytes("k", b"1")
    store.delete("k")
    store.delete("k")
    assert not store.exists("k")
    with pytest.raises(NotFound, match="'k'"):
        store.get_bytes("k")
    with pytest.raises(NotFound):
        store.get_file("k", tmp_path / "k")
    assert list(tmp_path.glob("*k*")) == []


def test_conditional_put_refuses_a_stale_tag(store: ObjectStore) -> None:
    store.put_if("pointer", b"one", None)
    with pytest.raises(PreconditionFailed):
        store.put_if("pointer", b"other", None)
    data, tag = store.get_tagged("pointer")
    assert data == b"one"
    store.put_if("pointer", b"two", tag)
    with pytest.raises(PreconditionFailed):
        store.put_if("pointer", b"three", tag)
    assert store.get_bytes("pointer") == b"two"


def test_of_racing_conditional_puts_none_is_lost(store: ObjectStore) -> None:
    store.put_if("count", b"0", None)

    def add_five() -> None:
        for _ in range(5):
            while True:
                data, tag = store.get_tagged("count")
                try:
                    store.put_if("count", str(int(data) + 1).encode(), tag)
                except PreconditionFailed:
                    continue
                break

    threads = [threading.Thread(target=add_five) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.get_bytes("count") == b"15"


def test_readers_never_see_half_of_a_write(store: ObjectStore) -> None:
    versions = [letter * 300_000 for letter in (b"a", b"b")]
    store.put_bytes("k", versions[0])
    ended = threading.Event()

    def write() -> None:
        for i in range(10):
            store.put_bytes("k", versions[i % 2])
        ended.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not ended.is_set():
        assert store.get_bytes("k") in versions
    thread.join()


def test_presigned_url_reads_without_credentials(store: ObjectStore) -> None:
    store.put_bytes("picture.png", b"pixels")
    with urllib.request.urlopen(store.presign_get("picture.png", MINUTE)) as answer:
        assert answer.read() == b"pixels"


def test_presigned_urls_lead_to_the_public_address(s3_variables: dict[str, str]) -> None:
    inside = s3_variables["SDXS_S3_ENDPOINT"]
    outside = inside.replace("127.0.0.1", "localhost")
    plain = open_store(s3_settings(s3_variables, store_url="s3://sdxs/public"), "artifacts")
    public = open_store(
        s3_settings(s3_variables, store_url="s3://sdxs/public", s3_public_url=f"http://{outside}/"), "artifacts"
    )
    public.put_if("picture.png", b"pixels", None)
    url = public.presign_get("picture.png", MINUTE)
    assert url.startswith(f"http://{outside}/sdxs-artifacts/public/picture.png?")
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"pixels"
    moved = plain.presign_get("picture.png", MINUTE).replace(inside, outside)
    with pytest.raises(urllib.error.HTTPError, match="403"):  # why it needs a client of its own
        urllib.request.urlopen(moved)


def test_folder_store_notices_changed_bytes(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.put_bytes("a/k", b"right")
    (tmp_path / "a" / "k").write_bytes(b"wrong")
    with pytest.raises(CorruptArtifact, match="a/k"):
        store.get_bytes("a/k")
    with pytest.raises(CorruptArtifact, match="a/k"):
        store.get_file("a/k", tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


@pytest.mark.parametrize("key", ["../out", "/etc/passwd", "a/../../out", "", ".lock"])
def test_folder_store_keeps_keys_inside(tmp_path: Path, key: str) -> None:
    with pytest.raises(InvalidRequest, match="key"):
        FileStore(tmp_path / "store").put_bytes(key, b"")


def test_s3_notices_changed_bytes(s3_variables: dict[str, str]) -> None:
    store = open_store(s3_settings(s3_variables), "models")
    assert isinstance(store, S3Store)
    wrong = {"x-amz-meta-sha256": hashlib.sha256(b"right").hexdigest()}
    import io

    store.client.put_object(store.bucket, "bad", io.BytesIO(b"wrong"), 5, metadata=dict(wrong))
    with pytest.raises(CorruptArtifact, match="bad"):
        store.get_bytes("bad")


def test_s3_refuses_a_wrong_secret(s3_variables: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied):
        open_store(s3_settings(s3_variables, s3_secret_key="wrong"), "models").exists("k")


def test_s3_that_is_not_there_is_unavailable(s3_variables: dict[str, str]) -> None:
    with pytest.raises(Unavailable):
        open_store(s3_settings(s3_variables, s3_endpoint=f"127.0.0.1:{free_port()}"), "models").exists("k")


def test_unknown_scheme() -> None:
    with pytest.raises(InvalidRequest, match="store_url"):
        open_store(Settings(store_url="ftp://x"), "models")
