"""Prompts of one's own: every format gives the same table; the table keeps order, drops duplicates, splits by content; faults are named."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sdxs.errors import InvalidRequest, NotFound
from sdxs.settings import Settings
from trainer.data import prompts
from trainer.data.prompts import PromptTable, caption_hashes, fetch_prompts, open_prompts
from trainer.data.rows import clean
from trainer.data.source import Captions, PromptSource, WorldPrompts
from trainer.sections import DataSection
from trainer.worlds.base import get_world

CAPTIONS = [f"thing {i} of glass" for i in range(30)]


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_text(folder: Path, captions: list[str]) -> str:
    (folder / "p.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(captions).encode())
    return str(folder / "p.txt")


def write_jsonl(folder: Path, captions: list[str]) -> str:
    lines = [json.dumps({"caption": caption, "n": 1}) for caption in captions]
    with gzip.open(folder / "p.jsonl.gz", "wt") as file:
        file.write("\n".join(lines) + "\n")
    return str(folder)


def write_parquet(folder: Path, captions: list[str]) -> str:
    """Two files, several row groups, dictionary-encoded strings, beside a file that is none of the data."""
    half = len(captions) // 2
    for number, part in enumerate((captions[:half], captions[half:])):
        table = pa.table({"other": range(len(part)), "caption": pa.array(part).dictionary_encode()})
        pq.write_table(table, folder / f"part-{number}.parquet", row_group_size=7)
    (folder / "README.md").write_text("about")
    return str(folder / "part-*.parquet")


def write_webdataset(folder: Path, captions: list[str]) -> str:
    """Captions in .txt and in .json by turns, beside images."""
    members = dict[str, bytes]()
    for i, caption in enumerate(captions):
        members[f"a/{i:03}.jpg"] = b"not looked at"
        members |= (
            {f"a/{i:03}.txt": caption.encode()} if i % 2 else {f"a/{i:03}.json": json.dumps({"caption": caption}).encode()}
        )
    write_tar(folder / "p.tar", members)
    return str(folder)


@pytest.mark.parametrize("write", [write_text, write_jsonl, write_parquet, write_webdataset])
def test_every_format_gives_the_same_table(write, tmp_path: Path, local: Settings) -> None:  # type: ignore[no-untyped-def]
    (folder := tmp_path / "data").mkdir()
    source = write(folder, [*CAPTIONS[:20], "  thing 3\tof  glass ", *CAPTIONS[20:]])
    table = open_prompts(DataSection(prompts=source, heldout=5), local)
    smallest = set(np.argsort(caption_hashes(CAPTIONS))[:5].tolist())
    assert list(Captions(table, "train")) == [c for i, c in enumerate(CAPTIONS) if i not in smallest]
    assert list(Captions(table, "heldout")) == [c for i, c in enumerate(CAPTIONS) if i in smallest]
    assert (table.facts["duplicates"], table.facts["rows"]) == (1, 31)
    assert table.digest == DIGEST


DIGEST = "fedc7a9217494edb"  # of these captions and this split, whatever the format


def test_lookups_are_by_number_in_any_order(tmp_path: Path, local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "SHARD_ROWS", 7)
    monkeypatch.setattr("trainer.data.rows.BLOCK_ROWS", 4)
    table = open_prompts(DataSection(prompts=write_text(tmp_path, CAPTIONS), heldout=0), local)
    assert len(list(table.folder.glob("train-*.arrow"))) == 5
    indices = np.random.default_rng(0).integers(30, size=100)
    assert table.take("train", indices) == [CAPTIONS[i] for i in indices]
    assert pickle.loads(pickle.dumps(table)).take("train", [29, 0]) == [CAPTIONS[29], CAPTIONS[0]]
    assert (table.take("train", []), table.count("heldout")) == ([], 0)
    for index in (-1, 30):
        with pytest.raises(IndexError, match="30 prompts"):
            table.take("train", [index])
    view = Captions(table, "train")
    assert (view[-1], view[2:4], len(view)) == (CAPTIONS[29], CAPTIONS[2:4], 30)


def test_files_are_read_once_and_a_table_found_by_its_digest(
    tmp_path: Path, local: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = DataSection(prompts=write_text(tmp_path, CAPTIONS), heldout=5)
    digest = open_prompts(section, local).digest
    elsewhere = local.model_copy(update={"cache_dir": tmp_path / "another"})
    monkeypatch.setattr(prompts, "build", None)
    assert open_prompts(section, elsewhere).digest == fetch_prompts(digest, elsewhere).digest == digest
    monkeypatch.undo()
    (tmp_path / "p.txt").write_text("\n".join([*CAPTIONS, "one more"]))
    assert open_prompts(section, local).digest != digest


@given(st.lists(st.text("abc", min_size=1, max_size=6), unique=True, min_size=8), st.data())
@hypothesis_settings(max_examples=50, deadline=None)
def test_added_rows_hold_out_nothing_that_was_trained_on(captions: list[str], data: st.DataObject) -> None:
    section = DataSection(prompts="-", heldout=3)
    before = data.draw(st.integers(4, len(captions)))

    def train(some: list[str]) -> set[str]:
        return {some[i] for i in prompts._choose(caption_hashes(some), section).train}

    assert train(captions[:before]) <= train(captions)


@given(st.text())
def test_cleaned_captions_are_stable_and_printable(text: str) -> None:
    caption, kind, _ = clean(text)
    assert (caption is None) == (kind is not None)
    if caption is not None:
        assert clean(caption)[0] == caption == caption.strip()
        assert "\n" not in caption and caption.encode().decode() == caption


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("p.txt", b"one\n \ntwo\n", r"p\.txt:2: nothing but white space.*at least one character"),
        ("p.txt", b"one\n\xff\n", r"p\.txt:2: byte 0xFF at 1.*UTF-8"),
        ("p.txt", b"one\na\x00b\n", r"p\.txt:2: U\+0000 at character 2.*control"),
        ("p.jsonl", b'{"caption": "a"}\n{"caption": 3}\n', r"p\.jsonl:2: 3 \(int\).*a string, in caption"),
        ("p.jsonl", b'{"caption": "a"}\n{"text": "b"}\n', r"p\.jsonl:2: fields text.*a caption"),
        ("p.jsonl", b'{"caption": "a"\n', r"p\.jsonl:1: .*one JSON object"),
        ("p.jsonl", b'{"caption": "\\ud800"}\n', r"p\.jsonl:1: half a character"),
        ("p.jsonl", b"[1]\n", r"p\.jsonl:1: a list"),
        ("p.parquet", b"PAR1 no", r"p\.parquet: .*whole file"),
        ("p.tar", b"no tar" * 200, r"p\.tar: .*whole file"),
        ("p.txt", b"", "more than 1 different prompts"),
        ("p.txt", b"a\na\n", "more than 1 different prompts"),
        ("p.md", b"a\n", "data.format.*text"),
    ],
)
def test_a_wrong_row_is_refused_by_name(name: str, data: bytes, words: str, tmp_path: Path, local: Settings) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InvalidRequest, match=words):
        open_prompts(DataSection(prompts=str(tmp_path / name), heldout=1), local)
    assert not list((tmp_path / "store").rglob("*.arrow"))


def test_what_is_not_there_and_what_is_two_things(tmp_path: Path, local: Settings) -> None:
    with pytest.raises(NotFound, match=r"data\.prompts: no file"):
        open_prompts(DataSection(prompts=str(tmp_path / "none*")), local)
    with pytest.raises(InvalidRequest, match="s3://bucket/path"):
        open_prompts(DataSection(prompts="gs://bucket/x"), local)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/a.txt").write_text("a")
    (tmp_path / "d/b.jsonl").write_text('{"caption": "b"}')
    with pytest.raises(InvalidRequest, match=r"data\.format"):
        open_prompts(DataSection(prompts=str(tmp_path / "d")), local)
    table = open_prompts(DataSection(prompts=str(tmp_path / "d"), format="jsonl", heldout=0), local)
    assert table.take("train", [0]) == ["b"]


def test_a_world_is_a_source_too() -> None:
    world = get_world("scenes")
    source: PromptSource = WorldPrompts(world)
    assert list(Captions(source, "heldout")) == world.captions("heldout")
    assert source.take("train", np.array([5, 0])) == [world.captions("train")[5], world.captions("train")[0]]
    assert source.digest == WorldPrompts(world).digest != WorldPrompts(get_world("emoji")).digest


def test_a_table_is_a_source(tmp_path: Path, local: Settings) -> None:
    source: PromptSource = open_prompts(DataSection(prompts=write_text(tmp_path, CAPTIONS), heldout=1), local)
    assert isinstance(source, PromptTable) and source.count("train") == 29
