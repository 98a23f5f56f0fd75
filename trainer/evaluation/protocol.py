"""Protocols: how a bundle is measured, in one complete frozen file beside the recipes of how it is made."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from trainer import documents
from trainer.sections import Section

Metric = Literal["fid", "kid", "precision_recall", "clip_score"]


class CaptionsSection(Section):
    """A file of prompts, in its order: lines of text, JSONL with a `column`, or COCO's annotations (the first caption of each image)."""

    path: str = Field(min_length=1)
    format: Literal["text", "jsonl", "coco"] = "text"
    column: str = "caption"


class ReferenceSection(Section):
    """What is real: a folder of images, or for FID alone an .npz of their statistics (mu, sigma)."""

    images: str | None = None
    statistics: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.images is None) == (self.statistics is None):
            raise ValueError("images or statistics: what is real comes from one of the two")
        return self


class NetworksSection(Section):
    """Inception's weights, a CLIP model (folder or hub id), the world of an embedded judge."""

    inception: str | None = None
    clip: str | None = None
    judge: str | None = None


class Protocol(Section):
    """Image i is prompt i from the noise of `seed` + i. It and the real ones are measured at `size` x `size`, in the eyes of `features`."""

    kind: Literal["evaluation"]
    name: str = Field(pattern="^[a-z0-9][a-z0-9._-]{0,63}$")
    images: int = Field(gt=1)
    size: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    metrics: tuple[Metric, ...] = Field(min_length=1)
    features: Literal["inception", "clip", "judge"] = "inception"
    prompts: CaptionsSection
    reference: ReferenceSection | None = None
    networks: NetworksSection = NetworksSection()

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        real = [metric for metric in self.metrics if metric != "clip_score"]
        if real and self.reference is None:
            raise ValueError(f"reference: {', '.join(real)} measure a distance to something real")
        if self.reference and self.reference.statistics and set(real) - {"fid"}:
            raise ValueError("reference.statistics serves fid alone; kid and precision_recall need reference.images")
        return self

    def with_networks(self, inception: str | None, clip: str | None) -> Protocol:
        """With networks named elsewhere in place of the file's."""
        named = {name: value for name, value in (("inception", inception), ("clip", clip)) if value}
        return self.model_copy(update={"networks": self.networks.model_copy(update=named)})


def built_in() -> list[str]:
    """Names of the protocols that ship with the trainer."""
    return documents.shipped("trainer.evaluation.protocols")


def load(name_or_path: str) -> Protocol:
    """Read a protocol by built-in name or file path.

    Raises:
        NotFound: neither a built-in name nor a file.
        InvalidRequest: the file is not TOML or a field is missing, unknown or out of range; names the field.
    """
    _, data = documents.read("protocol", name_or_path, "trainer.evaluation.protocols")
    return parse(data)


def parse(data: dict[str, Any]) -> Protocol:
    """Raises InvalidRequest with the name of the first field that is missing, unknown or out of range."""
    try:
        return Protocol.model_validate(data)
    except ValidationError as error:
        raise documents.refused("protocol", data, error) from error
