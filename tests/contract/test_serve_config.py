"""deploy/serve.yaml is what `sdxs serve --print-config` prints, and Ray Serve reads all of it."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from sdxs.bundle import read
from sdxs.errors import AlreadyExists, InvalidRequest
from services.app import AppArgs, ModelArgs, Placement, build, config, targets
from services.applications import ServeApplications
from services.cli import app as cli
from services.cli import app_args, serve_config
from services.fabric.pointers import open_all
from services.settings import ServingSettings

KEPT = Path(__file__).parents[2] / "deploy/serve.yaml"


def test_the_kept_file_is_the_printed_one() -> None:
    assert KEPT.read_text() == serve_config(AppArgs()), "run `sdxs serve --print-config > deploy/serve.yaml`"


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


def deployments(application: Any) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Of an application: each deployment, and the names of those it calls."""
    found: dict[str, tuple[Any, tuple[str, ...]]] = {}

    def visit(application: Any) -> str:
        deployment = application._bound_deployment
        called = [visit(argument) for argument in deployment.init_args if hasattr(argument, "_bound_deployment")]
        found[deployment.name] = deployment, tuple(called)
        return str(deployment.name)

    visit(application)
    return found


def stages(args: AppArgs, number: int = 0) -> dict[str, tuple[Any, tuple[str, ...]]]:
    """Deployments of the application of one of its models."""
    found = open_all(args.references, ServingSettings())
    return deployments(targets(args, found)[number + 1].target)


def test_the_server_itself_has_no_stages() -> None:
    found = deployments(build(AppArgs()))
    assert {name: calls for name, (_, calls) in found.items()} == {"worker": ("gateway",), "gateway": ("models",), "models": ()}
    assert "worker" not in deployments(build(AppArgs(worker=Placement(replicas=0))))


def test_placements_reach_the_deployments(tiny_bundle: Path) -> None:
    args = AppArgs(
        model=str(tiny_bundle), unet=Placement(replicas=2, max_replicas=5, num_gpus=1), decoder=Placement(replicas=3)
    )
    found = stages(args)
    unet = found["unet"][0]
    autoscaling = unet._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas) == (2, 5)
    assert (autoscaling.upscale_delay_s, autoscaling.downscale_delay_s) == (5, 60)
    assert unet.ray_actor_options["num_gpus"] == 1
    assert found["decoder"][0].num_replicas == 3


def test_a_stage_of_no_replicas_sleeps(tiny_bundle: Path) -> None:
    args = AppArgs(
        models=(ModelArgs(model=str(tiny_bundle), unet=Placement(replicas=0, idle_s=20)),), decoder=Placement(replicas=2)
    )
    autoscaling = stages(args)["unet"][0]._deployment_config.autoscaling_config
    assert (autoscaling.min_replicas, autoscaling.max_replicas, autoscaling.downscale_to_zero_delay_s) == (0, 1, 20)
    assert stages(args)["decoder"][0].num_replicas == 2
    [found] = open_all(args.references, ServingSettings())
    assert ServeApplications(args).version(str(tiny_bundle), found).sleeps
    assert not ServeApplications(AppArgs(model=str(tiny_bundle))).version(str(tiny_bundle), found).sleeps


def test_another_placement_is_another_application(tiny_bundle: Path) -> None:
    """So that it comes as another bundle does: beside the one that is served."""
    reference = str(tiny_bundle)
    [found] = open_all([reference], ServingSettings())
    one, same, other = (
        ServeApplications(AppArgs(model=reference, unet=unet)).version(reference, found).application
        for unet in (Placement(), Placement(), Placement(replicas=2))
    )
    assert one == same != other
    digest = found.manifest.digest.removeprefix("sha256:")
    assert one.startswith(f"sdxs-tiny-{digest[:12]}-") and other.startswith(f"sdxs-tiny-{digest[:12]}-")


def test_what_is_printed_is_what_is_built() -> None:
    beside = Placement(replicas=2, max_replicas_per_node=1)
    args = AppArgs(model="emoji@prod", decoder=Placement(replicas=3), unet=beside, controlnet=beside, fused_controlnet=True)
    assert AppArgs.model_validate(config(args)["applications"][0]["args"]) == args
    several = AppArgs(models=("emoji", ModelArgs(model="scenes@prod", unet=Placement(replicas=0))), unet=beside)
    again = AppArgs.model_validate(config(several)["applications"][0]["args"])
    assert again == several and again.of("scenes@prod") == several.of("scenes@prod")


def test_what_a_model_does_not_say_holds_as_for_all() -> None:
    shared = Placement(replicas=2, max_replicas=4, num_gpus=0.5)
    args = AppArgs.model_validate(
        {"models": ["emoji", {"model": "scenes", "unet": {"replicas": 0}, "fused_controlnet": True}], "unet": shared}
    )
    assert args.of("emoji").unet == shared and args.of("emoji").fused_controlnet is False
    assert args.of("scenes").unet == Placement(replicas=0, max_replicas=4, num_gpus=0.5)
    assert args.of("scenes").decoder == Placement() and args.of("scenes").fused_controlnet is True
    with pytest.raises(KeyError):
        args.of("other")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"models": ["emoji", "emoji@canary"]}, "models: got emoji, emoji@canary, allowed: each name once"),
        ({"models": ["./a", {"model": "./a"}]}, "each name once"),
        ({"model": ""}, "model"),
        ({"models": [{"model": "emoji", "gateway": {}}]}, "gateway"),
        ({"unet": {"replicas": 3, "max_replicas": 2}}, "max_replicas: got 2, allowed: 3"),
        ({"unet": {"max_replicas": 0}}, "max_replicas"),
        ({"models": [{"model": "a", "unet": {"replicas": 5}}], "unet": {"max_replicas": 4}}, "max_replicas: got 4, allowed: 5"),
        ({"gateway": {"replicas": 0}}, "gateway.replicas: got 0, allowed: 1 or more"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AppArgs.model_validate(args)


def test_two_bundles_of_one_name_are_refused(tiny_bundle: Path, control_bundle: Path) -> None:
    with pytest.raises(AlreadyExists, match="both models named 'tiny'"):
        open_all([str(tiny_bundle), str(control_bundle)], ServingSettings())


@pytest.mark.parametrize("fused", [False, True])
def test_the_printed_file_says_whether_controlnets_are_fused(fused: bool) -> None:
    options = ["--print-config", *(["--fused-controlnet"] if fused else [])]
    printed = CliRunner().invoke(cli, options, catch_exceptions=False)
    [application] = ServeDeploySchema.model_validate(yaml.safe_load(printed.stdout)).applications
    assert AppArgs.model_validate(application.args).fused_controlnet is fused


def test_a_printed_file_is_read_again(tmp_path: Path) -> None:
    args = AppArgs(models=("emoji", "scenes"), unet=Placement(replicas=0, idle_s=9), worker=Placement(replicas=2))
    whole, alone = tmp_path / "whole.yaml", tmp_path / "args.yaml"
    whole.write_text(serve_config(args))
    alone.write_text(yaml.safe_dump(config(args)["applications"][0]["args"]))
    assert app_args([], False, whole) == app_args([], False, alone) == args
    other = app_args(["scenes"], False, whole)
    assert (other.references, other.unet.idle_s) == (("scenes",), 9)
    alone.write_text("models: [emoji, emoji@canary]")
    with pytest.raises(InvalidRequest, match=r"^models: .*each name once"):
        app_args([], False, alone)
    alone.write_text("unet: {replcas: 1}")
    with pytest.raises(InvalidRequest, match=r"^unet\.replcas"):
        app_args([], False, alone)
    alone.write_text("[]")
    with pytest.raises(InvalidRequest, match="config"):
        app_args([], False, alone)


def test_a_controlnet_stands_between_the_gateway_and_the_unet(control_bundle: Path) -> None:
    beside = Placement(replicas=2, num_gpus=0.5, max_replicas_per_node=1)
    found = stages(AppArgs(model=str(control_bundle), unet=beside, controlnet=beside))
    assert found["controlnet"][1] == ("unet",)
    assert set(found["decoder"][1]) == {"text_encoder", "unet", "controlnet"}, "Serve starts what the ingress leads to"
    assert found["unet"][0].init_args == (str(control_bundle), read(control_bundle).digest, False)
    for name in ("unet", "controlnet"):
        deployment, _ = found[name]
        assert (deployment.num_replicas, deployment._replica_config.max_replicas_per_node) == (2, 1)
        assert deployment.ray_actor_options["num_gpus"] == 0.5


def test_fused_controlnets_are_in_the_unets_replicas(control_bundle: Path) -> None:
    found = stages(AppArgs(model=str(control_bundle), fused_controlnet=True))
    assert set(found) == {"text_encoder", "unet", "decoder"}
    assert found["unet"][0].init_args == (str(control_bundle), read(control_bundle).digest, True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_without_controlnets_has_no_replica_for_them(tiny_bundle: Path, fused: bool) -> None:
    found = stages(AppArgs(model=str(tiny_bundle), fused_controlnet=fused))
    assert set(found) == {"text_encoder", "unet", "decoder"}
    assert found["unet"][0].init_args == (str(tiny_bundle), read(tiny_bundle).digest, False)
