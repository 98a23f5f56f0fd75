"""Where things are: endpoints, credentials, folders. Read from SDXS_* variables, in composition roots only.

Never what science (recipes), never how many (Helm values).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from sdxs.errors import InvalidRequest

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\[\]]*):(?P<port>[0-9]{1,5})")

Kind = Literal["models", "checkpoints", "artifacts", "datasets"]
"""Life cycles of objects: kept until someone withdraws them; until a run is done with; for a time; as long as they are learnt from."""

_ORIGIN = re.compile(r"https?://[^/?#@\s]+/?")


def data_home() -> Path:
    """The user's data folder by the XDG convention."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "sdxs"


def cache_home() -> Path:
    """The user's cache folder by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdxs"


class Settings(BaseSettings):
    """All settings of client, services and trainer.

    store_url: `file:///folder` or `s3://name[/prefix]`, for all that is stored; the s3_* fields say where that S3 is.
    models_url, checkpoints_url, artifacts_url, datasets_url: where one life cycle is, as `file:///folder` or `s3://bucket[/prefix]`;
        empty: see `place`.
    torch_device: where networks compute: cpu, cuda, cuda:1; empty: the GPU that this process sees, else the CPU.
    torch_dtype: what they compute in; empty: float16 on a GPU, float32 on a CPU, which has no faster one. The step to x0 is always float32.
    gateway_http_address: where browsers find the stream's WebSocket, `host:port`; empty: nowhere.
    s3_public_url: the same S3 as those see it who get presigned URLs, `http://host:port` or https; empty: by s3_endpoint.
    """

    model_config = SettingsConfigDict(env_prefix="SDXS_", frozen=True, extra="forbid")

    store_url: str = f"file://{data_home() / 'store'}"
    models_url: str = ""
    checkpoints_url: str = ""
    artifacts_url: str = ""
    datasets_url: str = ""
    s3_endpoint: str = "127.0.0.1:9000"
    s3_access_key: str = ""
    s3_secret_key: SecretStr = SecretStr("")
    s3_secure: bool = False
    s3_region: str = "us-east-1"
    s3_public_url: str = ""
    redis_url: str = "redis://127.0.0.1:6379/0"
    gateway_address: str = "127.0.0.1:8500"
    gateway_http_address: str = ""
    cache_dir: Path = cache_home()
    torch_threads: int = 1
    torch_device: str = Field("", pattern=r"^(cpu|cuda(:\d+)?)?$")
    torch_dtype: Literal["", "float32", "float16", "bfloat16"] = ""

    def __init__(self, **values: Any) -> None:
        """From arguments, then SDXS_* variables. Raises InvalidRequest that names the variable."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            name = "_".join(map(str, first["loc"])).upper()
            field = type(self).model_fields.get(name.lower())
            shown = "…" if field is not None and field.annotation is SecretStr else first["input"]
            allowed = first["msg"].removeprefix("Value error, ")  # pydantic's words before those of our own validators
            raise InvalidRequest(f"SDXS_{name}", shown, allowed) from (None if shown == "…" else error)

    @field_validator("s3_public_url")
    @classmethod
    def _is_an_origin(cls, url: str) -> str:
        """A path in front of the bucket would not be part of the signature."""
        if url and not _ORIGIN.fullmatch(url):
            raise ValueError("http://host[:port] or https://host[:port]")
        return url.rstrip("/")

    @field_validator("gateway_address", "gateway_http_address")
    @classmethod
    def _has_a_port(cls, address: str, info: ValidationInfo) -> str:
        """Port 0, any free one, is no address that clients could know."""
        if not address and info.field_name == "gateway_http_address":
            return address
        found = _ADDRESS.fullmatch(address)
        if not found or not 1 <= int(found["port"]) <= 65535:
            raise ValueError("host:port, with a port from 1 to 65535")
        return address

    def place(self, kind: Kind) -> str:
        """URL of the store of one life cycle: its own, else by store_url: `file:///folder/<kind>`, `s3://<name>-<kind>[/prefix]`.

        A bucket each, not a prefix each: rights, lifecycle rules, versions and quotas are a bucket's.
        """
        if own := str(getattr(self, f"{kind}_url")):
            return own
        parts = urlparse(self.store_url)
        if parts.scheme == "s3" and parts.netloc:
            return f"s3://{parts.netloc}-{kind}{parts.path}"
        return f"{self.store_url.rstrip('/')}/{kind}"

    def environment(self) -> dict[str, str]:
        """The SDXS_* variables that make another process see the same settings. Holds secrets: never log it."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        plain = {k: v.get_secret_value() if isinstance(v, SecretStr) else str(v) for k, v in values.items()}
        return {f"SDXS_{name.upper()}": value for name, value in plain.items()}
