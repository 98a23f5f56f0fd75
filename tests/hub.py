"""A stand-in for the Hugging Face hub: repositories in folders, revisions among them, and the library's own cache of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils._paths import filter_repo_objects


@dataclass
class FakeHub:
    """Downloads as `snapshot_download` does, by the library's own reading of patterns; what was fetched is in `fetched`.

    Args:
        repositories: folders by name and revision.
    """

    repositories: dict[tuple[str, str], Path]
    cache: Path
    reachable: bool = True
    fetched: list[str] = field(default_factory=list)

    def snapshot_download(
        self, name: str, *, revision: str | None = None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        """The folder of a snapshot. Raises LocalEntryNotFoundError when the hub is away and nothing was downloaded before."""
        source = self.repositories[name, revision or "main"]
        target = self.cache / name.replace("/", "--") / (revision or "main")
        if not self.reachable:
            if not target.is_dir():
                raise LocalEntryNotFoundError("not in the cache")
            return str(target)
        paths = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
        for path in filter_repo_objects(paths, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            if not (target / path).exists():
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source / path, target / path)
                self.fetched.append(path)
        return str(target)


def cached(cache: Path, name: str, revision: str, folder: Path) -> None:
    """Leave a folder in a cache of huggingface_hub's own layout, as if it had been downloaded."""
    repository, commit = cache / f"models--{name.replace('/', '--')}", f"{len(list(cache.glob('*/snapshots/*'))):040x}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
