"""The control room as a Ray Serve deployment."""

import asyncio
from collections.abc import Sequence

from services.fabric.models import Plan, Report
from services.models.service import Applications, ControlRoom
from services.settings import ServingSettings


class ModelsReplica:
    """One is enough: without it all goes on as it is, but for names that move, and it learns all it knows again."""

    async def __init__(self, references: Sequence[str], applications: Applications) -> None:  # type: ignore[misc]  # Serve awaits it
        self._room = ControlRoom(references, applications, ServingSettings())
        self._running = asyncio.create_task(self._room.run())

    async def follow(self, report: Report) -> Plan | None:
        """See ControlRoom.follow."""
        return self._room.follow(report)

    def check_health(self) -> None:
        """Serve replaces a room whose loop has ended."""
        if self._running.done():
            raise RuntimeError("the control room's loop has ended")

    async def __del__(self) -> None:
        """A room that is replaced must not stop what its successor starts."""
        self._running.cancel()
