"""LoRAs of a pipeline in this process: opened where they are, attached at their first use. Imports torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxs.errors import InvalidRequest, NotFound
from sdxs.lora import Lora, check_distinct, check_number, check_scale, published
from sdxs.lora.adapters import Adapters, Use
from sdxs.lora.files import MAX_BYTES, LoraWeights, read
from sdxs.settings import Settings
from sdxs.store import open_store

_KEPT = 16


class Applied(NamedTuple):
    """A LoRA as it was understood."""

    name: str
    digest: str
    scale: float


class _Opened(NamedTuple):
    name: str
    digest: str
    weights: LoraWeights


class Loras:
    """Those that were used last stay attached, at most 16, or as many as an image has.

    Args:
        stages: what they change.
        settings: where published ones are.
    """

    def __init__(self, stages: Sequence[Adapters], settings: Settings | None = None) -> None:
        self._stages = stages
        self.settings = settings
        self._attached: OrderedDict[str, None] = OrderedDict()

    def uses(self, asked: Sequence[Lora]) -> list[Use]:
        """Them, attached, as `Adapters.use` takes them, with the scale that a message would carry.

        Raises InvalidRequest and NotFound that name the field, and CorruptArtifact.
        """
        opened = self._open(asked)
        for i, each in enumerate(opened):
            self._attach(each, f"loras[{i}].name")
        for digest in list(self._attached)[: max(0, len(self._attached) - max(_KEPT, len(opened)))]:
            self._forget(digest)
        return [(_key(each.digest), float(np.float32(lora.scale))) for each, lora in zip(opened, asked, strict=True)]

    def applied(self, asked: Sequence[Lora]) -> list[Applied]:
        """What they are, for a receipt. Raises as `uses`."""
        return [Applied(each.name, each.digest, lora.scale) for each, lora in zip(self._open(asked), asked, strict=True)]

    def _open(self, asked: Sequence[Lora]) -> list[_Opened]:
        check_number(asked)
        for i, lora in enumerate(asked):
            check_scale(lora.scale, f"loras[{i}]")
        opened = [self._opened(lora.name, f"loras[{i}].name") for i, lora in enumerate(asked)]
        check_distinct(each.digest for each in opened)
        return opened

    def _opened(self, name: str | Path, field: str) -> _Opened:
        if isinstance(name, Path) or "/" in name:
            path = Path(name)
            weights = read(path, field)
            return _Opened(path.resolve().stem, f"sha256:{weights.digest}", weights)
        settings = self.settings or Settings()
        try:
            file, manifest = published.fetch(name, open_store(settings, "models"), settings.cache_dir, MAX_BYTES)
        except InvalidRequest as error:
            raise InvalidRequest(field, error.value, error.allowed) from None
        except NotFound as error:
            error.field = field
            raise
        return _Opened(manifest.name, manifest.digest, read(file, field))

    def _attach(self, opened: _Opened, field: str) -> None:
        """Unless it is."""
        if opened.digest not in self._attached:
            fitted = [(stage, stage.fit(opened.weights, field, opened.name)) for stage in self._stages]
            try:
                for stage, part in fitted:
                    stage.put(stage.attached(_key(opened.digest), part))
            except InvalidRequest as error:
                self._forget(opened.digest)
                raise InvalidRequest(field, opened.name, error.allowed) from error
        self._attached[opened.digest] = None
        self._attached.move_to_end(opened.digest)

    def _forget(self, digest: str) -> None:
        self._attached.pop(digest, None)
        for stage in self._stages:
            stage.put(stage.detached(_key(digest)))


def _key(digest: str) -> str:
    """Under which it is attached: PEFT's names have no colon."""
    return digest.removeprefix("sha256:")
