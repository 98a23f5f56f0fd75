"""deploy/serve.yaml is what `sdxs serve --print-config` prints, and Ray Serve reads all of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from services.app import AppArgs, Placement, build, config
from services.cli import app as cli
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
    beside = Placement(replicas=2, max_replicas_per_node=1)
    args = AppArgs(model="emoji@prod", decoder=Placement(replicas=3), unet=beside, controlnet=beside, fused_controlnet=True)
    assert AppArgs.model_validate(config(args)["applications"][0]["args"]) == args


@pytest.mark.parametrize("fused", [False, True])
def test_the_printed_file_says_whether_controlnets_are_fused(fused: bool) -> None:
    options = ["--print-config", *(["--fused-controlnet"] if fused else [])]
    printed = CliRunner().invoke(cli, options, catch_exceptions=False)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(printed.stdout)).applications
    assert AppArgs.model_validate(application.args).fused_controlnet is fused


def deployments(args: AppArgs) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Of an application: each deployment, and the names of those it calls."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}

    def visit(application: Any) -> str:
        deployment = application._bound_deployment
        called = [visit(argument) for argument in deployment.init_args if hasattr(argument, "_bound_deployment")]
        found[deployment.name] = deployment, tuple(called)
        return str(deployment.name)

    visit(build(args))
    return found


def test_a_controlnet_stands_between_the_gateway_and_the_unet(control_bundle: Path) -> None:
    beside = Placement(replicas=2, num_gpus=0.5, max_replicas_per_node=1)
    found = deployments(AppArgs(model=str(control_bundle), unet=beside, controlnet=beside))
    assert found["worker"][1] == ("gateway",)
    assert found["gateway"][1] == ("text_encoder", "unet", "decoder", "controlnet")
    assert found["controlnet"][1] == ("unet",)
    assert found["unet"][0].init_args == (str(control_bundle), False)
    for name in ("unet", "controlnet"):
        deployment, _ = found[name]
        assert (deployment.num_replicas, deployment._replica_config.max_replicas_per_node) == (2, 1)
        assert deployment.ray_actor_options["num_gpus"] == 0.5


def test_fused_controlnets_are_in_the_unets_replicas(control_bundle: Path) -> None:
    found = deployments(AppArgs(model=str(control_bundle), fused_controlnet=True))
    assert "controlnet" not in found
    assert found["gateway"][1] == ("text_encoder", "unet", "decoder")
    assert found["unet"][0].init_args == (str(control_bundle), True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_without_controlnets_has_no_replica_for_them(tiny_bundle: Path, fused: bool) -> None:
    found = deployments(AppArgs(model=str(tiny_bundle), fused_controlnet=fused))
    assert set(found) == {"text_encoder", "unet", "decoder", "gateway", "worker"}
    assert found["unet"][0].init_args == (str(tiny_bundle), False)
