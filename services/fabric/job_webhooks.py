"""Which ended jobs have a webhook to call and when, and which addresses may be called at all.

Due times stand in a sorted set, for a stream knows none: who takes a call moves it to when its lease ends, a failed one moves to its
next try, so the death of a worker only delays it. At least once: a receiver may get the same webhook-id twice.
"""

import asyncio
import ipaddress
import re
import socket
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

from sdxs.errors import InvalidRequest, PreconditionFailed, Unavailable
from services.fabric import job_scripts as scripts
from services.fabric.jobs import JobQueue
from services.settings import ServingSettings

_URL = re.compile(r"https?://[!-~]{1,2040}", re.IGNORECASE)
_LOOKUP_S = 3.0
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_MAX_PAUSE_S = 3600.0

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class WebhookCall:
    """One try, in this worker's hands until `until` (seconds since 1970)."""

    job_id: str
    url: str
    webhook_id: str
    """The same for each try; another when a replayed job ends again."""
    number: int
    until: float


async def next_call(queue: JobQueue) -> WebhookCall | None:
    """A webhook that is due, None if none is. Raises redis.RedisError."""
    now = time.time()
    until = now + 3 * queue.settings.webhook_timeout_s
    answer = await queue.run(scripts.CALL_WEBHOOK, now, until)
    if not answer:
        return None
    job_id, number = answer[0].decode(), answer[1]
    url, run = await queue.redis.hmget(queue.key(job_id), "webhook", "run")
    return WebhookCall(job_id, (url or b"").decode(), f"{job_id}.{(run or b'').decode()}", number, until)


async def settle(queue: JobQueue, call: WebhookCall, done: bool) -> bool:
    """It is over, or is to be tried again after a pause that doubles. False: that was the last try. Raises redis.RedisError."""
    again = not done and call.number < queue.settings.webhook_max_calls
    pause_s = min(queue.settings.webhook_pause_s * 2.0 ** (call.number - 1), _MAX_PAUSE_S)
    await queue.run(scripts.SETTLE_WEBHOOK, call.job_id, call.until, time.time() + pause_s if again else "")
    return done or again


async def check_url(url: str, settings: ServingSettings) -> None:
    """For the caller to know at once; what is called is checked again at each call.

    Raises PreconditionFailed when this server signs nothing, InvalidRequest(field="webhook_url"), Unavailable when names cannot be
    looked up.
    """
    if not settings.webhook_secret.get_secret_value():
        raise PreconditionFailed("this server calls no webhooks: SDXS_WEBHOOK_SECRET is empty")
    host, port = _parts(url, settings)
    if settings.webhook_allow_private:
        return
    try:
        async with asyncio.timeout(_LOOKUP_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError) as error:
        if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
            raise Unavailable(f"the host of webhook_url cannot be looked up now: {error.strerror}") from None
        raise InvalidRequest("webhook_url", url, "a host that has an address") from None
    except TimeoutError:
        raise Unavailable("the host of webhook_url cannot be looked up in time") from None
    if not all(is_public(sockaddr[0]) for *_, sockaddr in found):
        raise InvalidRequest("webhook_url", url, "a host with a public address")


def _parts(url: str, settings: ServingSettings) -> tuple[str, int | None]:
    """Host and port. Raises InvalidRequest."""
    schemes = ("https", "http") if settings.webhook_allow_http else ("https",)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        parts, host, port = None, None, None
    if (
        not _URL.fullmatch(url)
        or "\\" in url
        or parts is None
        or not host
        or parts.scheme not in schemes
        or "@" in parts.netloc
    ):
        allowed = f"{' or '.join(schemes)}://host[:port]/path, ASCII, at most 2048 characters, no user name"
        raise InvalidRequest("webhook_url", url, allowed)
    return host, port or (443 if parts.scheme == "https" else 80)


def is_public(host: object) -> bool:
    """Whether an IP address belongs to the internet: not private, loopback, link-local, shared, reserved or multicast."""
    try:
        address: Address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    inner = _inner(address)
    if inner is not None:
        return is_public(inner)
    return address.is_global and not address.is_multicast


def _inner(address: Address) -> ipaddress.IPv4Address | None:
    """The IPv4 address that packets to an IPv6 address come out at."""
    if isinstance(address, ipaddress.IPv4Address):
        return None
    if address in _NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.teredo is not None:
        return address.teredo[1]
    return address.ipv4_mapped or address.sixtofour
