"""Calls the webhooks of ended jobs: signed, again after failures, never an address inside the server's own network.

Knows the queue, the object store for the images' URLs, and HTTP. Redirects are not followed.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import aiohttp
from google.protobuf.json_format import MessageToJson
from redis.exceptions import RedisError

from sdxs import webhooks
from sdxs.errors import NotFound, SdxsError
from sdxs.store import ObjectStore
from services.fabric.job_urls import has_images, sign_urls
from services.fabric.job_webhooks import WebhookCall, is_public, next_call, settle
from services.fabric.jobs import JobQueue

logger = logging.getLogger(__name__)

_LOOK_S = 0.5  # between two looks for webhooks that are due
_GONE = 410  # the receiver wants no more of it


class Webhooks:
    """Up to `webhook_concurrency` calls at a time; without a secret to sign with, none."""

    def __init__(self, queue: JobQueue, store: Callable[[], ObjectStore]) -> None:
        self._queue = queue
        self._store = store
        self._settings = queue.settings
        self._secret = queue.settings.webhook_secret.get_secret_value()
        self._stopping = asyncio.Event()

    async def run(self) -> None:
        """Call until `stop`."""
        if not self._secret:
            return
        connector = aiohttp.TCPConnector(socket_factory=self._socket, force_close=True)
        timeout = aiohttp.ClientTimeout(total=self._settings.webhook_timeout_s)
        headers = {"content-type": "application/json", "user-agent": "sdxs"}
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
            await asyncio.gather(*(self._work(session) for _ in range(self._settings.webhook_concurrency)))

    def stop(self) -> None:
        """End after the calls in hand."""
        self._stopping.set()

    async def _work(self, session: aiohttp.ClientSession) -> None:
        """One call after the other."""
        while not self._stopping.is_set():
            try:
                call = await next_call(self._queue)
                if call is not None:
                    await self._do(session, call)
                    continue
            except RedisError as error:
                logger.warning("the queue does not answer: %s", error)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._stopping.wait()

    async def _do(self, session: aiohttp.ClientSession, call: WebhookCall) -> None:
        """One try, and what follows from it."""
        try:
            status = await self._post(session, call)
            why = "" if 200 <= status < 300 or status == _GONE else f"status {status}"
        except NotFound:
            why = ""  # the job is forgotten
        except (aiohttp.ClientError, OSError, SdxsError, ValueError) as error:  # a timeout is an OSError
            why = f"{type(error).__name__}: {error}"
        if not await settle(self._queue, call, done=not why):
            logger.error("the webhook of job %s is given up after %d calls; the last: %s", call.job_id, call.number, why)
        elif why:
            logger.warning("the webhook of job %s, call %d: %s", call.job_id, call.number, why)

    async def _post(self, session: aiohttp.ClientSession, call: WebhookCall) -> int:
        """The receiver's status. Raises NotFound, Unavailable, aiohttp.ClientError, OSError."""
        job = await self._queue.get(call.job_id)
        if has_images(job):
            await asyncio.to_thread(sign_urls, job, self._store(), self._settings.url_ttl_s)
        payload = MessageToJson(job, indent=None).encode()
        headers = webhooks.sign(self._secret, call.webhook_id, int(time.time()), payload)
        async with session.post(call.url, data=payload, headers=headers, allow_redirects=False) as response:
            return response.status

    def _socket(self, address: Any) -> socket.socket:
        """A socket for an address that a name led to or that stood in the URL; here no trick of names gets past. Raises OSError."""
        family, kind, protocol, _, sockaddr = address
        if not self._settings.webhook_allow_private and not is_public(sockaddr[0]):
            raise PermissionError(f"{sockaddr[0]} is no public address")
        return socket.socket(family, kind, protocol)
