"""The arguments of a server: which models, how many replicas of each room, on what. The values live here alone.

`deploy/serve.yaml`, the chart and `sdxs serve` all say them in this form. Knows no Ray, which reads its variables when it is imported.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from sdxs.errors import InvalidRequest
from sdxs.references import Reference, is_folder, likely_name

STAGES = ("text_encoder", "unet", "controlnet", "decoder")


class Placement(BaseModel):
    """How many replicas of one room, on what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=0, description="of a stage 0: none while nobody asks for its model")
    max_replicas: int | None = Field(None, ge=1, description="more than `replicas`: scale with the load, up to so many")
    target_in_flight: float = Field(
        4.0, gt=0, description="calls in flight, or jobs not ended, per replica the scaling aims at"
    )
    upscale_delay_s: float = Field(
        5.0, ge=0, description="so long more are wanted before they are started; the first is at once"
    )
    downscale_delay_s: float = Field(60.0, ge=0, description="so long fewer are wanted before some are stopped")
    idle_s: float = Field(300.0, ge=0, description="so long nobody asks before the last is stopped, where `replicas` is 0")
    num_cpus: float = Field(0.1, ge=0, description="what Ray reserves; not a limit")
    num_gpus: float = Field(0.0, ge=0)
    max_replicas_per_node: int | None = Field(
        None, ge=1, description="the same for `unet` and `controlnet`: each node has both, side by side"
    )

    @model_validator(mode="after")
    def _most_is_not_less(self) -> "Placement":
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas: got {self.max_replicas}, allowed: {self.replicas} (replicas) or more")
        return self

    @property
    def sleeps(self) -> bool:
        """Whether there may be no replica, as a stage."""
        return self.replicas == 0


class ModelArgs(BaseModel):
    """One model that is served, and the values in which it differs from what the server has for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(min_length=1, description="name, name@pointer, sha256:digest, folder, s3:// bundle or hub id")
    text_encoder: Placement | None = None
    unet: Placement | None = None
    controlnet: Placement | None = None
    decoder: Placement | None = None
    fused_controlnet: bool | None = None

    def placement(self, stage: str) -> Placement:
        """Of a stage, once AppArgs has filled it in."""
        found: Placement = getattr(self, stage)
        return found


class AppArgs(BaseModel):
    """Arguments of the server's application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("emoji", min_length=1, description="the one model, where `models` names none")
    models: tuple[str | ModelArgs, ...] = Field((), description="several; the first is the default")
    text_encoder: Placement = Placement()
    unet: Placement = Placement()
    controlnet: Placement = Placement()
    fused_controlnet: bool = Field(
        False, description="ControlNets inside the U-Net's replicas, in place of replicas of their own"
    )
    decoder: Placement = Placement()
    gateway: Placement = Placement()
    worker: Placement = Placement()

    @model_validator(mode="after")
    def _is_served_once(self) -> "AppArgs":
        """Two pointers of one name would be two models of that name."""
        names = [_name(reference) for reference in self.references]
        twice = [reference for reference, name in zip(self.references, names, strict=True) if names.count(name) > 1]
        if twice:
            raise ValueError(f"models: got {', '.join(twice)}, allowed: each name once")
        return self

    @model_validator(mode="after")
    def _goes_together(self) -> "AppArgs":
        """What is said of one model and what holds for all."""
        for reference in self.references:
            self.of(reference)
        return self

    @model_validator(mode="after")
    def _has_a_gateway(self) -> "AppArgs":
        if not self.gateway.replicas:
            raise ValueError("gateway.replicas: got 0, allowed: 1 or more")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        """The models, the default first."""
        return tuple(each if isinstance(each, str) else each.model for each in self.models) or (self.model,)

    @field_serializer("models")
    def _as_said(self, models: tuple[str | ModelArgs, ...]) -> list[Any]:
        """Without what nobody said, which the others' placements say."""
        return [each if isinstance(each, str) else each.model_dump(mode="json", exclude_unset=True) for each in models]

    def of(self, reference: str) -> ModelArgs:
        """All that holds for one model. Raises KeyError for one that is not served."""
        if reference not in self.references:
            raise KeyError(reference)
        own = {each.model: each for each in self.models if isinstance(each, ModelArgs)}
        said = own.get(reference, ModelArgs(model=reference))
        rooms = {stage: _merged(getattr(self, stage), getattr(said, stage)) for stage in STAGES}
        fused = self.fused_controlnet if said.fused_controlnet is None else said.fused_controlnet
        return ModelArgs(model=reference, fused_controlnet=fused, **rooms)


def _merged(shared: Placement, own: Placement | None) -> Placement:
    """What holds for all, but for what is said of one. Raises ValueError where the two do not go together."""
    return shared if own is None else Placement(**dict(shared) | own.model_dump(exclude_unset=True))


def _name(reference: str) -> str:
    """Of the model, where the reference says it; else the reference."""
    try:
        asked = Reference.parse(reference)
    except InvalidRequest as error:
        raise ValueError(f"model: {error}") from error
    return asked.name or (reference if is_folder(asked.base) or ":" in asked.base else likely_name(reference))
