"""The cache of bundles: `bundles/<digest>/` each, whole or not there at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from sdxs import bundle
from sdxs.bundle import Manifest
from sdxs.errors import SdxsError


def find(cache: Path, digest: str) -> tuple[Path, Manifest] | None:
    """A bundle whose files are what its manifest says, as an absolute path."""
    target = _place(cache, digest)
    try:
        return target, bundle.read(target)
    except SdxsError:
        return None


def keep(cache: Path, build: Callable[[Path], Manifest]) -> tuple[Path, Manifest]:
    """What `build` puts into the folder it is given, its manifest included; of two processes that build the same bundle one is kept."""
    root = _place(cache, "")
    root.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=root, prefix=".part-"))
    try:
        manifest = build(part / "new")
        return _put(part, cache, manifest.digest), manifest
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _put(part: Path, cache: Path, digest: str) -> Path:
    target = _place(cache, digest)
    try:
        (part / "new").rename(target)
    except OSError:
        if not find(cache, digest):  # else another process was faster
            target.rename(part / "old")  # damaged: out of the way
            (part / "new").rename(target)
    return target


def _place(cache: Path, digest: str) -> Path:
    return cache.absolute() / "bundles" / digest.removeprefix("sha256:")
