"""Names of bundles: publish by digest, point a name at one, move back, and open any of them as a local folder.

In the store of models a bundle is `bundles/<digest>/...`, immutable, and a name is `names/<name>/<pointer>.json`: everything
the pointer ever pointed at, written by compare-and-swap. `emoji@prod` is the pointer `prod` of `emoji`; plain `emoji` means
`emoji@prod`, or the bundle that ships with the library where the store has none (`emoji@packaged` is always that one).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urlparse

from sdxs import bundle, cached, hub, pointers, published
from sdxs.bundle import MANIFEST, Manifest, slug
from sdxs.compose import Changes, compose, loads_as_it_lies
from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound
from sdxs.pointers import Move, Pointers, current
from sdxs.published import Published
from sdxs.references import Reference, hub_id, is_folder, likely_name
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store, open_url

DEFAULT_POINTER = pointers.DEFAULT
PACKAGED = "packaged"
_BUNDLES, _NAMES = "bundles/", "names/"  # those of LoRAs: sdxs.lora.published
_NAME, _DIGEST = pointers.NAME, pointers.DIGEST


@dataclass(frozen=True)
class Listed:
    """One line of `sdxs models list`."""

    name: str
    pointer: str
    digest: str
    where: str
    at: str


def split_reference(reference: str) -> tuple[str, str]:
    """(name, pointer) of `name` or `name@pointer`. Raises InvalidRequest."""
    allowed = "name, name@pointer, sha256:<12 to 64 hex digits>, s3://bucket/folder, a folder (with a / in it) or owner/name of the hub"
    return pointers.split(reference, "model", allowed)


def publish(folder: Path, store: ObjectStore) -> Manifest:
    """Upload a sealed bundle: files first, manifest last. Uploading one that is there changes nothing.

    Raises:
        NotFound: the folder is not sealed.
        CorruptArtifact: a file has changed since.
    """
    manifest = bundle.read(folder)
    prefix = _prefix(manifest.digest)
    if not store.exists(f"{prefix}/{MANIFEST}"):
        for name in manifest.files:
            store.put_file(f"{prefix}/{name}", folder / name)
        store.put_file(f"{prefix}/{MANIFEST}", folder / MANIFEST)
    return manifest


def history(name: str, pointer: str, store: ObjectStore) -> list[Move]:
    """Where the pointer has been, oldest first; empty if it does not exist."""
    return _names(store).history(name, pointer)


def promote(name: str, digest: str, store: ObjectStore, pointer: str = DEFAULT_POINTER) -> str:
    """Point `name@pointer` at a published bundle, in one write; returns its whole digest.

    Raises:
        NotFound: no bundle of that digest is in the store.
        InvalidRequest: it is a bundle of another name.
    """
    digest = whole_digest(digest, store)
    manifest = _published(digest, store)
    if manifest.name != name:
        raise InvalidRequest("digest", digest, f"a bundle named {name!r}; this one is {manifest.name!r}")
    if pointer == PACKAGED:
        raise InvalidRequest("name", f"{name}@{pointer}", f"any pointer but {PACKAGED!r}")
    _names(store).promote(name, pointer, digest)
    return digest


def rollback(name: str, store: ObjectStore, pointer: str = DEFAULT_POINTER) -> str:
    """Point back at the bundle before the present one; returns its digest. Again: one further back.

    Raises:
        PreconditionFailed: there is nothing to go back to, or someone else moved the pointer at this moment.
    """
    return _names(store).rollback(name, pointer)


def whole_digest(digest: str, store: ObjectStore) -> str:
    """The one published digest that begins so. Raises NotFound when there is none or more than one."""
    return pointers.whole_digest(digest, store, _BUNDLES, MANIFEST, "bundle")


def packaged() -> dict[str, Path]:
    """Bundles that ship with the library: name -> folder."""
    root = Path(str(resources.files("sdxs"))) / "bundles"
    return {path.parent.name: path.parent for path in sorted(root.glob(f"*/{MANIFEST}"))}


def listing(store: ObjectStore) -> list[Listed]:
    """Every pointer in the store, then the bundles that ship with the library."""
    found = []
    for name, pointer in _names(store).all():
        move = current(history(name, pointer, store))
        found.append(Listed(name, pointer, move.digest, "store", move.at))
    for name, folder in packaged().items():
        manifest = bundle.read(folder, verify=False)
        found.append(Listed(name, PACKAGED, manifest.digest, "package", manifest.created))
    return found


def open_model(reference: str | Path, settings: Settings) -> tuple[Path, Manifest]:
    """A verified local folder, as an absolute path, and its manifest; what is elsewhere is downloaded once.

    Args:
        reference: name, `name@pointer`, `sha256:...`, `s3://bucket/folder`, a folder (with a `/` in it, or a Path): sealed, or plain
            diffusers as published; or, where there is no such folder, a hub id `owner/name` or `owner/name@revision`. Each may have
            options: see sdxs.references. A Path is a folder and has none.

    Raises:
        NotFound, CorruptArtifact, InvalidRequest; for a hub id PermissionDenied and Unavailable too.
    """
    if isinstance(reference, Path):
        return _open_folder(reference, settings)
    asked = Reference.parse(reference)
    if hub_id(asked.base):
        found = published.model(asked.base, asked.vae)
        return _composed(asked, found, likely_name(asked.base), settings)
    folder, manifest = _open_base(asked.base, settings)
    return _composed(asked, Published(folder), manifest.name, settings) if asked.changes else (folder, manifest)


def open_sealed(reference: str | Path, settings: Settings) -> tuple[Path, Manifest]:
    """The same, with its manifest in the folder: of a plain diffusers folder, links to its files. Raises as `open_model`."""
    folder, manifest = open_model(reference, settings)
    return (folder, manifest) if (folder / MANIFEST).is_file() else compose(folder, Changes(manifest.name), settings.cache_dir)


def _composed(asked: Reference, base: Published, name: str, settings: Settings) -> tuple[Path, Manifest]:
    """A model with what a reference says beside its base."""
    controlnets = published.controlnets(asked.controlnets)
    sources = {"source": base.source, **{f"controlnet.{name}": each.source for name, each in controlnets.items()}}
    changes = Changes(
        asked.name or name,
        asked.vae,
        {name: each.folder for name, each in controlnets.items()},
        {name: source for name, source in sources.items() if source},
    )
    return compose(base.folder, changes, settings.cache_dir)


def _open_base(base: str, settings: Settings) -> tuple[Path, Manifest]:
    """What a reference without options leads to, but for the hub."""
    url = urlparse(base)
    if url.scheme == "s3":
        store = open_url(base, settings)
        return _download(store, "", bundle.parse(store.get_bytes(MANIFEST)).digest, settings.cache_dir)
    if url.scheme == "file":
        return _open_folder(Path(unquote(url.path)), settings)
    if is_folder(base):
        return _open_folder(Path(base), settings)
    if _DIGEST.fullmatch(base):
        for folder in packaged().values():
            if bundle.read(folder, verify=False).digest.startswith(base):
                return _open_folder(folder, settings)
        return download(base, open_store(settings, "models"), settings.cache_dir)
    return _open_name(base, settings)


def moves(reference: str) -> bool:
    """Whether it may mean another bundle while a server runs: a name may; a branch of the hub means what it did when the server began."""
    return bool(_NAME.fullmatch(Reference.parse(reference).base))


def pins(reference: str, settings: Settings) -> list[str]:
    """What a reference means now, then all it has meant before, newest first; one read of the store, none of any bundle.

    Each is a reference that stays: `sha256:...` for what a name points to, `hf://owner/name@commit` for a hub id, anything else as it is.
    Empty for a name that is not known. Raises InvalidRequest, CorruptArtifact for a history that cannot be read, and of the hub NotFound,
    PermissionDenied and Unavailable.
    """
    asked = Reference.parse(reference)
    controlnets = tuple(str(hub.pinned("controlnet", each)) if hub_id(each) else each for each in asked.controlnets)
    bases = [str(hub.pinned("model", asked.base))] if hub_id(asked.base) else _pins(asked.base, settings)
    return [str(replace(asked, base=base, controlnets=controlnets)) for base in bases]


def _pins(base: str, settings: Settings) -> list[str]:
    if not _NAME.fullmatch(base):
        return [base]
    name, pointer = split_reference(base)
    found = []
    if pointer != PACKAGED and (moves := history(name, pointer, open_store(settings, "models"))):
        found = [current(moves).digest, *(move.digest for move in reversed(moves))]
    shipped = packaged().get(name)
    if shipped and base in (name, f"{name}@{PACKAGED}"):
        found.append(bundle.facts(shipped).digest)
    return list(dict.fromkeys(found))


def read_manifest(reference: str, settings: Settings) -> Manifest:
    """What `open_model` would give, without downloading or checking any other file. Raises as it does."""
    if reference.startswith("s3://") and "?" not in reference:
        return bundle.parse(open_url(reference, settings).get_bytes(MANIFEST))
    if _DIGEST.fullmatch(reference):
        if not any(bundle.facts(folder).digest.startswith(reference) for folder in packaged().values()):
            store = open_store(settings, "models")
            return _published(whole_digest(reference, store), store)
    elif _NAME.fullmatch(reference):
        name, pointer = split_reference(reference)
        store = open_store(settings, "models")
        if pointer != PACKAGED and (moves := history(name, pointer, store)):
            return _published(current(moves).digest, store)
    return open_model(reference, settings)[1]


def download(digest: str, store: ObjectStore, cache: Path) -> tuple[Path, Manifest]:
    """A published bundle as a folder in `cache`, checked file by file; appears whole or not at all."""
    digest = whole_digest(digest, store)
    return _download(store, f"{_prefix(digest)}/", digest, cache)


def _prefix(digest: str) -> str:
    return _BUNDLES + digest.removeprefix("sha256:")


def _names(store: ObjectStore) -> Pointers:
    return Pointers(store, _NAMES, "bundle")


def _published(digest: str, store: ObjectStore) -> Manifest:
    return bundle.parse(store.get_bytes(f"{_prefix(digest)}/{MANIFEST}"))


def _open_folder(folder: Path, settings: Settings) -> tuple[Path, Manifest]:
    folder = folder.absolute()  # whoever opens it again, by its text or in another place, must not take "emoji" for a name
    if not folder.is_dir():
        raise NotFound(f"there is no folder {str(folder)!r}")
    if (folder / MANIFEST).is_file():
        return folder, bundle.read(folder)
    if not loads_as_it_lies(folder):
        return compose(folder, Changes(slug(folder.resolve().name)), settings.cache_dir)
    return folder, Manifest.from_diffusers(folder)


def _open_name(reference: str, settings: Settings) -> tuple[Path, Manifest]:
    name, pointer = split_reference(reference)
    shipped = packaged().get(name)
    if shipped and pointer == PACKAGED:
        return _open_folder(shipped, settings)
    store = open_store(settings, "models")
    moves = history(name, pointer, store)
    if moves:
        return download(current(moves).digest, store, settings.cache_dir)
    if shipped and reference == name:
        return _open_folder(shipped, settings)
    known = sorted({f"{entry.name}@{entry.pointer}" for entry in listing(store)})
    raise NotFound(f"model {reference!r} is not known; known are: {', '.join(known) or 'none'}")


def _download(store: ObjectStore, prefix: str, digest: str, cache: Path) -> tuple[Path, Manifest]:
    return cached.find(cache, digest) or cached.keep(cache, lambda folder: _fetch(store, prefix, digest, folder))


def _fetch(store: ObjectStore, prefix: str, digest: str, folder: Path) -> Manifest:
    """All files of a bundle. Raises CorruptArtifact when they are not that bundle."""
    store.get_file(f"{prefix}{MANIFEST}", folder / MANIFEST)
    manifest = bundle.read(folder, verify=False)
    if manifest.digest != digest:
        raise CorruptArtifact(f"{MANIFEST} of {digest} is the manifest of {manifest.digest}")
    for name in manifest.files:
        store.get_file(f"{prefix}{name}", folder / name)
    bundle.check(folder, manifest)
    return manifest
