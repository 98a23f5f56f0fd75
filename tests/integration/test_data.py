"""The same rows through Ray Data and from S3 as in this process: prompts, captioned images, latents."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import SecretStr

from sdxs.errors import InvalidRequest, NotFound, PermissionDenied, Unavailable
from sdxs.settings import Settings
from sdxs.store import open_url
from tests.unit.test_data_images import Encoder, image_folder, shards
from trainer.data.check import Limits, check_images, check_prompts
from trainer.data.files import Entry, Files, find, s3_filesystem, stream
from trainer.data.images import read_images
from trainer.data.latent_cache import cached_latents
from trainer.data.prompts import fetch_prompts, open_prompts
from trainer.data.rows import read_rows
from trainer.data.source import Captions
from trainer.sections import DataSection, ImagesSection


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from trainer.session import ray_session

    with ray_session():
        yield


@pytest.fixture
def remote(s3_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a real S3 server."""
    for name, value in s3_variables.items():
        monkeypatch.setenv(name, value)
    return Settings(cache_dir=tmp_path / "cache")


def upload(folder: Path, bucket: str, settings: Settings) -> None:
    store = open_url(f"s3://{bucket}", settings)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        store.put_file(path.relative_to(folder).as_posix(), path)


def write_prompts(folder: Path) -> list[str]:
    """Five files with 40 prompts each."""
    folder.mkdir()
    captions = [f"prompt {i}" for i in range(200)]
    for part in range(5):
        lines = [json.dumps({"caption": caption}) for caption in captions[40 * part : 40 * part + 40]]
        (folder / f"part-{part}.jsonl").write_text("\n".join(lines))
    return captions


def test_blocks_keep_their_order(cluster: None) -> None:
    def late(part: int) -> Iterator[pa.Table]:
        """The first part is the last to be ready."""
        for block in range(3):
            time.sleep(0.2 if part == 0 else 0)
            yield pa.table({"part": [part] * 4, "block": [block] * 4})

    found = [
        (block["part"][0].as_py(), block["block"][i].as_py()) for block in stream(range(4), late) for i in range(len(block))
    ]
    assert found == [(part, block) for part in range(4) for block in range(3) for _ in range(4)]


def test_prompts_from_s3_through_ray_data(cluster: None, remote: Settings, tmp_path: Path) -> None:
    captions = write_prompts(tmp_path / "d")
    upload(tmp_path / "d", "prompts", remote)
    table = open_prompts(DataSection(prompts="s3://prompts/part-*.jsonl", heldout=10), remote)
    held = set(Captions(table, "heldout"))
    assert list(Captions(table, "train")) == [caption for caption in captions if caption not in held] and len(held) == 10
    again = fetch_prompts(table.digest, remote.model_copy(update={"cache_dir": tmp_path / "another"}))
    assert again.take("train", [189, 3]) == table.take("train", [189, 3])
    assert open_prompts(DataSection(prompts="s3://prompts", heldout=10), remote).digest == table.digest


def test_images_from_s3_through_ray_data(cluster: None, remote: Settings, tmp_path: Path) -> None:
    upload(image_folder(tmp_path / "d"), "photos", remote)
    here = list(read_images(str(tmp_path / "d"), remote, 8, "text"))
    there = list(read_images("s3://photos", remote, 8, "text"))
    assert [(i.sha256, i.caption, i.image_HWC.tobytes()) for i in here if i.image_HWC is not None] == [
        (i.sha256, i.caption, i.image_HWC.tobytes()) for i in there if i.image_HWC is not None
    ]
    assert len(there) == 5


def test_latents_of_shards_in_s3(cluster: None, remote: Settings, tmp_path: Path) -> None:
    upload(shards(tmp_path / "d", range(10)), "shards", remote)
    section, encode = ImagesSection(images="s3://shards/*.tar", size=8), Encoder()
    kept = cached_latents(section, encode, "vae", remote)
    assert [int(8 * row[0, 0, 0]) for row in kept.take(list(range(10)))] == list(range(10)) and encode.seen == 10
    cached_latents(section, encode, "vae", remote.model_copy(update={"cache_dir": tmp_path / "another"}))
    assert encode.seen == 10


def test_check_through_ray_data(cluster: None, remote: Settings, tmp_path: Path) -> None:
    write_prompts(tmp_path / "d")
    (tmp_path / "d/part-2.jsonl").write_text('{"caption": "prompt 3"}\n{}')
    report = check_prompts(find(str(tmp_path / "d"), remote, "x"), None, "caption", Limits())
    assert [(fault.place, fault.what) for fault in report.faults] == [
        ("part-2.jsonl:1", "the same as part-0.jsonl:4"), ("part-2.jsonl:2", "fields "),
    ]  # fmt: skip
    assert (report.rows, report.good) == (162, 160)
    images = check_images(find(str(image_folder(tmp_path / "i")), remote, "x"), None, "text", 9, Limits())
    assert (images.rows, images.kinds["small"]) == (5, 5)
    with pytest.raises(InvalidRequest, match=r"part-2\.jsonl:2"):
        open_prompts(DataSection(prompts=str(tmp_path / "d")), remote)


def test_buckets_that_are_not_there_or_not_ours(remote: Settings) -> None:
    with pytest.raises(NotFound, match=r"data\.prompts: no file"):
        open_prompts(DataSection(prompts="s3://nowhere/x.txt"), remote)
    stranger = remote.model_copy(update={"s3_secret_key": SecretStr("wrong")})
    with pytest.raises(PermissionDenied, match="credentials"):
        find("s3://prompts/part-0.jsonl", stranger, "data.prompts")


def test_a_store_that_does_not_answer_is_no_fault_of_the_file() -> None:
    nowhere = Settings(s3_endpoint="127.0.0.1:1", s3_access_key="a", s3_secret_key=SecretStr("b"))
    with pytest.raises(Unavailable, match=r"data\.prompts: 's3://x/y\.txt' cannot be listed"):
        find("s3://x/y.txt", nowhere, "data.prompts")
    files = Files("s3://x", s3_filesystem(nowhere), (Entry("y.txt", "x/y.txt", 3, 0),))
    with pytest.raises(Unavailable, match=r"'y\.txt' cannot be read"):
        list(read_rows(files, files.entries, "text", "caption"))
