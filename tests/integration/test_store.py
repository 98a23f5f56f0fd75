"""Both stores by the same tests: a folder, and a real S3 server."""

from __future__ import annotations

import base64
import hashlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import urllib3
from minio.commonconfig import ENABLED, Filter
from minio.lifecycleconfig import Expiration, LifecycleConfig, Rule

from sdxs.embedded import free_port
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PermissionDenied, PreconditionFailed, Unavailable
from sdxs.settings import Kind, Settings
from sdxs.store import FileStore, ObjectStore, SignedRequest, Upload, open_store, open_url
from sdxs.store.s3 import S3Store
from sdxs.store.s3_client import connect

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


FACTS = {"prompt": "red%20apple", "seed": "7"}


def test_metadata_comes_back_and_goes_with_the_object(store: ObjectStore) -> None:
    store.put_bytes("a/k.png", b"pixels", "image/png", FACTS)
    stat = store.stat("a/k.png")
    assert (stat.size, stat.content_type, {**FACTS, **stat.metadata}) == (6, "image/png", dict(stat.metadata))
    assert abs((datetime.now(UTC) - stat.modified).total_seconds()) < 10
    assert list(store.list("")) == ["a/k.png"]
    store.put_bytes("a/k.png", b"other")
    assert "prompt" not in store.stat("a/k.png").metadata
    store.delete("a/k.png")
    with pytest.raises(NotFound):
        store.stat("a/k.png")


def test_a_touched_object_is_young_and_else_the_same(store: ObjectStore) -> None:
    store.put_bytes("k", b"pixels", "image/png", FACTS)
    before = store.stat("k")
    time.sleep(1.1)  # S3 tells seconds
    store.touch("k")
    after = store.stat("k")
    assert after.modified > before.modified
    assert (after.size, after.content_type, after.metadata) == (before.size, before.content_type, before.metadata)
    assert store.get_bytes("k") == b"pixels"
    with pytest.raises(NotFound):
        store.touch("nothing")


def test_entries_tell_size_and_time(store: ObjectStore) -> None:
    store.put_bytes("a/1", b"1")
    store.put_bytes("a/2", b"22")
    store.put_bytes("b", b"")
    found = list(store.entries("a/"))
    assert [(entry.key, entry.size) for entry in found] == [("a/1", 1), ("a/2", 2)]
    assert all(abs((datetime.now(UTC) - entry.modified).total_seconds()) < 10 for entry in found)


def test_no_more_is_read_than_asked_for(store: ObjectStore) -> None:
    store.put_bytes("k", b"12345")
    assert store.get_bytes("k", at_most=5) == b"12345"
    with pytest.raises(InvalidRequest, match="at most 4 bytes"):
        store.get_bytes("k", at_most=4)


def test_buckets_by_life_cycle(s3_variables: dict[str, str]) -> None:
    settings = s3_settings(s3_variables, store_url="s3://cycles/a", artifacts_url="s3://elsewhere/b/c")
    kinds: tuple[Kind, ...] = ("models", "checkpoints", "artifacts", "datasets")
    for kind in kinds:
        open_store(settings, kind).put_bytes("k", kind.encode())
    places = ["s3://cycles-models/a", "s3://cycles-checkpoints/a", "s3://elsewhere/b/c", "s3://cycles-datasets/a"]
    assert [open_url(place, settings).get_bytes("k").decode() for place in places] == list(kinds)


def test_folders_by_life_cycle(tmp_path: Path) -> None:
    settings = Settings(store_url=f"file://{tmp_path}/store", datasets_url=f"file://{tmp_path}/data")
    open_store(settings, "models").put_bytes("bundles/a", b"1")
    open_store(settings, "datasets").put_bytes("prompts/a", b"2")
    assert (tmp_path / "store" / "models" / "bundles" / "a").read_bytes() == b"1"
    assert (tmp_path / "data" / "prompts" / "a").read_bytes() == b"2"
    with pytest.raises(InvalidRequest, match="models_url: got 'http://x'"):
        open_store(Settings(models_url="http://x"), "models")


def put(signed: SignedRequest, data: bytes, **changes: str) -> int:
    headers = {**signed.headers, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return int(urllib3.request(signed.method, signed.url, body=data, headers=headers, retries=False).status)


def test_a_presigned_put_takes_its_file_alone(s3_variables: dict[str, str]) -> None:
    store = open_store(s3_settings(s3_variables, store_url="s3://sdxs/uploads"), "artifacts")
    data, other = b"\x89PNG right", b"\x89PNG wrong"
    digest, wrong = hashlib.sha256(data).hexdigest(), hashlib.sha256(other)
    signed = store.presign_put("inputs/k", Upload(digest, len(data), "image/png"), MINUTE)
    assert put(signed, other) == 400  # the checksum is the signed one, and the server checks it
    assert put(signed, other, x_amz_checksum_sha256=base64.b64encode(wrong.digest()).decode()) == 403
    assert put(signed, data + b"more", content_length=str(len(data) + 4)) == 403
    assert put(signed, data, content_type="text/html") == 403
    assert put(signed, data, x_amz_acl="public-read") == 403  # nothing else may be said
    assert not store.exists("inputs/k")
    assert put(signed, data) == 200
    assert store.get_bytes("inputs/k") == data
    assert store.stat("inputs/k").content_type == "image/png"


def test_presigned_urls_expire(s3_variables: dict[str, str]) -> None:
    store = open_store(s3_settings(s3_variables, store_url="s3://sdxs/expiry"), "artifacts")
    store.put_bytes("k", b"pixels")
    reading = store.presign_get("k", timedelta(seconds=1))
    writing = store.presign_put("k2", Upload(hashlib.sha256(b"x").hexdigest(), 1, "image/png"), timedelta(seconds=1))
    assert urllib3.request("GET", reading, retries=False).status == 200
    time.sleep(2.1)
    assert urllib3.request("GET", reading, retries=False).status == 403
    assert put(writing, b"x") == 403
    assert not store.exists("k2")


def test_a_folder_takes_no_uploads(tmp_path: Path) -> None:
    with pytest.raises(PreconditionFailed, match="send the image in the request"):
        FileStore(tmp_path).presign_put("k", Upload("0" * 64, 1, "image/png"), MINUTE)


def test_lifecycle_rules_stand_beside_those_of_others(s3_variables: dict[str, str]) -> None:
    settings = s3_settings(s3_variables, store_url="s3://ruled/here")
    store = open_store(settings, "artifacts")
    store.put_bytes("k", b"")
    client, bucket = connect(settings), "ruled-artifacts"
    theirs = Rule(ENABLED, rule_filter=Filter(prefix="theirs/"), rule_id="theirs", expiration=Expiration(days=1))
    client.set_bucket_lifecycle(bucket, LifecycleConfig([theirs]))

    def rules() -> dict[str | None, int | None]:
        present = client.get_bucket_lifecycle(bucket)
        return {rule.rule_filter.prefix: rule.expiration.days for rule in present.rules} if present else {}  # type: ignore[union-attr]

    store.expire_after({"results/": 30, "inputs/": 7})
    assert rules() == {"theirs/": 1, "here/results/": 30, "here/inputs/": 7}
    store.expire_after({"results/": 31, "inputs/": 0})
    assert rules() == {"theirs/": 1, "here/results/": 31}
    client.delete_bucket_lifecycle(bucket)
    store.expire_after({"results/": 0})
    assert rules() == {}
