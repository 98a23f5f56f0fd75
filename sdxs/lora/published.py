"""LoRAs in the store of models: found by name or digest, fetched once. Knows no torch.

A LoRA is `loras/<digest>/...`, immutable: its file, then its manifest. A name is `lora-names/<name>/<pointer>.json`, as bundles have.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sdxs import pointers
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from sdxs.lora.manifest import MANIFEST, LoraManifest, parse
from sdxs.pointers import DIGEST, Pointers, current
from sdxs.store import ObjectStore

FILE = "pytorch_lora_weights.safetensors"
LORAS, NAMES = "loras/", "lora-names/"
ALLOWED = "name, name@pointer or sha256:<12 to 64 hex digits> of a published LoRA"


@dataclass(frozen=True)
class ListedLora:
    """One line of `sdxs loras list`."""

    name: str
    pointer: str
    digest: str
    at: str
    manifest: LoraManifest


def split_reference(reference: str, field: str = "lora") -> tuple[str, str]:
    """(name, pointer) of `name` or `name@pointer`. Raises InvalidRequest."""
    return pointers.split(reference, field, ALLOWED)


def put(manifest: LoraManifest, file: Path, store: ObjectStore) -> None:
    """Upload a LoRA: the file first, the manifest last. One that is there changes nothing."""
    prefix = _prefix(manifest.digest)
    if not store.exists(prefix + MANIFEST):
        store.put_file(prefix + FILE, file)
        store.put_bytes(prefix + MANIFEST, (manifest.model_dump_json(indent=1) + "\n").encode())


def names(store: ObjectStore) -> Pointers:
    """Where the names point."""
    return Pointers(store, NAMES, "LoRA")


def promote(name: str, pointer: str, digest: str, store: ObjectStore) -> str:
    """Point `name@pointer` at a published LoRA; returns its whole digest. Raises NotFound, or InvalidRequest for one of another name."""
    manifest = read_manifest(digest, store)
    if manifest.name != name:
        raise InvalidRequest("digest", digest, f"a LoRA named {name!r}; this one is {manifest.name!r}")
    names(store).promote(name, pointer, manifest.digest)
    return manifest.digest


def read_manifest(reference: str, store: ObjectStore, field: str = "lora") -> LoraManifest:
    """Of the LoRA that a name or a digest means now. Raises InvalidRequest, NotFound, CorruptArtifact."""
    if DIGEST.fullmatch(reference):
        digest = pointers.whole_digest(reference, store, LORAS, MANIFEST, "LoRA")
    else:
        name, pointer = split_reference(reference, field)
        moves = names(store).history(name, pointer)
        if not moves:
            known = ", ".join(sorted({f"{known}@{pointer}" for known, pointer in names(store).all()})[:20])
            raise NotFound(f"LoRA {reference!r} is not known; known are: {known or 'none'}")
        digest = current(moves).digest
    manifest = parse(store.get_bytes(_prefix(digest) + MANIFEST))
    if manifest.digest != digest:
        raise CorruptArtifact(f"{MANIFEST} of {digest} is the manifest of {manifest.digest}")
    return manifest


def listing(store: ObjectStore) -> list[ListedLora]:
    """Every pointer, by name."""
    found = []
    for name, pointer in sorted(names(store).all()):
        move = current(names(store).history(name, pointer))
        found.append(ListedLora(name, pointer, move.digest, move.at, read_manifest(move.digest, store)))
    return found


def fetch(digest: str, store: ObjectStore, cache: Path, most: int) -> tuple[Path, LoraManifest]:
    """A published LoRA's file in `cache`, checked; appears whole or not at all.

    Raises:
        NotFound: it is not in the store.
        InvalidRequest: it has more than `most` bytes.
        CorruptArtifact: the file is not what the manifest says.
    """
    manifest = read_manifest(digest, store)
    if manifest.file.size > most:
        raise InvalidRequest("lora", f"{manifest.file.size} bytes", f"a LoRA of at most {most} bytes")
    folder = cache.absolute() / LORAS / manifest.digest.removeprefix("sha256:")
    target = folder / FILE
    if not (target.is_file() and _is_whole(target, manifest)):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".part-") as part:
            store.get_file(_prefix(manifest.digest) + FILE, Path(part) / FILE)
            if not _is_whole(Path(part) / FILE, manifest):
                raise CorruptArtifact(f"{FILE} of LoRA {manifest.name!r} is not the file that was published")
            (Path(part) / FILE).replace(target)
    return target, manifest


def _prefix(digest: str) -> str:
    return f"{LORAS}{digest.removeprefix('sha256:')}/"


def _is_whole(file: Path, manifest: LoraManifest) -> bool:
    with file.open("rb") as opened:
        return (
            file.stat().st_size == manifest.file.size
            and hashlib.file_digest(opened, "sha256").hexdigest() == manifest.file.sha256
        )
