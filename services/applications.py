"""Bundles as Ray Serve applications, one each: their stages, on the replicas that the arguments say."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from sdxs.errors import Unavailable
from services.controlnet.deployment import ControlNetReplica
from services.decoder.deployment import DecoderReplica
from services.fabric.models import PREFIX, Version, application_name, served_model
from services.fabric.pointers import Found
from services.models.service import Status
from services.placement import AppArgs, ModelArgs, Placement
from services.text_encoder.deployment import TextEncoderReplica
from services.unet.deployment import UNetReplica

_PUSH_S, _WINDOW_S = 2.0, 10.0
"""Replicas tell their load so often, and the mean of so long counts. Serve's own values would make every decision half a minute late."""

_RUNNING, _FAILED, _LEAVING = ("RUNNING",), ("DEPLOY_FAILED",), ("DELETING", "NOT_STARTED")


@dataclass(frozen=True)
class ServeApplications:
    """See services.models.service.Applications. On the Ray cluster that this process belongs to."""

    args: AppArgs

    def version(self, reference: str, found: Found) -> Version:
        """Another placement is another version: it comes as another bundle does."""
        model = self.args.of(reference)
        has_controlnets = bool(found.manifest.controlnets)
        stages = (
            "text_encoder",
            "unet",
            "decoder",
            *(("controlnet",) if has_controlnets and not model.fused_controlnet else ()),
        )
        placement = hashlib.sha256(f"{found.source} {model.model_dump_json(exclude={'model'})}".encode()).hexdigest()[:6]
        facts = served_model(found.manifest)
        sleeps = any(model.placement(stage).sleeps for stage in stages)
        return Version(application_name(facts, placement), found.source, facts, stages, sleeps)

    def statuses(self) -> Mapping[str, Status]:
        """Those of bundles."""
        return {
            name: Status(found.status in _RUNNING, found.status in _FAILED, found.status in _LEAVING, found.message.strip())
            for name, found in serve.status().applications.items()
            if name.startswith(PREFIX)
        }

    def start(self, reference: str, version: Version) -> None:
        """Returns before its replicas run. Raises Unavailable when Serve does not take it."""
        try:
            serve.run_many([self.target(reference, version)], wait_for_applications_running=False)
        except Exception as error:  # Serve has no one class for them
            raise Unavailable(f"Ray Serve does not take {version.application}: {error}") from error

    def stop(self, names: Iterable[str]) -> None:
        """Their replicas drain."""
        for name in names:
            serve.delete(name, _blocking=False)

    def target(self, reference: str, version: Version) -> Any:
        """What Serve is to run."""
        return serve.RunTarget(build_stages(version, self.args.of(reference)), name=version.application, route_prefix=None)


def build_stages(version: Version, model: ModelArgs) -> Application:
    """The stages of one bundle."""
    what = version.source, version.model.digest
    fused = bool(version.model.controlnets) and model.fused_controlnet
    text_encoder = deployment("text_encoder", TextEncoderReplica, model.placement("text_encoder")).bind(*what)
    unet = deployment("unet", UNetReplica, model.placement("unet")).bind(*what, fused)
    others = [text_encoder, unet]
    if "controlnet" in version.stages:
        others.append(deployment("controlnet", ControlNetReplica, model.placement("controlnet")).bind(*what, unet))
    return deployment("decoder", DecoderReplica, model.placement("decoder")).bind(*what, *others)


def deployment(name: str, replica: type, placement: Placement) -> serve.Deployment:
    """A deployment whose dead replicas are noticed within a second or two, not Serve's ten."""
    return serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus},
        health_check_period_s=1.0,
        health_check_timeout_s=10.0,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=20.0,
        max_replicas_per_node=placement.max_replicas_per_node,  # type: ignore[arg-type]  # None is its own default
        logging_config={"enable_access_log": False},
        **_number(placement),
    )(replica)


def _number(placement: Placement) -> dict[str, Any]:
    """Serve's options for it: fixed, or by services.fabric.scaling."""
    if placement.max_replicas is None and not placement.sleeps:
        return {"num_replicas": placement.replicas}
    return {
        "num_replicas": None,
        "autoscaling_config": AutoscalingConfig(
            min_replicas=placement.replicas,
            max_replicas=placement.max_replicas or 1,
            target_ongoing_requests=placement.target_in_flight,
            metrics_interval_s=_PUSH_S,
            look_back_period_s=_WINDOW_S,
            upscale_delay_s=placement.upscale_delay_s,
            downscale_delay_s=placement.downscale_delay_s,
            downscale_to_zero_delay_s=placement.idle_s,
            policy=AutoscalingPolicy(policy_function="services.fabric.scaling:follow_load"),
        ),
    }
