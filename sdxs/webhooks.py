"""Signatures of webhooks, as the Standard Webhooks specification has them (standardwebhooks.com, version 1).

    webhook-id         the same each time the same news is sent: remember it, and what comes twice does no harm
    webhook-timestamp  seconds since 1970, of this try
    webhook-signature  v1,base64(HMAC-SHA256(secret, id.timestamp.payload)); several, apart by spaces, while secrets change

Knows bytes and headers; how they travel is the callers' matter.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import time
from collections.abc import Mapping

from sdxs.errors import InvalidRequest, PermissionDenied

TOLERANCE_S = 300
_PREFIX = "whsec_"


def key_of(secret: str) -> bytes:
    """The key of `whsec_…` or plain base64. Raises InvalidRequest unless that is 24 to 64 bytes."""
    try:
        key = base64.b64decode(secret.removeprefix(_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not 24 <= len(key) <= 64:
        raise InvalidRequest("webhook_secret", "…", "whsec_ and the base64 of 24 to 64 random bytes")
    return key


def sign(secret: str, webhook_id: str, timestamp: int, payload: bytes) -> dict[str, str]:
    """The three headers. Raises InvalidRequest for a secret that is none."""
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": f"v1,{_signature(key_of(secret), webhook_id, str(timestamp), payload)}",
    }


def verify(headers: Mapping[str, str], body: bytes, secret: str, tolerance_s: float = TOLERANCE_S) -> str:
    """The webhook's id, once it is certain that the holder of `secret` sent this `body`, and no longer than `tolerance_s` ago.

    `body` are the bytes as they came; header names are read in any case. Raises PermissionDenied, InvalidRequest for a secret
    that is none.
    """
    key = key_of(secret)
    named = {name.lower(): value for name, value in headers.items()}
    webhook_id, timestamp = named.get("webhook-id", ""), named.get("webhook-timestamp", "")
    if not webhook_id or not (timestamp.isascii() and timestamp.isdigit()):
        raise PermissionDenied("the webhook has no id or no timestamp")
    if abs(time.time() - int(timestamp)) > tolerance_s:
        raise PermissionDenied(f"the webhook's timestamp {timestamp} is more than {tolerance_s:g} s from now")
    expected = _signature(key, webhook_id, timestamp, body).encode()
    for entry in named.get("webhook-signature", "").split():
        version, _, found = entry.partition(",")
        if version == "v1" and hmac.compare_digest(found.encode(), expected):
            return webhook_id
    raise PermissionDenied("the webhook's signature is not of this secret and body")


def _signature(key: bytes, webhook_id: str, timestamp: str, payload: bytes) -> str:
    """base64(HMAC-SHA256(key, id.timestamp.payload))."""
    signed = b".".join((webhook_id.encode(), timestamp.encode(), payload))
    return base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()
