"""deploy/serve.yaml is what `sdxs serve --print-config` prints, and Ray Serve reads all of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from services.app import AppArgs, Placement, build, config
from services.cli import serve_config

KEPT = Path(__file__).parents[2] / "deploy/serve.yaml"


def test_the_kept_file_is_the_printed_one() -> None:
    assert KEPT.read_text() == serve_config("emoji"), "run `sdxs serve --print-config > deploy/serve.yaml`"


def test_ray_serve_reads_it_and_ignores_nothing() -> None:
    written: dict[str, Any] = yaml.safe_load(KEPT.read_text())
    schema = ServeDeploySchema.model_validate(written)
    assert set(written) <= set(ServeDeploySchema.model_fields)
    [application] = schema.applications
    assert set(written["applications"][0]) <= set(type(application).model_fields)
    assert application.import_path == "services.app:build"
    assert AppArgs.model_validate(application.args) == AppArgs()


def test_replicas_run_our_code_on_their_own_event_loop() -> None:
    """However they are started: our gRPC servers live there."""
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(KEPT.read_text())).applications
    assert application.runtime_env["env_vars"]["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0"


def test_misspelt_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="replcas"):
        AppArgs.model_validate({"unet": {"replcas": 3}})


def test_placements_reach_the_deployments() -> None:
    args = AppArgs(unet=Placement(replicas=2, max_replicas=5, num_gpus=1), worker=Placement(replicas=0))
    gateway: Any = build(args)
    unet = gateway._bound_deployment.init_args[2]._bound_deployment
    autoscaling = unet._deployment_config.autoscaling_config
    assert (unet.name, autoscaling.min_replicas, autoscaling.max_replicas) == ("unet", 2, 5)
    assert unet.ray_actor_options["num_gpus"] == 1
    assert gateway._bound_deployment.name == "gateway", "no worker was asked for"


def test_what_is_printed_is_what_is_built() -> None:
    args = AppArgs(model="emoji@prod", decoder=Placement(replicas=3))
    assert AppArgs.model_validate(config(args)["applications"][0]["args"]) == args
