"""From the bytes of a file to its prompts: text, JSONL, Parquet, WebDataset. Every row comes out, with its prompt or with what is wrong.

Ray Data's own readers refuse a whole file for one bad row and do not say which, and `read_text` also breaks lines at U+2028 and form
feeds; these give the same rows one by one.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import FileSystem

from sdxs.errors import InvalidRequest
from trainer.data.files import BLOCK_ROWS, Entry, Files, breakage, stream

SUFFIXES = {
    "text": (".txt", ".txt.gz", ".txt.zst"),
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst"),
    "parquet": (".parquet", ".pq"),
    "webdataset": (".tar", ".tar.gz", ".tgz"),
}
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Row(NamedTuple):
    """Row `row` (from 1; 0 is the file itself) with its caption, or with the kind of fault, the field it is in and what is there."""

    row: int
    key: str = ""
    caption: str | None = None
    kind: str | None = None
    field: str | None = None
    what: str | None = None


SCHEMA = pa.schema(
    [("file", pa.string()), ("row", pa.int64()), *((name, pa.string()) for name in ("key", "caption", "kind", "field", "what"))]
)


def clean(text: str) -> tuple[str | None, str | None, str | None]:
    """(caption, None, None), or (None, kind of fault, what was found). White space becomes single spaces, as CLIP's tokenizer has it.

    >>> clean("  a red\\tapple ")
    ('a red apple', None, None)
    """
    caption = " ".join(text.split())
    if not caption:
        return None, "empty", "nothing but white space" if text else "nothing"
    if found := _SURROGATE.search(caption):
        return None, "encoding", f"half a character, U+{ord(found[0]):04X}"
    if found := _CONTROL.search(caption):
        return None, "control", f"U+{ord(found[0]):04X} at character {found.start() + 1}"
    return caption, None, None


def choose_format(files: Files, given: str | None, field: str) -> tuple[str, tuple[Entry, ...]]:
    """The format of a data set and the files that have it; a single file may have any name.

    Raises:
        InvalidRequest: the names tell no format, or several.
    """
    if given in SUFFIXES and len(files.entries) == 1:
        return given, files.entries
    kinds = {entry: _format_of(entry.name) for entry in files.entries}
    found = sorted({kind for kind in kinds.values() if kind})
    chosen = given if given in found else found[0] if len(found) == 1 and not given else None
    if chosen is None:
        endings = ", ".join(f"{kind} ({suffixes[0]})" for kind, suffixes in SUFFIXES.items())
        raise InvalidRequest(field, given or files.source, f"one format, told by the files' names or by name: {endings}")
    return chosen, tuple(entry for entry, kind in kinds.items() if kind == chosen)


def _format_of(name: str) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if name.lower().endswith(suffixes)), None)


def read_file(entry: Entry, filesystem: FileSystem, kind: str, column: str) -> Iterator[pa.Table]:
    """The rows of one file as tables of `SCHEMA`, in blocks. A file that breaks off is a fault of row 0 after those before it."""
    rows = _guarded(READERS[kind], filesystem, entry, column)
    while block := list(islice(rows, BLOCK_ROWS)):
        columns = [[entry.name] * len(block), *map(list, zip(*block, strict=True))]
        yield pa.table(columns, schema=SCHEMA)


Reader = Callable[[FileSystem, Entry, str], Iterator[Row]]


def _guarded(reader: Reader, filesystem: FileSystem, entry: Entry, column: str) -> Iterator[Row]:
    try:
        yield from reader(filesystem, entry, column)
    except (OSError, EOFError, tarfile.TarError, pa.ArrowException) as error:
        yield Row(0, "", None, "file", "file", breakage(error, entry.name))


def opened(filesystem: FileSystem, entry: Entry) -> IO[bytes]:
    """A file to be read from its beginning, decompressed by its ending."""
    compression = "gzip" if entry.name.endswith(".tgz") else "detect"
    return io.BufferedReader(filesystem.open_input_stream(entry.path, compression=compression), 1 << 20)


def decoded(data: bytes) -> tuple[str | None, str | None]:
    """(text, None), or (None, what is not UTF-8)."""
    try:
        return data.decode("utf-8"), None
    except UnicodeDecodeError as error:
        return None, f"byte 0x{data[error.start]:02X} at {error.start + 1}"


def _lines(filesystem: FileSystem, entry: Entry, field: str) -> Iterator[tuple[int, str | None, Row | None]]:
    """(number, text, None) of each line, or (number, None, fault)."""
    with opened(filesystem, entry) as file:
        for number, line in enumerate(file, 1):
            text, fault = decoded(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
            yield number, text, None if text is not None else Row(number, "", None, "encoding", field, fault)


def _text(filesystem: FileSystem, entry: Entry, _: str) -> Iterator[Row]:
    for number, text, fault in _lines(filesystem, entry, "line"):
        yield fault or of_text(number, "", text, "line")


def _jsonl(filesystem: FileSystem, entry: Entry, column: str) -> Iterator[Row]:
    for number, text, fault in _lines(filesystem, entry, "line"):
        yield fault or of_json(number, "", text or "", column)


def _parquet(filesystem: FileSystem, entry: Entry, column: str) -> Iterator[Row]:
    with filesystem.open_input_file(entry.path) as file:
        parquet = pq.ParquetFile(file)
        names = parquet.schema_arrow.names
        if column not in names:
            yield Row(0, "", None, "column", column, f"columns {', '.join(names)}"[:200])
            return
        number = 0
        for batch in parquet.iter_batches(BLOCK_ROWS, columns=[column]):
            for value in batch.column(0).to_pylist():
                number += 1
                yield of_value(number, "", value, column)


def _webdataset(filesystem: FileSystem, entry: Entry, column: str) -> Iterator[Row]:
    with opened(filesystem, entry) as file:
        for number, (key, members) in enumerate(samples(file, (".txt", ".json")), 1):
            yield of_members(number, key, members, column)


READERS: dict[str, Reader] = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "webdataset": _webdataset}


class _Ended:
    """A stream that knows whether it ended as a tar does, with a block of zeros: cut between two members, one looks whole otherwise."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.last = file, b""

    def read(self, size: int = -1) -> bytes:
        data = self.file.read(size)
        self.last = (self.last + data if len(data) < tarfile.BLOCKSIZE else data)[-tarfile.BLOCKSIZE :]
        return data

    def check(self) -> None:
        """Raises tarfile.ReadError."""
        while self.read(1 << 20):
            pass
        if self.last != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without the mark of a tar's end")


def samples(file: IO[bytes], wanted: tuple[str, ...]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a tar in the WebDataset convention: neighbours that share a name up to its first dot. Gives the key and the
    members by ending; of endings that are not `wanted` the bytes are left out. Raises tarfile.TarError where the tar is broken."""
    for key, group in groupby(_members(file, wanted), itemgetter(0)):
        yield key, {suffix: data for _, suffix, data in group}


def _members(file: IO[bytes], wanted: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    """(key, ending, bytes) of each file."""
    stream: Any = _Ended(file)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            folder, slash, name = member.name.rpartition("/")
            stem, dot, ending = name.partition(".")
            if member.isreg() and dot and stem:
                suffix = f".{ending.lower()}"
                content = tar.extractfile(member) if suffix in wanted else None
                yield folder + slash + stem, suffix, content.read() if content else b""
    stream.check()


def of_members(number: int, key: str, members: dict[str, bytes], column: str) -> Row:
    """The caption of a sample: `column` of its .json where that has it, else its .txt."""
    row = Row(number, key, None, "missing", column, f"members {', '.join(sorted(members))}")
    if ".json" in members:
        text, fault = decoded(members[".json"])
        row = Row(number, key, None, "encoding", ".json", fault) if text is None else of_json(number, key, text, column)
    if row.kind == "missing" and ".txt" in members:
        text, fault = decoded(members[".txt"])
        return Row(number, key, None, "encoding", ".txt", fault) if text is None else of_text(number, key, text, ".txt")
    return row


def of_text(number: int, key: str, text: str | None, field: str) -> Row:
    """A row of plain text."""
    caption, kind, what = clean(text or "")
    return Row(number, key, caption, kind, field if kind else None, what)


def of_json(number: int, key: str, text: str, column: str) -> Row:
    """A row that is a JSON object with the caption in `column`."""
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Row(
            number, key, None, "json", "line", getattr(error, "msg", type(error).__name__) if text.strip() else "an empty line"
        )
    if not isinstance(value, dict):
        return Row(number, key, None, "json", "line", f"a {type(value).__name__}, not an object")
    if column not in value:
        return Row(number, key, None, "missing", column, f"fields {', '.join(value)}"[:200])
    return of_value(number, key, value[column], column)


def of_value(number: int, key: str, value: Any, column: str) -> Row:
    """A row whose caption is a value of some type."""
    if value is None:
        return Row(number, key, None, "missing", column, "null")
    if not isinstance(value, str):
        return Row(number, key, None, "type", column, f"{value!r}"[:80] + f" ({type(value).__name__})")
    return of_text(number, key, value, column)


def read_rows(files: Files, entries: Iterable[Entry], kind: str, column: str) -> Iterator[pa.Table]:
    """All rows of a data set, in the order of its files and their rows; tables of `SCHEMA`."""
    yield from stream(list(entries), partial(read_file, filesystem=files.filesystem, kind=kind, column=column))
