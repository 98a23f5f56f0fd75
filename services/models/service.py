"""The control room's loop: see where the names point, start what is new, tell the gateways, stop what nobody needs.

Knows the pointers, the gateways' reports, and applications by three verbs; does not know Ray. What it knows it can learn again: from the
store where the names point, from the applications which bundles run, from the gateways what they serve.
"""

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from sdxs import registry
from sdxs.errors import SdxsError
from services.fabric.models import Plan, Report, Version, Wanted, prefix
from services.fabric.pointers import Found, Pause, Pointer, Pointers
from services.settings import ServingSettings

logger = logging.getLogger(__name__)

_HEARD_S = 30.0
"""A gateway that has not been heard of for so long is gone: Serve replaces one that does not answer for ten seconds."""
_LINGER_S = 5.0
"""So long an application has had no use before it is stopped: a gateway may just have been told of it."""
_QUIET_S = 10.0
"""How often the applications are looked at while nothing changes."""


@dataclass(frozen=True)
class Status:
    """How an application fares."""

    running: bool
    failed: bool = False
    leaving: bool = False
    """It is being stopped."""
    message: str = ""


class Applications(Protocol):
    """Bundles as they run. The methods block; those that ask a cluster raise what its library does."""

    def version(self, reference: str, found: Found) -> Version:
        """The bundle as it is to run for that reference."""
        ...

    def statuses(self) -> Mapping[str, Status]:
        """Those that there are."""
        ...

    def start(self, reference: str, version: Version) -> None:
        """Begin to start one."""
        ...

    def stop(self, names: Iterable[str]) -> None:
        """Begin to stop some."""
        ...


@dataclass
class _Line:
    """One reference."""

    pointer: Pointer
    version: Version | None = None
    standing: Version | None = None
    error: str = ""
    pause: Pause = field(default_factory=Pause)

    def move(self, version: Version, serving: set[str]) -> None:
        """Another bundle is wanted; what some gateway serves stands until it draws."""
        if self.version is not None and self.version.application in serving:
            self.standing = self.version
        if self.standing is not None and self.standing.application == version.application:
            self.standing = None
        self.version, self.error, self.pause = version, "", Pause()

    def wanted(self) -> Wanted:
        """As the gateways are told."""
        return Wanted(self.pointer.reference, self.version, self.standing, self.error or self.pointer.error)


class ControlRoom:
    """Of one server. `run` it; gateways call `follow`."""

    def __init__(self, references: Sequence[str], applications: Applications, settings: ServingSettings) -> None:
        self._settings = settings
        self._applications = applications
        self._pointers = Pointers(references, settings)
        self._lines = [_Line(pointer) for pointer in self._pointers.all]
        self._heard: dict[str, tuple[float, Report]] = {}
        self._idle_since: dict[str, float] = {}
        self._began = time.monotonic()
        self._known = False
        self._looked = -_QUIET_S
        self._statuses: Mapping[str, Status] = {}

    def follow(self, report: Report) -> Plan | None:
        """Take a gateway's report, give it its plan; None while this room has not yet seen where the names point."""
        now = time.monotonic()
        self._heard[report.gateway] = now, report
        self._heard = {name: told for name, told in self._heard.items() if now - told[0] < _HEARD_S}
        return tuple(line.wanted() for line in self._lines) if self._known else None

    async def run(self) -> None:
        """For as long as the server does."""
        while True:
            try:
                await self.turn()
            except Exception:  # the cluster's controller may be away
                logger.exception("a turn of the control room failed")
            await asyncio.sleep(min(1.0, self._settings.models_watch_s))

    async def turn(self) -> None:
        """One look at everything."""
        for pointer in await self._pointers.look():
            await self._move(next(line for line in self._lines if line.pointer is pointer))
        self._known = True
        self._settle()
        if self._is_quiet():
            return
        self._statuses, self._looked = await asyncio.to_thread(self._applications.statuses), time.monotonic()
        for line in self._lines:
            await self._start(line)
        await self._stop_unused()

    async def _move(self, line: _Line) -> None:
        """Its reference means another bundle."""
        assert line.pointer.found is not None
        first = line.version is None
        line.move(self._applications.version(line.pointer.reference, line.pointer.found), self._serving(line))
        if first:
            line.standing = await asyncio.to_thread(self._left_standing, line)
        logger.warning("%s: %s is wanted", line.pointer.reference, line.version.model.digest if line.version else "")
        self._looked = -_QUIET_S

    def _left_standing(self, line: _Line) -> Version | None:
        """What an earlier control room had running when it ended in the middle of a switch."""
        assert line.version is not None
        running = {name for name, status in self._applications.statuses().items() if status.running}
        if line.version.application in running or not running:
            return None
        for source in registry.pins(line.pointer.reference, self._settings)[1:]:
            try:
                manifest = registry.read_manifest(source, self._settings)
            except SdxsError as error:
                logger.warning("%s: %s", source, error)
                continue
            version = self._applications.version(line.pointer.reference, Found(source, manifest))
            if version.application in running:
                return version
        return None

    def _settle(self) -> None:
        """What stood needs to stand no longer once all gateways serve what is wanted."""
        for line in self._lines:
            if line.version is not None and self._serving(line) == {line.version.application}:
                line.standing = None

    def _serving(self, line: _Line) -> set[str]:
        """What gateways serve under the reference; with "" where one serves nothing."""
        return {report.serving.get(line.pointer.reference, "") for _, report in self._heard.values()}

    def _needed(self) -> set[str]:
        """Applications that are in the plan, or that a gateway still holds."""
        planned = {v.application for line in self._lines for v in (line.version, line.standing) if v is not None}
        return planned.union(*(report.held for _, report in self._heard.values()))

    def _is_quiet(self) -> bool:
        """Whether there is nothing to do for which the applications must be looked at again soon."""
        busy = any(line.standing or line.error for line in self._lines) or set(self._statuses) - self._needed()
        moving = not all(status.running for status in self._statuses.values())
        return not busy and not moving and time.monotonic() - self._looked < _QUIET_S

    async def _start(self, line: _Line) -> None:
        """The wanted application if there is none, and again after a pause if it has failed."""
        if line.version is None:
            return
        status = self._statuses.get(line.version.application)
        if status is not None and status.leaving:
            return  # its name is free in a moment
        if status is not None and not status.failed:
            line.error = ""
            return
        if status is not None and not line.error:
            line.error = status.message
            line.pause.begin()
            logger.warning("%s cannot start: %s", line.version.application, status.message)
        if not line.pause.over:
            return
        try:
            await asyncio.to_thread(self._applications.start, line.pointer.reference, line.version)
        except SdxsError as error:
            line.error = str(error)
            line.pause.begin()
        self._looked = -_QUIET_S

    async def _stop_unused(self) -> None:
        """Those that neither the plan nor a gateway needs. A room that has just begun does not know the gateways yet."""
        now = time.monotonic()
        unused = {name for name, status in self._statuses.items() if not status.leaving} - self._needed()
        unknown = tuple(prefix(line.wanted().name) for line in self._lines if line.version is None)
        self._idle_since = {name: self._idle_since.get(name, now) for name in unused if not name.startswith(unknown)}
        names = [name for name, since in self._idle_since.items() if now - since >= _LINGER_S]
        if names and self._heard and now - self._began >= _HEARD_S:
            logger.warning("stopping %s", ", ".join(names))
            await asyncio.to_thread(self._applications.stop, names)
