"""Where a data set lies: a file, folder or glob, on this machine or in S3, and how its files are read in their order.

This module knows files, not what is in them.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow.fs import AwsStandardS3RetryStrategy, FileInfo, FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from sdxs.errors import InvalidRequest, NotFound, PermissionDenied, SdxsError, Unavailable
from sdxs.settings import Settings

BLOCK_ROWS = 16_384
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """A file as it was listed. `name` is relative to the data set, `path` what the filesystem opens."""

    name: str
    path: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Files:
    """The files of one data set, sorted by path."""

    source: str
    filesystem: FileSystem
    entries: tuple[Entry, ...]

    def listing(self) -> str:
        """A digest of names, sizes and times of change: while it stays, so do the contents."""
        lines = "".join(f"{e.name}\0{e.size}\0{e.modified_ns}\n" for e in self.entries)
        return hashlib.sha256(f"{self.source}\n{lines}".encode()).hexdigest()


class PatientS3(S3FileSystem):  # type: ignore[misc]
    """The settings' S3 as pyarrow, and so Ray, reads and writes it.

    A request is tried `attempts` times with growing pauses. pyarrow's own class forgets that when it is sent to another process.
    """

    def __init__(self, settings: Settings, attempts: int) -> None:
        self.made_of = (settings, attempts)
        super().__init__(
            endpoint_override=settings.s3_endpoint,
            scheme="https" if settings.s3_secure else "http",
            access_key=settings.s3_access_key,
            secret_key=settings.s3_secret_key.get_secret_value(),
            region=settings.s3_region,
            allow_bucket_creation=True,  # for the first checkpoint of all
            retry_strategy=AwsStandardS3RetryStrategy(max_attempts=attempts),
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return PatientS3, self.made_of


def s3_filesystem(settings: Settings, attempts: int = 5) -> S3FileSystem:
    """The settings' S3."""
    return PatientS3(settings, attempts)


def find(source: str, settings: Settings, field: str) -> Files:
    """The files of a source: a file, a folder with all that is below it, or a glob (`*`, `?`, `[a-z]`, `**`); local or s3://bucket/...

    Hidden files and those that begin with an underscore do not count.

    Raises:
        NotFound: there is nothing; names `field`.
        PermissionDenied, Unavailable: the S3 refuses or does not answer.
    """
    filesystem, path = _opened(source, settings)
    try:
        found = [info for info in _listed(filesystem, path) if info.type == FileType.File]
    except OSError as error:
        raise _translated(error, source, field) from error
    if not found:
        raise NotFound(f"{field}: no file at {source!r}")
    root = _root(path, found)
    named = sorted((PurePosixPath(info.path).relative_to(root).as_posix(), info) for info in found)
    entries = (Entry(name, info.path, info.size, info.mtime_ns or 0) for name, info in named if not _hidden(name))
    return Files(source, filesystem, tuple(entries))


def _opened(source: str, settings: Settings) -> tuple[FileSystem, str]:
    scheme, colon, rest = source.partition("://")
    if not colon:
        return LocalFileSystem(), Path(source).absolute().as_posix()
    if scheme == "file":
        return LocalFileSystem(), rest
    if scheme != "s3" or not rest.strip("/"):
        raise InvalidRequest("source", source, "a file, folder, glob, or s3://bucket/path")
    return s3_filesystem(settings), rest.rstrip("/")


def _listed(filesystem: FileSystem, path: str) -> list[FileInfo]:
    info = filesystem.get_file_info(path)
    if info.type == FileType.Directory:
        return list(filesystem.get_file_info(FileSelector(path, recursive=True)))
    if info.type == FileType.File:
        return [info]
    if not any(sign in path for sign in "*?["):
        return []
    from fsspec.implementations.arrow import ArrowFSWrapper

    return list(filesystem.get_file_info(sorted(ArrowFSWrapper(filesystem).glob(path))))


def _root(path: str, found: Sequence[FileInfo]) -> str:
    """What names are relative to: the folder, that of the file, or the fixed part of the glob."""
    if len(found) == 1 and found[0].path == path:
        return str(PurePosixPath(path).parent)
    fixed = PurePosixPath(path).parts
    magic = next((i for i, part in enumerate(fixed) if any(sign in part for sign in "*?[")), len(fixed))
    return str(PurePosixPath(*fixed[:magic]))


def _hidden(name: str) -> bool:
    return any(part.startswith((".", "_")) for part in PurePosixPath(name).parts)


def _translated(error: OSError, source: str, field: str) -> SdxsError:
    said = str(error)
    if "ACCESS_DENIED" in said or "HTTP status 403" in said or isinstance(error, PermissionError):
        return PermissionDenied(f"{field}: {source!r} may not be read with these credentials")
    if isinstance(error, FileNotFoundError) or "NO_SUCH_BUCKET" in said:
        return NotFound(f"{field}: no file at {source!r}")
    return Unavailable(f"{field}: {source!r} cannot be listed ({said.splitlines()[0][:200]})")


def breakage(error: Exception, name: str) -> str:
    """What is wrong with a file that cannot be read to its end, in a line. Raises Unavailable when it is not the file but the store."""
    said = (str(error).splitlines() or [type(error).__name__])[0][:200]
    if isinstance(error, OSError) and "AWS Error" in said:
        raise Unavailable(f"{name!r} cannot be read: {said}") from error
    return said


def stream(parts: Sequence[T], read: Callable[[T], Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """What `read` gives for each part, in the order of the parts: through Ray Data where a cluster is up, else here, one after the
    other. Both give the same rows in the same order."""
    ray_module = sys.modules.get("ray")  # to import it takes seconds, and only a program that has can have started it
    if ray_module is None or not ray_module.is_initialized():
        for part in parts:
            yield from read(part)
        return
    import ray.data

    dataset = ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts))
    dataset.context.execution_options.preserve_order = True
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = False
    blocks = dataset.map_batches(partial(_each, read), batch_size=1)
    yield from blocks.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)


def _each(read: Callable[[T], Iterator[pa.Table]], batch: dict[str, Any]) -> Iterator[pa.Table]:
    for part in batch["part"]:
        yield from read(part)
