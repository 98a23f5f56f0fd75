"""The server's Serve application: gateways, job workers and the control room, which starts an application for each served bundle.

`build` is what `serve run services.app:build`, `deploy/serve.yaml` and `sdxs serve` all call.
"""

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from services.applications import ServeApplications, deployment
from services.fabric.environment import REPLICA_ENVIRONMENT
from services.fabric.pointers import Found
from services.gateway.deployment import GatewayReplica
from services.models.deployment import ModelsReplica
from services.placement import AppArgs, ModelArgs, Placement
from services.worker.deployment import WorkerReplica

__all__ = ["APP_NAME", "AppArgs", "ModelArgs", "Placement", "build", "config", "targets"]

APP_NAME = "sdxs"


def build(args: AppArgs) -> Application:
    """The application; with `worker.replicas` 0 there is no worker."""
    room = deployment("models", ModelsReplica, Placement()).bind(args.references, ServeApplications(args))
    gateway = deployment("gateway", GatewayReplica, args.gateway).bind(room)
    if not args.worker.replicas:
        return gateway
    return deployment("worker", WorkerReplica, args.worker).bind(gateway)


def targets(args: AppArgs, found: Sequence[Found]) -> list[serve.RunTarget]:
    """The application and those of the bundles that its models are now, to be started side by side; the control room then finds them."""
    applications = ServeApplications(args)
    bundles = [
        applications.target(reference, applications.version(reference, each))
        for reference, each in zip(args.references, found, strict=True)
    ]
    return [serve.RunTarget(build(args), name=APP_NAME, route_prefix=None), *bundles]


def config(args: AppArgs) -> dict[str, Any]:
    """The same application as a Serve config file (ray.serve.schema.ServeDeploySchema)."""
    application = {
        "name": APP_NAME,
        "route_prefix": None,
        "import_path": "services.app:build",
        "runtime_env": {"env_vars": dict(REPLICA_ENVIRONMENT)},
        "args": args.model_dump(mode="json", exclude_none=True, exclude={"model" if args.models else "models"}),
    }
    return {"proxy_location": "Disabled", "applications": [application]}
