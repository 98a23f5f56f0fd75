"""Stage results in the object store: addressed by stage and input digest, complete when `done.json` exists."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sdxs.store import ObjectStore

DONE = "done.json"


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
        if not self.store.exists(key):
            return None
        facts: dict[str, Any] = json.loads(self.store.get_bytes(key))
        return facts

    def save(self, stage: str, digest: str, folder: Path, facts: dict[str, Any]) -> None:
        """Upload all files of `folder`, then the mark that the result is complete."""
        prefix = self.prefix(stage, digest)
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        for name, path in zip(names, files, strict=True):
            self.store.put_file(f"{prefix}/{name}", path)
        self.store.put_bytes(f"{prefix}/{DONE}", json.dumps({**facts, "files": names}).encode())

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
                self.store.get_file(f"{self.prefix(stage, digest)}/{name}", part / name)
            (part / DONE).write_text(json.dumps(facts))
            try:
                part.rename(target)
            except OSError:  # another process was faster
                shutil.rmtree(part)
        return target
