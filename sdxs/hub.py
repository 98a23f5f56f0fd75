"""Repositories of the Hugging Face hub as local folders: what is needed of one, in one form, downloaded once and found again offline.

huggingface_hub does the work; this module says which files, and turns its errors into ours. It does not know what a model is.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from sdxs.errors import NotFound, PermissionDenied, PreconditionFailed, SdxsError, Unavailable

SCHEME = "hf://"
_ID = re.compile(
    r"(hf://)?(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(@(?P<revision>[A-Za-z0-9._/-]+))?"
)
_UNWANTED = ["*.bin", "*.ckpt", "*.msgpack"]  # weights that exist as safetensors too, or run code when loaded
_DUPLICATES = ["*.fp16*", "*non_ema*"]  # of the plain weights, where these are there


@dataclass(frozen=True)
class HubId:
    """A repository and its revision: a branch, a tag or a commit."""

    repository: str
    revision: str = "main"

    @classmethod
    def parse(cls, text: str) -> HubId | None:
        """Of `owner/name`, `owner/name@revision`, or either behind `hf://`; None for anything else."""
        match = _ID.fullmatch(text)
        return cls(match["repository"], match["revision"] or "main") if match else None

    @property
    def name(self) -> str:
        """Without its owner."""
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"{SCHEME}{self.repository}@{self.revision}"


def snapshot(what: str, source: str, wanted: list[str]) -> Path:
    """The folder of a repository at a revision, with those files of it that match `wanted`: of each network one form of its weights, the
    plain one, or what there is where that is missing. Never anything but safetensors. What is in the hub's cache is not fetched again.

    Args:
        what: it is, for messages.
        source: see HubId.

    Raises:
        NotFound: there is no such repository or revision; or it is not in the cache, and the hub cannot be reached.
        PermissionDenied: it is gated.
        Unavailable: the hub failed.
    """
    found = HubId.parse(source)
    if found is None:
        raise _nowhere(what, source)
    try:
        return _download(found, wanted)
    except ModuleNotFoundError as error:
        raise PreconditionFailed(f'{what} {source!r}: hub ids need {error.name}: pip install "sdxs[model]"') from error
    except Exception as error:
        raise _translated(what, source, error) from error


def pinned(what: str, source: str) -> HubId:
    """The same repository at the commit that its revision means now, or last meant if the hub is away. Raises as `snapshot`."""
    found = HubId.parse(source)
    if found is not None and re.fullmatch("[0-9a-f]{40}", found.revision):
        return found
    folder = snapshot(what, source, ["config.json", "model_index.json"])
    assert found is not None
    return HubId(found.repository, folder.name)  # in the hub's cache a snapshot is named by its commit


def _download(source: HubId, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from tqdm import tqdm  # type: ignore[import-untyped]

    class Bar(tqdm):  # type: ignore[misc]
        """Where people look, also when the libraries are told to be quiet: gigabytes take minutes."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options | {"disable": None})

    name, revision = source.repository, source.revision
    fetch = functools.partial(snapshot_download, name, revision=revision, tqdm_class=Bar)
    folder = Path(fetch(allow_patterns=wanted, ignore_patterns=[*_UNWANTED, *_DUPLICATES]))
    weights = [path.with_name("*.safetensors").relative_to(folder) for path in folder.glob("**/config.json")]
    bare = [each.as_posix() for each in weights if not any(folder.glob(each.as_posix()))]
    more = [f"{each}*" for each in bare if any(fnmatch(each, pattern) for pattern in wanted)]
    if more:
        folder = Path(fetch(allow_patterns=more, ignore_patterns=_UNWANTED))
    return folder


def _nowhere(what: str, source: str) -> NotFound:
    return NotFound(f"{what} {source!r}: neither a folder nor a hub id (owner/name, owner/name@revision)")


def _translated(what: str, source: str, error: Exception) -> SdxsError:
    """Ours for one of huggingface_hub's. Those of the HTTP library below it, which changes, say that the hub failed."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return _nowhere(what, source)
    if isinstance(error, errors.GatedRepoError):
        return PermissionDenied(f"{what} {source!r}: the hub gives it only to those who asked for it; set HF_TOKEN")
    if isinstance(error, errors.RepositoryNotFoundError | errors.RevisionNotFoundError):
        return NotFound(f"{what} {source!r}: no such folder, and the hub has none or does not show it without HF_TOKEN")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return NotFound(f"{what} {source!r}: no such folder, not downloaded yet, and the hub cannot be reached")
    return Unavailable(f"{what} {source!r}: the hub said {error}")
