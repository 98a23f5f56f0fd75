"""Stage results in the object store: addressed by stage and input digest, complete when `done.json` exists."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sdxs.errors import Unavailable
from sdxs.settings import Settings
from sdxs.store import ObjectStore, open_store

DONE = "done.json"
PATIENCE_S, LONGEST_PAUSE_S = 300.0, 15.0
T = TypeVar("T")


def patiently(call: Callable[[], T]) -> T:
    """What `call` gives, tried again with growing pauses while the store cannot be reached: hours of training do not end with it.

    Raises:
        Unavailable: it stays away for PATIENCE_S.
    """
    end, pause = time.monotonic() + PATIENCE_S, 0.5
    while True:
        try:
            return call()
        except Unavailable:
            if time.monotonic() + pause > end:
                raise
        time.sleep(pause)
        pause = min(LONGEST_PAUSE_S, 2 * pause)


class Artifacts:
    """Saves and fetches stage results; `cache` is a local folder that holds fetched copies."""

    def __init__(self, store: ObjectStore, cache: Path) -> None:
        self.store, self.cache = store, cache

    @staticmethod
    def prefix(stage: str, digest: str) -> str:
        return f"stages/{stage}/{digest}"

    def facts(self, stage: str, digest: str) -> dict[str, Any] | None:
        """What was noted when the stage finished; None if it has not."""
        key = f"{self.prefix(stage, digest)}/{DONE}"
        if not patiently(lambda: self.store.exists(key)):
            return None
        facts: dict[str, Any] = json.loads(patiently(lambda: self.store.get_bytes(key)))
        return facts

    def save(self, stage: str, digest: str, folder: Path, facts: dict[str, Any]) -> None:
        """Upload all files of `folder`, then the mark that the result is complete."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        for name, path in zip(names, files, strict=True):
            self.put_part(stage, digest, name, path)
        self.finish(stage, digest, names, facts)

    def has_part(self, stage: str, digest: str, name: str) -> bool:
        """Whether a file of a result that may not be complete yet is there."""
        return patiently(lambda: self.store.exists(f"{self.prefix(stage, digest)}/{name}"))

    def put_part(self, stage: str, digest: str, name: str, path: Path) -> None:
        """Upload one file of a result."""
        patiently(lambda: self.store.put_file(f"{self.prefix(stage, digest)}/{name}", path))

    def finish(self, stage: str, digest: str, names: list[str], facts: dict[str, Any]) -> None:
        """Mark the result of these files as complete."""
        mark = json.dumps({**facts, "files": names}).encode()
        patiently(lambda: self.store.put_bytes(f"{self.prefix(stage, digest)}/{DONE}", mark))

    def fetch(self, stage: str, digest: str) -> Path:
        """A local folder with the stage's result, downloaded once.

        Raises:
            KeyError: the stage has not finished.
        """
        facts = self.facts(stage, digest)
        if facts is None:
            raise KeyError(f"stage {stage} with inputs {digest} has no result")
        target = self.cache / self.prefix(stage, digest)
        if not (target / DONE).exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(dir=target.parent))
            for name in facts["files"]:
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                self._get(f"{self.prefix(stage, digest)}/{name}", part / name)
            (part / DONE).write_text(json.dumps(facts))
            try:
                part.rename(target)
            except OSError:  # another process was faster
                shutil.rmtree(part)
        return target

    def _get(self, key: str, path: Path) -> None:
        patiently(lambda: self.store.get_file(key, path))


def open_artifacts(settings: Settings) -> Artifacts:
    """Those of the configured store of checkpoints, and cache: they live as long as the run they can be resumed from."""
    return Artifacts(open_store(settings, "checkpoints"), settings.cache_dir / "artifacts")


def stage_folder(stage: str, digest: str) -> Path:
    """A stage's result, by the settings of this process. Raises KeyError when it has not finished."""
    return open_artifacts(Settings()).fetch(stage, digest)
