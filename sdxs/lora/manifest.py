"""What is known of a published LoRA without reading it."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sdxs.bundle import FileEntry
from sdxs.errors import CorruptArtifact

MANIFEST = "lora.json"


class LoraManifest(BaseModel):
    """Facts of a LoRA, and the digest of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]{0,63}$")
    model: str
    """Name of the model it was made for; what it fits is told by its layers."""
    base: str = ""
    """Digest of the bundle it was found to fit."""
    rank: int = Field(gt=0)
    networks: dict[str, int]
    """How many layers of which network it changes."""
    trigger_words: tuple[str, ...] = ()
    description: str = ""
    file: FileEntry
    created: str = ""

    @property
    def digest(self) -> str:
        """`sha256:` of the canonical JSON without `created`, as a bundle's."""
        data = self.model_dump(mode="json", exclude={"created"})
        return "sha256:" + hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def reads_prompts(self) -> bool:
        """Whether it changes a text encoder."""
        return any(network != "unet" for network in self.networks)


def parse(text: str | bytes) -> LoraManifest:
    """A manifest from its JSON. Raises CorruptArtifact that names the field."""
    try:
        return LoraManifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptArtifact(f"{MANIFEST}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
