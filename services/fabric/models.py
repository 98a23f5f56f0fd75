"""Served models as the control room, the gateways and those who start them speak of them: plain data that crosses processes."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from sdxs.bundle import Manifest
from sdxs.references import likely_name


@dataclass(frozen=True)
class ServedModel:
    """What the gateway knows of a model it serves."""

    name: str
    digest: str
    width: int
    height: int
    max_prompt_tokens: int
    controlnets: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Types by name; no types: any."""
    size_step: int = 8
    """Sides of images are multiples of it."""


@dataclass(frozen=True)
class Version:
    """One bundle as it runs: on certain replicas, from a reference that always means this bundle."""

    application: str
    """Names it: another bundle has another, and so has the same on other replicas."""
    source: str
    model: ServedModel
    stages: tuple[str, ...] = ()
    """Deployments in the order of services.gateway.chain.Chain: text encoder, U-Net, decoder, and the ControlNets' where there is one."""
    sleeps: bool = False
    """Whether a stage may be without replicas while nobody asks."""


@dataclass(frozen=True)
class Wanted:
    """One line of the plan: what is to be served under one reference."""

    reference: str
    version: Version | None = None
    """None: it is not known yet, or cannot be had."""
    standing: Version | None = None
    """What is served until `version` has drawn an image somewhere."""
    error: str = ""
    """Why the newest bundle is not served."""

    @property
    def name(self) -> str:
        """The name of its model, as far as it is known."""
        known = self.version or self.standing
        return known.model.name if known else likely_name(self.reference)


Plan = tuple[Wanted, ...]
"""In the order of the server's models, the default first."""


@dataclass(frozen=True)
class Report:
    """What a gateway has made of its plan."""

    gateway: str
    serving: Mapping[str, str]
    """Application by reference."""
    held: frozenset[str]
    """Applications it holds channels to: those it serves, tries, or has calls on."""
    errors: Mapping[str, str]
    """By application: why it is not served."""


def served_model(manifest: Manifest) -> ServedModel:
    """What the gateway needs to know of a bundle."""
    size = manifest.image_size
    return ServedModel(
        manifest.name, manifest.digest, size, size, manifest.max_prompt_tokens, manifest.controlnets, manifest.upsampling
    )


PREFIX = "sdxs-"
"""With which the names of bundles' applications begin."""


def prefix(name: str) -> str:
    """With which those of a model's bundles begin."""
    return f"{PREFIX}{name}-"


def application_name(model: ServedModel, placement: str) -> str:
    """Of a bundle on certain replicas, which `placement` tells apart from others."""
    return f"{prefix(model.name)}{model.digest.removeprefix('sha256:')[:12] or 'unsealed'}-{placement}"
