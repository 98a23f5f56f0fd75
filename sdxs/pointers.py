"""Names that point at digests: each with all it ever pointed at, moved by compare-and-swap, so that of two at once neither is lost.

In a store a pointer is `<prefix><name>/<pointer>.json`. Bundles and LoRAs have names, each kind below a prefix of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from sdxs.errors import CorruptArtifact, InvalidRequest, NotFound, PreconditionFailed
from sdxs.store import ObjectStore

DEFAULT = "prod"
NAME = re.compile(r"(?P<name>[a-z0-9][a-z0-9._-]{0,63})(@(?P<pointer>[a-z0-9][a-z0-9._-]{0,63}))?")
DIGEST = re.compile(r"sha256:[0-9a-f]{12,64}")
_TRIES = 20


@dataclass(frozen=True)
class Move:
    """One digest that a pointer was moved to; withdrawn when it was rolled back from."""

    digest: str
    at: str
    withdrawn: bool = False


@dataclass(frozen=True)
class Pointers:
    """Those of one kind of thing."""

    store: ObjectStore
    prefix: str
    kind: str
    """What they point at, as errors call it."""

    def history(self, name: str, pointer: str) -> list[Move]:
        """Where the pointer has been, oldest first; empty if it does not exist."""
        return self._read(name, pointer)[0]

    def promote(self, name: str, pointer: str, digest: str) -> None:
        """Point it at a digest, in one write."""

        def append(moves: list[Move]) -> list[Move]:
            if moves and current(moves).digest == digest:
                return moves
            return [*moves, Move(digest, datetime.now(UTC).isoformat(timespec="seconds"))]

        for _ in range(_TRIES):  # of two that promote at once, one is first and the other last; neither is lost
            try:
                self._change(name, pointer, append)
            except PreconditionFailed:
                continue
            return
        raise PreconditionFailed(f"{name}@{pointer} keeps changing")

    def rollback(self, name: str, pointer: str) -> str:
        """Point back at what was before the present one; returns its digest. Again: one further back.

        Raises:
            PreconditionFailed: there is nothing to go back to, or someone else moved the pointer at this moment.
        """

        def withdraw(moves: list[Move]) -> list[Move]:
            standing = [i for i, move in enumerate(moves) if not move.withdrawn]
            if len(standing) < 2:
                raise PreconditionFailed(f"{name}@{pointer} has no earlier {self.kind} to go back to")
            last = standing[-1]
            return [*moves[:last], replace(moves[last], withdrawn=True), *moves[last + 1 :]]

        return current(self._change(name, pointer, withdraw)).digest

    def all(self) -> Iterator[tuple[str, str]]:
        """(name, pointer) of each."""
        for key in self.store.list(self.prefix):
            name, pointer = key.removeprefix(self.prefix).removesuffix(".json").split("/")
            yield name, pointer

    def _key(self, name: str, pointer: str) -> str:
        return f"{self.prefix}{name}/{pointer}.json"

    def _read(self, name: str, pointer: str) -> tuple[list[Move], str | None]:
        """A pointer's history, and the tag of what was read."""
        key = self._key(name, pointer)
        try:
            data, tag = self.store.get_tagged(key)
        except NotFound:
            return [], None
        try:
            return [Move(**entry) for entry in json.loads(data)], tag
        except (ValueError, TypeError) as error:
            raise CorruptArtifact(f"{key}: {error}") from error

    def _change(self, name: str, pointer: str, edit: Callable[[list[Move]], list[Move]]) -> list[Move]:
        """Replace a history by an edited one. Raises PreconditionFailed when someone else was faster."""
        before, tag = self._read(name, pointer)
        after = edit(before)
        if after != before:
            self.store.put_if(self._key(name, pointer), json.dumps([asdict(move) for move in after]).encode(), tag)
        return after


def current(moves: list[Move]) -> Move:
    """What a pointer with this history points at."""
    return [move for move in moves if not move.withdrawn][-1]


def split(reference: str, field: str, allowed: str) -> tuple[str, str]:
    """(name, pointer) of `name` or `name@pointer`. Raises InvalidRequest."""
    match = NAME.fullmatch(reference)
    if not match:
        raise InvalidRequest(field, reference, allowed)
    return match["name"], match["pointer"] or DEFAULT


def whole_digest(digest: str, store: ObjectStore, prefix: str, manifest: str, kind: str) -> str:
    """The one published digest that begins so, below a prefix of the store. Raises NotFound when there is none or more than one.

    Args:
        manifest: name of the file without which nothing is published.
        kind: what it is called in errors.
    """
    if not DIGEST.fullmatch(digest):
        raise InvalidRequest("digest", digest, "sha256: and 12 to 64 hex digits")
    keys = store.list(prefix + digest.removeprefix("sha256:"))
    found = {key.removeprefix(prefix).split("/")[0] for key in keys if key.endswith(f"/{manifest}")}
    if len(found) != 1:
        raise NotFound(f"{kind} {digest!r} is {'ambiguous' if found else 'not'} in the store")
    return f"sha256:{found.pop()}"
