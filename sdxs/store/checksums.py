"""What a server's answer to a write must say, if the bytes arrived as they were."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sdxs.store.transfer import read_chunks

PART_BYTES = 16 << 20
_MOST_PARTS = 9_000  # S3 takes 10 000
_MD5 = re.compile(r"[0-9a-f]{32}(-[0-9]+)?")
_SUM = "x-amz-checksum-sha256"
_ENCRYPTED = "x-amz-server-side-encryption"


@dataclass(frozen=True)
class Checksums:
    """Of an object's bytes, and of the parts it is uploaded in."""

    size: int
    sha256: str
    """Hexadecimal."""
    etag: str
    """As S3 makes it: the MD5 of the bytes, or that of the parts' MD5s and their number."""
    part_bytes: int

    @classmethod
    def of(cls, chunks: Iterable[bytes], size: int) -> Checksums:
        """Of `size` bytes, piece by piece."""
        part_bytes = max(PART_BYTES, -(-size // _MOST_PARTS))
        whole, part, room, parts = hashlib.sha256(), _md5(), part_bytes, list[bytes]()
        for chunk in chunks:
            whole.update(chunk)
            rest = memoryview(chunk)
            while len(rest) > room:
                part.update(rest[:room])
                parts.append(part.digest())
                rest, part, room = rest[room:], _md5(), part_bytes
            part.update(rest)
            room -= len(rest)
        parts.append(part.digest())
        etag = parts[0].hex() if len(parts) == 1 else f"{_md5(b''.join(parts)).hexdigest()}-{len(parts)}"
        return cls(size, whole.hexdigest(), etag, part_bytes)

    @classmethod
    def of_file(cls, path: Path) -> Checksums:
        """Of a file as it is now."""
        return cls.of(read_chunks(path), path.stat().st_size)

    def headers(self) -> dict[str, str]:
        """What has the server check the bytes; of several parts the SDK sends each one's digest itself."""
        return {} if "-" in self.etag else {_SUM: base64_of(self.sha256)}

    def admits(self, etag: str, headers: Mapping[str, str]) -> bool:
        """Whether an answer goes with these bytes. One that tells no digest does: an ETag under encryption with keys is none."""
        said = headers.get(_SUM, "")
        if said and "-" not in said and said != base64_of(self.sha256):
            return False
        tells = _MD5.fullmatch(etag) and headers.get(_ENCRYPTED, "AES256") == "AES256"
        return not tells or etag == self.etag


def base64_of(sha256: str) -> str:
    """A digest in hexadecimal as S3's headers have it."""
    return base64.b64encode(bytes.fromhex(sha256)).decode()


def _md5(data: bytes = b"") -> hashlib._Hash:
    return hashlib.md5(data, usedforsecurity=False)
