"""Names of bundles: publish by digest, point a name at one, move back, and open any of them as a local folder.

`emoji@prod` is the pointer `prod` of `emoji`; plain `emoji` means `emoji@prod`, or the packaged bundle where no store has one.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path

from sdxs import bundle
from sdxs.bundle import MANIFEST, Manifest
from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store

DEFAULT_POINTER = "prod"
_NAME = re.compile(r"^(?P<name>[a-z0-9][a-z0-9._-]{0,63})(@(?P<pointer>[a-z0-9][a-z0-9._-]{0,63}))?$")
_DIGEST = re.compile(r"^sha256:[0-9a-f]{64}$")


@dataclass(frozen=True)
class Move:
    """One entry of a pointer's history."""

    digest: str
    at: str


def _bundle_prefix(digest: str) -> str:
    return f"models/bundles/{digest.removeprefix('sha256:')}"


def _pointer_key(name: str, pointer: str) -> str:
    return f"models/names/{name}/{pointer}.json"


def split_reference(reference: str) -> tuple[str, str]:
    """(name, pointer) of `name` or `name@pointer`. Raises InvalidRequest."""
    match = _NAME.match(reference)
    if not match:
        raise InvalidRequest("model", reference, "name, name@pointer, sha256:<64 hex digits> or a folder")
    return match["name"], match["pointer"] or DEFAULT_POINTER


def publish(folder: Path, store: ObjectStore) -> Manifest:
    """Upload a sealed bundle: files first, manifest last. Uploading one that is there changes nothing."""
    manifest = bundle.read(folder)
    prefix = _bundle_prefix(manifest.digest)
    if not store.exists(f"{prefix}/{MANIFEST}"):
        for name in manifest.files:
            store.put_file(f"{prefix}/{name}", folder / name)
        store.put_file(f"{prefix}/{MANIFEST}", folder / MANIFEST)
    return manifest


def history(name: str, pointer: str, store: ObjectStore) -> list[Move]:
    """Where the pointer has been, the present last; empty if it does not exist."""
    key = _pointer_key(name, pointer)
    if not store.exists(key):
        return []
    return [Move(**entry) for entry in json.loads(store.get_bytes(key))]


def promote(name: str, digest: str, store: ObjectStore, pointer: str = DEFAULT_POINTER) -> None:
    """Point `name@pointer` at a published bundle, in one write.

    Raises:
        NotFound: no bundle of that digest is in the store.
        InvalidRequest: it is a bundle of another name.
    """
    manifest = _published(digest, store)
    if manifest.name != name:
        raise InvalidRequest("digest", digest, f"a bundle named {name!r}; this one is {manifest.name!r}")
    moves = history(name, pointer, store)
    if not moves or moves[-1].digest != digest:
        _write(name, pointer, [*moves, Move(digest, datetime.now(UTC).isoformat(timespec="seconds"))], store)


def rollback(name: str, store: ObjectStore, pointer: str = DEFAULT_POINTER) -> str:
    """Point back at the bundle before the present one; returns its digest.

    Raises:
        PreconditionFailed: there is nothing to go back to.
    """
    moves = history(name, pointer, store)
    if len(moves) < 2:
        raise PreconditionFailed(f"{name}@{pointer} has no earlier bundle to go back to")
    _write(name, pointer, moves[:-1], store)
    return moves[-2].digest


def _write(name: str, pointer: str, moves: list[Move], store: ObjectStore) -> None:
    data = json.dumps([vars(move) for move in moves]).encode()
    store.put_bytes(_pointer_key(name, pointer), data, "application/json")


def _published(digest: str, store: ObjectStore) -> Manifest:
    key = f"{_bundle_prefix(digest)}/{MANIFEST}"
    if not _DIGEST.match(digest) or not store.exists(key):
        raise NotFound(f"bundle {digest!r} is not in the store")
    return bundle.parse(store.get_bytes(key))


@dataclass(frozen=True)
class Listed:
    """One line of `sdxs models list`."""

    name: str
    pointer: str
    digest: str
    where: str
    at: str


def packaged() -> dict[str, Path]:
    """Bundles that ship with the library: name -> folder."""
    root = Path(str(resources.files("sdxs"))) / "bundles"
    return {p.parent.name: p.parent for p in sorted(root.glob(f"*/{MANIFEST}"))}


def listing(store: ObjectStore) -> list[Listed]:
    """Every pointer in the store, then the packaged bundles."""
    found = []
    for key in store.list("models/names/"):
        name, pointer = key.removeprefix("models/names/").removesuffix(".json").split("/")
        last = history(name, pointer, store)[-1]
        found.append(Listed(name, pointer, last.digest, "store", last.at))
    for name, folder in packaged().items():
        manifest = bundle.read(folder, verify=False)
        found.append(Listed(name, "packaged", manifest.digest, "package", manifest.created))
    return found


def open_model(reference: str, settings: Settings) -> tuple[Path, Manifest]:
    """A verified local folder and its manifest, for a name, `name@pointer`, digest or folder; downloads once.

    Raises:
        NotFound, CorruptArtifact, InvalidRequest.
    """
    if "/" in reference or reference.startswith("."):
        folder = Path(reference)
        return folder, bundle.read(folder)
    shipped = packaged().get(reference)
    if shipped and settings.store_url.startswith("file:") and not _has_pointer(reference, settings):
        return shipped, bundle.read(shipped)
    return _open_from_store(reference, shipped, settings)


def _has_pointer(name: str, settings: Settings) -> bool:
    return open_store(settings).exists(_pointer_key(name, DEFAULT_POINTER))


def _open_from_store(reference: str, shipped: Path | None, settings: Settings) -> tuple[Path, Manifest]:
    store = open_store(settings)
    digest = reference
    if not _DIGEST.match(reference):
        name, pointer = split_reference(reference)
        moves = history(name, pointer, store)
        if not moves and shipped:
            return shipped, bundle.read(shipped)
        if not moves:
            known = sorted({entry.name for entry in listing(store)})
            raise NotFound(f"model {reference!r} is not known; known are: {', '.join(known) or 'none'}")
        digest = moves[-1].digest
    return download(digest, store, settings.cache_dir)


def download(digest: str, store: ObjectStore, cache: Path) -> tuple[Path, Manifest]:
    """A published bundle as a folder in `cache`, checked file by file; appears whole or not at all."""
    target = cache / "bundles" / digest.removeprefix("sha256:")
    if (target / MANIFEST).is_file():
        return target, bundle.read(target)
    manifest = _published(digest, store)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=".part-"))
    try:
        for name in [*manifest.files, MANIFEST]:
            store.get_file(f"{_bundle_prefix(digest)}/{name}", part / name)
        bundle.read(part)
        part.rename(target)
    except OSError:
        if not (target / MANIFEST).is_file():  # not the case of another process being faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target, bundle.read(target)
