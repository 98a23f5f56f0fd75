"""A gateway's numbers as Prometheus reads them from Ray: prefix `ray_sdxs_`. Once a second, so that calls and frames pay nothing."""

import asyncio

from ray.util.metrics import Counter, Gauge

from services.gateway.cache import ByteCache
from services.gateway.stream import Sessions

_PAUSE_S = 1.0


class GatewayMetrics:
    """Its sessions and its cache of prompts; Ray adds node and process."""

    def __init__(self, sessions: Sessions, cache: ByteCache) -> None:
        self._sessions = sessions
        self._cache = cache
        self._told: dict[tuple[str, str], int] = {}
        self._counters = {
            "frames": Counter("sdxs_stream_frames", "Frames that came"),
            "answers": Counter("sdxs_stream_answers", "Frames by what became of them", ("outcome",)),
            "sessions": Counter("sdxs_stream_sessions", "Sessions that were opened"),
            "refused": Counter("sdxs_stream_refused", "Sessions refused because too many waited"),
            "prompts": Counter("sdxs_prompt_cache", "Prompts looked up in the cache of text embeddings", ("outcome",)),
        }
        self._gauges = {
            "active": Gauge("sdxs_stream_active", "Sessions that are served"),
            "queued": Gauge("sdxs_stream_queued", "Sessions that wait for a place"),
            "held": Gauge("sdxs_stream_held_frames", "Frames that wait, are drawn, or are not yet sent"),
        }

    async def export(self) -> None:
        """Run for as long as the gateway does."""
        while True:
            self.tell()
            await asyncio.sleep(_PAUSE_S)

    def tell(self) -> None:
        """What is new since the last time."""
        counts = self._sessions.counts
        for name in ("frames", "sessions", "refused"):
            self._add(name, "", getattr(counts, name))
        for outcome, number in counts.answered.items():
            self._add("answers", outcome, number)
        self._add("prompts", "hit", self._cache.hits)
        self._add("prompts", "miss", self._cache.misses)
        for name, gauge in self._gauges.items():
            gauge.set(getattr(self._sessions, name))

    def _add(self, name: str, outcome: str, number: int) -> None:
        """Counters grow by what is new."""
        new = number - self._told.get((name, outcome), 0)
        if new:
            self._told[name, outcome] = number
            self._counters[name].inc(new, {"outcome": outcome} if outcome else {})
