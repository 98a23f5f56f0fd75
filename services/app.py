"""The Serve application: which deployments there are, how many replicas of each, on what resources.

`build` is what `serve run services.app:build`, `deploy/serve.yaml` and `sdxs serve` all call; the values live in AppArgs alone.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from sdxs import registry
from services.controlnet.deployment import ControlNetReplica
from services.decoder.deployment import DecoderReplica
from services.fabric.environment import REPLICA_ENVIRONMENT
from services.gateway.deployment import GatewayReplica
from services.settings import ServingSettings
from services.text_encoder.deployment import TextEncoderReplica
from services.unet.deployment import UNetReplica
from services.worker.deployment import WorkerReplica

APP_NAME = "sdxs"


class Placement(BaseModel):
    """How many replicas of one room, on what."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replicas: int = Field(1, ge=0)
    max_replicas: int | None = Field(None, description="more than `replicas`: scale with the load, up to so many")
    target_in_flight: float = Field(
        4.0, gt=0, description="calls in flight, or jobs not ended, per replica the scaling aims at"
    )
    num_cpus: float = Field(0.1, ge=0, description="what Ray reserves; not a limit")
    num_gpus: float = Field(0.0, ge=0)
    max_replicas_per_node: int | None = Field(
        None, ge=1, description="the same for `unet` and `controlnet`: each node has both, side by side"
    )


class AppArgs(BaseModel):
    """Arguments of the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = "emoji"
    text_encoder: Placement = Placement()
    unet: Placement = Placement()
    controlnet: Placement = Placement()
    fused_controlnet: bool = Field(
        False, description="ControlNets inside the U-Net's replicas, in place of replicas of their own"
    )
    decoder: Placement = Placement()
    gateway: Placement = Placement()
    worker: Placement = Placement()


def build(args: AppArgs) -> Application:
    """The application; with `worker.replicas` 0 there is no worker, and for a model without ControlNets none of theirs."""
    has_controlnets = bool(registry.read_manifest(args.model, ServingSettings()).controlnets)
    text_encoder = _deployment("text_encoder", TextEncoderReplica, args.text_encoder).bind(args.model)
    unet = _deployment("unet", UNetReplica, args.unet).bind(args.model, has_controlnets and args.fused_controlnet)
    decoder = _deployment("decoder", DecoderReplica, args.decoder).bind(args.model)
    stages = [text_encoder, unet, decoder]
    if has_controlnets and not args.fused_controlnet:
        stages.append(_deployment("controlnet", ControlNetReplica, args.controlnet).bind(args.model, unet))
    gateway = _deployment("gateway", GatewayReplica, args.gateway).bind(args.model, *stages)
    if not args.worker.replicas:
        return gateway
    return _deployment("worker", WorkerReplica, args.worker).bind(gateway)


def config(args: AppArgs) -> dict[str, Any]:
    """The same application as a Serve config file (ray.serve.schema.ServeDeploySchema)."""
    application = {
        "name": APP_NAME,
        "route_prefix": None,
        "import_path": "services.app:build",
        "runtime_env": {"env_vars": dict(REPLICA_ENVIRONMENT)},
        "args": args.model_dump(exclude_none=True),
    }
    return {"proxy_location": "Disabled", "applications": [application]}


def _deployment(name: str, replica: type, placement: Placement) -> serve.Deployment:
    """A deployment whose dead replicas are noticed within a second or two, not Serve's ten."""
    options: dict[str, Any] = {"num_replicas": placement.replicas}
    if placement.max_replicas is not None:
        policy = AutoscalingPolicy(policy_function="services.fabric.scaling:follow_load")
        options = {
            "num_replicas": None,
            "autoscaling_config": AutoscalingConfig(
                min_replicas=placement.replicas,
                max_replicas=placement.max_replicas,
                target_ongoing_requests=placement.target_in_flight,
                policy=policy,
            ),
        }
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=20.0,
        max_replicas_per_node=placement.max_replicas_per_node,  # type: ignore[arg-type]  # None is its own default
        logging_config={"enable_access_log": False},
        **options,
    )(replica)
