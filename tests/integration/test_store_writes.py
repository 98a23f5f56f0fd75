"""What is written is what arrives, or the writer hears of it: over a wire that damages bytes, and from a store that lies."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from pyarrow.fs import FileSelector

from sdxs.errors import CorruptArtifact, NotFound
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store
from sdxs.store.checksums import PART_BYTES, Checksums
from tests.integration.test_store import s3_settings
from tests.wires import DamagingProxy, lying_store

NEEDLE = b"the bytes that matter"


def stores(variables: dict[str, str], address: str, place: str) -> tuple[ObjectStore, ObjectStore]:
    """The same place over the wire at `address`, and straight."""
    url = {"store_url": f"s3://sdxs/{place}"}
    straight = open_store(s3_settings(variables, **url), "artifacts")
    straight.put_bytes("first", b"")  # the bucket is there
    return open_store(s3_settings(variables, **url, s3_endpoint=address), "artifacts"), straight


def write(store: ObjectStore, how: str, folder: Path) -> None:
    if how == "bytes":
        store.put_bytes("k", NEEDLE)
    elif how == "if":
        store.put_if("k", NEEDLE, None)
    else:
        parts = {"file": b"", "parts": bytes(PART_BYTES + 1000)}[how]
        (folder / "k").write_bytes(parts + NEEDLE)
        store.put_file("k", folder / "k")


@pytest.mark.parametrize("how", ["bytes", "file", "parts", "if"])
def test_a_write_that_is_damaged_once_is_repeated(how: str, s3_variables: dict[str, str], tmp_path: Path) -> None:
    proxy = DamagingProxy(s3_variables["SDXS_S3_ENDPOINT"], NEEDLE, times=1)
    with proxy.running():
        store, straight = stores(s3_variables, proxy.address, f"once-{how}")
        write(store, how, tmp_path)
        assert proxy.damaged == 1
        assert straight.get_bytes("k").endswith(NEEDLE)


@pytest.mark.parametrize("how", ["bytes", "file", "parts", "if"])
def test_a_write_that_is_always_damaged_fails_at_once_and_leaves_nothing(
    how: str, s3_variables: dict[str, str], tmp_path: Path
) -> None:
    proxy = DamagingProxy(s3_variables["SDXS_S3_ENDPOINT"], NEEDLE, times=100)
    with proxy.running():
        store, straight = stores(s3_variables, proxy.address, f"always-{how}")
        with pytest.raises(CorruptArtifact, match="'k'"):
            write(store, how, tmp_path)
        assert proxy.damaged == 3
        assert not straight.exists("k")


def test_an_overwrite_that_is_damaged_leaves_the_old_object(s3_variables: dict[str, str], tmp_path: Path) -> None:
    proxy = DamagingProxy(s3_variables["SDXS_S3_ENDPOINT"], NEEDLE, times=100)
    with proxy.running():
        store, straight = stores(s3_variables, proxy.address, "overwrite")
        straight.put_bytes("k", b"old")
        with pytest.raises(CorruptArtifact):
            store.put_bytes("k", NEEDLE)
        assert straight.get_bytes("k") == b"old"


@pytest.mark.parametrize("how", ["bytes", "file", "if"])
def test_a_store_that_keeps_other_bytes_and_says_fine_is_found_out(how: str, tmp_path: Path) -> None:
    with lying_store() as (address, deleted):
        store = open_store(
            Settings(store_url="s3://sdxs", s3_endpoint=address, s3_access_key="a", s3_secret_key="b"), "artifacts"
        )
        with pytest.raises(CorruptArtifact, match="other bytes"):
            write(store, how, tmp_path)
    assert deleted == ["/sdxs-artifacts/k"] * 3


def test_parts_are_summed_as_s3_does(s3_variables: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 140_000)  # 36 MB: three parts
    store = open_store(s3_settings(s3_variables, store_url="s3://sdxs/parts"), "models")
    store.put_file("k", file)
    tag = store.get_tagged("k")[1].strip('"')
    assert tag == Checksums.of_file(file).etag
    assert tag.endswith("-3")


@pytest.mark.parametrize("size", [0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES])
def test_checksums_by_an_independent_route(size: int) -> None:
    data = hashlib.shake_128(b"bytes").digest(size)
    sums = Checksums.of((data[i : i + 300_007] for i in range(0, size, 300_007)), size)
    parts = [hashlib.md5(data[i : i + PART_BYTES]).digest() for i in range(0, size, PART_BYTES)] or [hashlib.md5(b"").digest()]
    assert sums.sha256 == hashlib.sha256(data).hexdigest()
    assert sums.etag == (parts[0].hex() if len(parts) == 1 else f"{hashlib.md5(b''.join(parts)).hexdigest()}-{len(parts)}")


def test_an_answer_without_a_digest_passes() -> None:
    sums = Checksums.of([b"x"], 1)
    other = Checksums.of([b"y"], 1)
    assert sums.admits(sums.etag, {})
    assert not sums.admits(other.etag, {})
    assert sums.admits("opaque", {})
    assert sums.admits(other.etag, {"x-amz-server-side-encryption": "aws:kms"})  # not an MD5
    assert not sums.admits("opaque", other.headers())


def test_reading_a_missing_bucket_makes_none(s3_variables: dict[str, str]) -> None:
    store = open_store(s3_settings(s3_variables, store_url="s3://nobody"), "models")
    assert not store.exists("k")
    assert list(store.list("")) == []
    store.delete("k")
    with pytest.raises(NotFound):
        store.get_bytes("k")
    whole = s3_settings(s3_variables)
    from sdxs.store.s3_client import connect

    assert not connect(whole).bucket_exists("nobody-models")


def test_checkpoints_that_ray_writes_are_checked_too(s3_variables: dict[str, str]) -> None:
    """By pyarrow, without another try: Ray Train starts the worker again from the checkpoint before."""
    from trainer.data.files import s3_filesystem

    proxy = DamagingProxy(s3_variables["SDXS_S3_ENDPOINT"], NEEDLE, times=100)
    with proxy.running():
        damaging = s3_filesystem(s3_settings(s3_variables, s3_endpoint=proxy.address), attempts=1)
        straight = s3_filesystem(s3_settings(s3_variables))
        straight.create_dir("rays-checkpoints/runs")  # as Ray Train does: makes the bucket
        with (
            pytest.raises(OSError, match="UploadPart"),
            damaging.open_output_stream("rays-checkpoints/runs/state.pt") as stream,
        ):
            stream.write(bytes(1000) + NEEDLE)
        names = [info.base_name for info in straight.get_file_info(FileSelector("rays-checkpoints/runs"))]
        assert "state.pt" not in names
