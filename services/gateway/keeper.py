"""Brings a gateway to what its plan says: opens a bundle's stages, has them draw, and only then lets them take over.

What cannot be opened or does not draw leaves the bundle before it in place, and is tried again later and later.
"""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np

from sdxs import images
from sdxs.errors import SdxsError
from sdxs.v1 import control_pb2, gateway_pb2
from services.fabric.deadline import Deadline
from services.fabric.models import Plan, Report, Version, Wanted
from services.fabric.pointers import Pause
from services.gateway import checks
from services.gateway.table import Entry, ModelTable

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
_FIRST_IMAGE_S = 300.0
_BLANK = images.encode(np.zeros((8, 8, 3), np.uint8), images.PNG, "")
"""A control image that shows nothing."""

Open = Callable[[Version], Awaitable[Entry]]
"""Opens the stages of a bundle; they need not be there yet. Raises SdxsError."""


class Keeper:
    """Of one gateway's table."""

    def __init__(self, table: ModelTable, open_version: Open) -> None:
        self._gateway = secrets.token_hex(8)
        self._table = table
        self._open = open_version
        self._opened: set[Entry] = set()
        self._trying: dict[str, asyncio.Task[None]] = {}
        self._errors: dict[str, str] = {}
        self._pauses: dict[str, Pause] = {}
        self._lines: dict[str, Wanted] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def follow(self, plan: Plan) -> None:
        """Begin with what is new in the plan, and end what is no longer in it. Again and again: that is also what tries again."""
        known = {version.application for line in plan for version in _choices(line)}
        self._errors = {name: error for name, error in self._errors.items() if name in known}
        self._pauses = {name: pause for name, pause in self._pauses.items() if name in known}
        plan = tuple(map(self._with_error, plan))
        self._lines = {line.reference: line for line in plan}
        for entry in self._table.expect(plan):
            self._close_later(entry)
        missing = {version.application: (line.reference, version) for line in plan for version in self._missing(line.reference)}
        for name in set(self._trying) - set(missing):
            self._trying.pop(name).cancel()
        for name, (reference, version) in missing.items():
            pause = self._pauses.get(name)
            if (name not in self._trying or self._trying[name].done()) and (pause is None or pause.over):
                self._trying[name] = self._spawn(self._bring(reference, version))

    def report(self) -> Report:
        """For the control room."""
        serving = {reference: entry.application for reference, entry in self._table.entries.items()}
        tried = {name for name, task in self._trying.items() if not task.done()}
        held = tried | {entry.application for entry in self._opened}
        return Report(self._gateway, serving, frozenset(held), dict(self._errors))

    async def close(self) -> None:
        """Hang up everywhere, after the last call."""
        self.follow(())
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _with_error(self, line: Wanted) -> Wanted:
        """With what this gateway knows of its newest bundle."""
        found = self._errors.get(line.version.application, "") if line.version else ""
        return replace(line, error=line.error or found)

    def _missing(self, reference: str) -> list[Version]:
        """What would be better than what is served: the newest; where nothing is served, that which stands too."""
        line, entry = self._lines.get(reference), self._table.entries.get(reference)
        if line is None:
            return []
        if entry is None:
            return _choices(line)
        return [line.version] if line.version and line.version.application != entry.application else []

    async def _bring(self, reference: str, version: Version) -> None:
        """Open, draw, switch. A model that may sleep need not draw unless it takes over from another."""
        name, line = version.application, self._lines[reference]
        newest = line.version is not None and line.version.application == name
        proof = newest and (line.standing is not None or reference in self._table.entries)
        leaving: Entry | None = None
        try:
            leaving = entry = await self._open(version)
            self._opened.add(entry)
            if proof or not version.sleeps:
                await warm(entry)
            if name in {each.application for each in self._missing(reference)}:  # the plan may have changed meanwhile
                leaving = self._table.switch(reference, entry)
                logger.info("%s is now %s", reference, version.model.digest)
            self._errors.pop(name, None)
            self._pauses.pop(name, None)
        except SdxsError as error:
            self._fail(version, str(error))
        except Exception as error:
            logger.exception("cannot serve %s", name)
            self._fail(version, repr(error))
        finally:  # of a try that is given up too
            if leaving is not None:
                self._close_later(leaving)

    def _fail(self, version: Version, error: str) -> None:
        """Say why, and wait before the next try."""
        logger.warning("%s does not draw: %s", version.application, error)
        self._errors[version.application] = error
        self._pauses.setdefault(version.application, Pause()).begin()

    def _close_later(self, entry: Entry) -> None:
        """Hang up after the last call that uses it."""
        self._spawn(self._close(entry))

    def _spawn(self, part: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(part)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _close(self, entry: Entry) -> None:
        try:
            await entry.close()
        finally:
            self._opened.discard(entry)


def _choices(line: Wanted) -> list[Version]:
    """What may be served."""
    return [version for version in (line.standing, line.version) if version is not None]


async def warm(entry: Entry) -> None:
    """One image through all stages once they are there, ControlNets included. Raises SdxsError when a stage does not answer."""
    model = entry.model
    plain = gateway_pb2.GenerateRequest(prompt="warm", seed=0)
    asked = [plain]
    for controlnet in model.controlnets:
        blank = control_pb2.Control(image=_BLANK, controlnet=controlnet, preprocessed=True)
        asked.append(gateway_pb2.GenerateRequest(prompt="warm", seed=0, controls=[blank]))
    with entry.use() as chain:
        while not chain.ready:  # noqa: ASYNC110 - stages come and go without an event for it
            await asyncio.sleep(_LOOK_S)
        for request in asked:
            order = checks.order(request, {model.name: model}, len(_BLANK))
            await chain.run(order, checks.receipts(order), Deadline.after(_FIRST_IMAGE_S))
