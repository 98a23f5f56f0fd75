"""Where the references of the served models point: looked at again and again, opened when they have moved.

Knows the registry; does not know what is done with a bundle.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from sdxs import registry
from sdxs.bundle import Manifest
from sdxs.errors import AlreadyExists, NotFound, SdxsError
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 5.0, 300.0


class Pause:
    """Between tries of what failed: twice as long each time, up to five minutes."""

    def __init__(self) -> None:
        self._length_s = _FIRST_PAUSE_S
        self._ends = 0.0

    @property
    def over(self) -> bool:
        """Whether another try is due."""
        return time.monotonic() >= self._ends

    @property
    def left_s(self) -> float:
        """Seconds until it is."""
        return max(0.0, self._ends - time.monotonic())

    def begin(self) -> None:
        """After a failure."""
        self._ends = time.monotonic() + self._length_s
        self._length_s = min(2 * self._length_s, _LONGEST_PAUSE_S)


@dataclass(frozen=True)
class Found:
    """A bundle that was opened and is whole, and a reference that always means it."""

    source: str
    manifest: Manifest


class Pointer:
    """One reference and the newest bundle it is known to mean."""

    def __init__(self, reference: str, settings: ServingSettings) -> None:
        self.reference = reference
        self.found: Found | None = None
        self.error = ""
        """Why what it means now was not found; `found` stays what it was."""
        self._settings = settings
        self._moves = registry.moves(reference)
        self._failed = ""
        self._pause = Pause()

    def look(self) -> bool:
        """Whether it means another bundle than before, which has then been opened, file by file. Blocks; raises nothing.

        One that does not move is looked at until it is found, and a hub that is away not each second.
        """
        if not self._moves and (self.found is not None or not self._pause.over):
            return False
        source = ""
        try:
            pins = registry.pins(self.reference, self._settings)
            if not pins:
                raise NotFound(f"model {self.reference!r} is not known")
            source = pins[0]
            if self.found is not None and source == self.found.source:
                self.error = ""
                return False
            if source == self._failed and not self._pause.over:
                return False
            _, manifest = registry.open_model(source, self._settings)
        except SdxsError as error:
            self._fail(source, error)
            return False
        except Exception as error:  # of a library below: the next look may succeed
            logger.exception("cannot look where %s points", self.reference)
            self._fail(source, error)
            return False
        self.found, self.error, self._failed = Found(source, manifest), "", ""
        return True

    def refuse(self, error: SdxsError) -> None:
        """What was found is not to be served; it is looked at again later."""
        assert self.found is not None
        source, self.found = self.found.source, None
        self._fail(source, error)

    def _fail(self, source: str, error: Exception) -> None:
        """What failed before is tried again later and later; another bundle at once."""
        if source != self._failed:
            self._failed, self._pause = source, Pause()
        if str(error) != self.error:
            logger.warning("%s: %s", self.reference, error)
        self.error = str(error)
        self._pause.begin()


class Pointers:
    """Those of all served models, in their order; `found` is what they are known to mean."""

    def __init__(self, references: Sequence[str], settings: ServingSettings, found: Sequence[Found] = ()) -> None:
        self.all = [Pointer(reference, settings) for reference in references]
        for pointer, known in zip(self.all, found, strict=False):
            pointer.found = known

    async def look(self) -> list[Pointer]:
        """Those that mean another bundle than before. The second of two with models of one name is an error."""
        return [each for each in self.all if await asyncio.to_thread(each.look) and not self._taken(each)]

    def _taken(self, pointer: Pointer) -> bool:
        """Whether another reference already serves a model of its name; then it is refused."""
        assert pointer.found is not None
        name = pointer.found.manifest.name
        for other in self.all:
            if other is not pointer and other.found is not None and other.found.manifest.name == name:
                pointer.refuse(AlreadyExists(served_twice(name, other.reference, pointer.reference)))
                return True
        return False


def served_twice(name: str, one: str, other: str) -> str:
    """What is said of two references with models of one name."""
    return f"{one!r} and {other!r} are both models named {name!r}: callers could not tell them apart"


def open_all(references: Sequence[str], settings: ServingSettings) -> list[Found]:
    """The bundle of each. Raises what `registry.open_model` does, and AlreadyExists for two of one name."""
    found: list[Found] = []
    for reference in references:
        pins = registry.pins(reference, settings)
        source = pins[0] if pins else reference
        manifest = registry.open_model(source, settings)[1]
        for before, known in zip(references, found, strict=False):
            if known.manifest.name == manifest.name:
                raise AlreadyExists(served_twice(manifest.name, before, reference))
        found.append(Found(source, manifest))
    return found
