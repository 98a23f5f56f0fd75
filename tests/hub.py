"""Stand-ins for the Hugging Face hub: one in place of a function of its library, one that speaks its HTTP; and the library's own cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants
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
        self, name: str, *, revision: str | None = None, allow_patterns: list[str], ignore_patterns: list[str], **_: Any
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


@dataclass
class HttpHub:
    """Repositories behind the paths, headers and error codes of the hub that its library reads; all that was asked for is in `asked`.

    `publish` makes a commit of a folder and lets a branch mean it.
    """

    url: str = ""
    commits: dict[tuple[str, str], Path] = field(default_factory=dict)
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)

    def publish(self, repository: str, folder: Path, branch: str = "main") -> str:
        """Returns the commit. The folder must stay as it is."""
        commit = hashlib.sha1(f"{repository} {len(self.commits)}".encode()).hexdigest()
        self.commits[repository, commit] = folder
        self.branches[repository, branch] = commit
        return commit

    def downloaded(self) -> set[str]:
        """Paths of files whose contents were sent."""
        return {path.split("/", 5)[5] for path in self.asked if path.startswith("GET") and "/resolve/" in path}

    def variables(self, cache: Path) -> dict[str, str]:
        """Of a process that is to use this hub, and no other's cache."""
        plain = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
        return {"HF_ENDPOINT": self.url, "HF_HUB_CACHE": str(cache), **plain}

    def use(self, patch: pytest.MonkeyPatch, cache: Path) -> None:
        """The same in this process."""
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "ENDPOINT", self.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", self.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))


@contextlib.contextmanager
def http_hub() -> Iterator[HttpHub]:
    """An empty one on a port of its own."""
    hub = HttpHub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    serving = threading.Thread(target=server.serve_forever)
    serving.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        serving.join()


_API = re.compile(r"/api/models/(?P<repository>[^/]+/[^/]+)/(?P<what>revision|tree)/(?P<revision>.+)")
_FILE = re.compile(r"/(?P<repository>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


class _Handler(BaseHTTPRequestHandler):
    hub: HttpHub

    def log_message(self, *_: object) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        match = _API.fullmatch(path) or _FILE.fullmatch(path)
        repository = match["repository"] if match else ""
        if match is None or repository not in {name for name, _ in self.hub.commits}:
            return self._send(401, {"X-Error-Code": "RepoNotFound"}, b"{}")
        if repository in self.hub.gated:
            return self._send(403, {"X-Error-Code": "GatedRepo"}, b"{}")
        commit = self.hub.branches.get((repository, match["revision"]), match["revision"])
        folder = self.hub.commits.get((repository, commit))
        if folder is None:
            return self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
        if match.re is _API:
            return self._send(200, {"Content-Type": "application/json"}, self._described(match, commit, folder))
        data = (folder / match["path"]).read_bytes()
        etag = hashlib.sha256(data).hexdigest()
        return self._send(200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, data)

    def _described(self, match: re.Match[str], commit: str, folder: Path) -> bytes:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        if match["what"] == "tree":
            entries = [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": hashlib.sha1(path.read_bytes()).hexdigest()}
                for name, path in zip(names, files, strict=True)
            ]
            return json.dumps(entries).encode()
        known = {"id": match["repository"], "sha": commit, "siblings": [{"rfilename": name} for name in names]}
        return json.dumps(known).encode()

    def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
