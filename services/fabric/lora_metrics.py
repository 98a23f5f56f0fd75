"""A replica's LoRAs as Prometheus reads them from Ray: prefix `ray_sdxs_`. Once a second, so that calls pay nothing."""

import asyncio

from ray.util.metrics import Counter, Gauge

from services.fabric.loras import ReplicaLoras

_PAUSE_S = 1.0


class LoraMetrics:
    """Of one stage; Ray adds node, process and deployment."""

    def __init__(self, loras: ReplicaLoras) -> None:
        self._loras = loras
        self._tags = {"stage": loras.stage}
        self._told = {"hit": 0, "miss": 0}
        self._uses = Counter(
            "sdxs_lora_cache", "LoRAs that requests asked for, by whether they were attached", ("stage", "outcome")
        )
        self._attached = Gauge("sdxs_loras_attached", "LoRAs that are attached or being loaded", ("stage",))
        self._bytes = Gauge("sdxs_lora_bytes", "Bytes of those that are attached", ("stage",))

    async def export(self) -> None:
        """Run for as long as the replica does."""
        while True:
            self.tell()
            await asyncio.sleep(_PAUSE_S)

    def tell(self) -> None:
        """What is new since the last time."""
        for outcome, number in (("hit", self._loras.hits), ("miss", self._loras.misses)):
            if new := number - self._told[outcome]:
                self._told[outcome] = number
                self._uses.inc(new, {**self._tags, "outcome": outcome})
        self._attached.set(len(self._loras), self._tags)
        self._bytes.set(self._loras.nbytes, self._tags)
