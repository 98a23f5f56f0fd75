"""Bytes that a gateway keeps: text embeddings by bundle and prompt, images by digest."""

from collections import OrderedDict
from collections.abc import Hashable


class ByteCache:
    """The least recently used go when they pass `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self.hits = self.misses = 0
        """How often a key was there, or was not."""
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[Hashable, bytes] = OrderedDict()

    def get(self, key: Hashable) -> bytes | None:
        """What was put there, if it still is."""
        found = self._kept.get(key)
        if found is None:
            self.misses += 1
            return None
        self.hits += 1
        self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, data: bytes) -> None:
        """Keep it, unless it alone is too large."""
        if len(data) > self._max_bytes or key in self._kept:
            return
        self._kept[key] = data
        self._bytes += len(data)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._kept.popitem(last=False)[1])
