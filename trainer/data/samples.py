"""Captioned images before they are decoded: an image folder (captions beside the files or in metadata.jsonl) or WebDataset shards.

Every image and every caption comes out, with its partner or with what is wrong.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import NamedTuple

from pyarrow.fs import FileSystem

from sdxs.errors import InvalidRequest
from trainer.data.files import Entry, Files, breakage
from trainer.data.rows import Row, decoded, of_json, of_members, of_text, opened, samples

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
PART_IMAGES = 128


class Sample(NamedTuple):
    """An image's file ending and bytes, and its row; of a faulty one they may be missing."""

    file: str
    row: Row
    suffix: str = ""
    data: bytes = b""


@dataclass(frozen=True)
class Reference:
    """An image of a folder: where it and its caption are. `row` is that of `file`, which names it in messages."""

    file: str
    row: Row
    image: Entry | None = None
    caption: Entry | None = None


def choose_format(files: Files, given: str | None) -> str:
    """`folder` or `webdataset`. Raises InvalidRequest when the files are neither."""
    tars = any(entry.name.lower().endswith((".tar", ".tar.gz", ".tgz")) for entry in files.entries)
    images = any(_is_image(entry.name) for entry in files.entries)
    if given == "webdataset" or (given is None and tars and not images):
        return "webdataset"
    if images and (given == "folder" or not tars):
        return "folder"
    raise InvalidRequest("images.images", files.source, f"images ({', '.join(SUFFIXES)}) or WebDataset shards (.tar), not both")


Part = Entry | tuple[Reference, ...]


def parts(files: Files, given: str | None, column: str) -> list[Part]:
    """What can be read at the same time: shards, or some images of a folder each."""
    if choose_format(files, given) == "webdataset":
        return [entry for entry in files.entries if entry.name.lower().endswith((".tar", ".tar.gz", ".tgz"))]
    found = list(references(files, column))
    return [tuple(found[start : start + PART_IMAGES]) for start in range(0, len(found), PART_IMAGES)]


def read_part(part: Part, filesystem: FileSystem, column: str) -> Iterator[Sample]:
    """The samples of one part, in order."""
    if isinstance(part, Entry):
        yield from _shard(part, filesystem, column)
        return
    for reference in part:
        yield _loaded(reference, filesystem)


def references(files: Files, column: str) -> Iterator[Reference]:
    """Of a folder: what its metadata.jsonl files list, in their order; then every other image, sorted; then captions without one."""
    by_name = {entry.name: entry for entry in files.entries}
    listed: set[str] = set()
    for entry in (entry for entry in files.entries if PurePosixPath(entry.name).name == METADATA):
        for reference in _metadata(entry, files.filesystem, by_name, column):
            listed |= {reference.image.name} if reference.image else set()
            yield reference
    captions = {_stem(name): entry for name, entry in by_name.items() if name.lower().endswith(".txt")}
    missing = Row(0, "", None, "missing", "caption", f"neither a .txt beside it nor a row of {METADATA}")
    for name, entry in by_name.items():
        if _is_image(name) and name not in listed:
            caption = captions.get(_stem(name))
            yield Reference(name, Row(0) if caption else missing, entry, caption)
    for stem in sorted(captions.keys() - {_stem(name) for name in by_name if _is_image(name)}):
        yield Reference(captions[stem].name, Row(0, "", None, "partner", "image", "a caption without an image"))


def _metadata(entry: Entry, filesystem: FileSystem, by_name: dict[str, Entry], column: str) -> Iterator[Reference]:
    """The rows of a metadata.jsonl: `file_name`, relative to its folder, and the caption in `column`."""
    folder = PurePosixPath(entry.name).parent
    with opened(filesystem, entry) as file:
        for number, line in enumerate(file, 1):
            text, fault = decoded(line)
            if text is None:
                yield Reference(entry.name, Row(number, "", None, "encoding", "line", fault))
                continue
            row = of_json(number, "", text, column)
            name = _file_name(text) if row.kind != "json" else None
            image = by_name.get((folder / name).as_posix()) if name else None
            if image is None and row.kind != "json":
                row = Row(number, "", None, "partner", "file_name", f"{name}: no such file" if name else "no file_name")
            yield Reference(entry.name, row, image)


def _file_name(line: str) -> str | None:
    name = json.loads(line).get("file_name")
    return name if isinstance(name, str) else None


def _loaded(reference: Reference, filesystem: FileSystem) -> Sample:
    row, image = reference.row, reference.image
    if row.kind or image is None:
        return Sample(reference.file, row)
    try:
        if reference.caption is not None:
            text, fault = decoded(_bytes(filesystem, reference.caption))
            row = Row(0, "", None, "encoding", ".txt", fault) if text is None else of_text(0, "", text, ".txt")
        return Sample(reference.file, row, PurePosixPath(image.name).suffix.lower(), _bytes(filesystem, image))
    except OSError as error:
        return Sample(reference.file, Row(row.row, "", None, "file", "file", breakage(error, image.name)))


def _bytes(filesystem: FileSystem, entry: Entry) -> bytes:
    with filesystem.open_input_stream(entry.path) as file:
        return bytes(file.read())


def _shard(entry: Entry, filesystem: FileSystem, column: str) -> Iterator[Sample]:
    number = 0
    try:
        with opened(filesystem, entry) as file:
            for number, (key, members) in enumerate(samples(file, (*SUFFIXES, ".txt", ".json")), 1):
                yield _of_members(entry.name, number, key, members, column)
    except (OSError, EOFError, tarfile.TarError) as error:
        yield Sample(entry.name, Row(0, "", None, "file", "file", f"{breakage(error, entry.name)} after sample {number}"))


def _of_members(file: str, number: int, key: str, members: dict[str, bytes], column: str) -> Sample:
    suffix = next((name for name in SUFFIXES if name in members), "")
    if not suffix:
        return Sample(file, Row(number, key, None, "partner", "image", f"members {', '.join(sorted(members))}"))
    if ".txt" not in members and ".json" not in members:
        return Sample(file, Row(number, key, None, "partner", "caption", f"members {', '.join(sorted(members))}"))
    return Sample(file, of_members(number, key, members, column), suffix, members[suffix])


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _stem(name: str) -> str:
    return PurePosixPath(name).with_suffix("").as_posix()
