"""Presigned URLs by Signature Version 4, headers included: the SDK signs the host alone, so a URL of its own takes any bytes of any size.

https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qsl, quote, urlsplit

from pydantic import SecretStr

_ALGORITHM = "AWS4-HMAC-SHA256"


@dataclass(frozen=True)
class Signer:
    """Credentials for one region."""

    access_key: str
    secret_key: SecretStr
    region: str

    def sign(
        self, method: str, url: str, expires: timedelta, headers: Mapping[str, str] | None = None, at: datetime | None = None
    ) -> str:
        """The URL with a signature in its query. Whoever uses it must send exactly these headers, beside any that do not begin with x-amz-.

        Args:
            url: as it will be requested, path and query percent-encoded.
            at: when it begins to hold; None: now.
        """
        if not self.access_key:
            return url  # an S3 that asks nobody who he is
        moment = (at or datetime.now(UTC)).strftime("%Y%m%dT%H%M%SZ")
        scope = f"{moment[:8]}/{self.region}/s3/aws4_request"
        parts = urlsplit(url)
        signed = {"host": parts.netloc, **{name.lower(): value.strip() for name, value in (headers or {}).items()}}
        names = ";".join(sorted(signed))
        asked = {
            **dict(parse_qsl(parts.query, keep_blank_values=True)),
            "X-Amz-Algorithm": _ALGORITHM,
            "X-Amz-Credential": f"{self.access_key}/{scope}",
            "X-Amz-Date": moment,
            "X-Amz-Expires": str(int(expires.total_seconds())),
            "X-Amz-SignedHeaders": names,
        }
        query = "&".join(f"{_quoted(name)}={_quoted(value)}" for name, value in sorted(asked.items()))
        lines = [
            method,
            parts.path,
            query,
            *(f"{name}:{signed[name]}" for name in sorted(signed)),
            "",
            names,
            "UNSIGNED-PAYLOAD",
        ]
        canonical = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        signature = self._signature(f"{_ALGORITHM}\n{moment}\n{scope}\n{canonical}", scope)
        return f"{parts.scheme}://{parts.netloc}{parts.path}?{query}&X-Amz-Signature={signature}"

    def _signature(self, text: str, scope: str) -> str:
        key = f"AWS4{self.secret_key.get_secret_value()}".encode()
        for part in scope.split("/"):
            key = hmac.digest(key, part.encode(), "sha256")
        return hmac.digest(key, text.encode(), "sha256").hex()


def _quoted(text: str) -> str:
    return quote(text, safe="-_.~")
