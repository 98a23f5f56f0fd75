"""The chart renders to manifests that Kubernetes, KubeRay and Ray Serve know, and refuses values that it does not."""

import json
from pathlib import Path
from typing import Any

import helm_python
import jsonschema
import kubernetes_validate
import pytest
import yaml

from services.app import AppArgs, ModelArgs, Placement, config
from services.cluster import _RAY_ENVIRONMENT
from services.fabric.environment import REPLICA_ENVIRONMENT
from services.settings import ServingSettings
from tests.unit.kubernetes import Manifest, check, serve_config

CHART = Path(__file__).parents[2] / "helm" / "sdxs"
VALUES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "gpu": {
        "image": {"tag": "1.2.3"},
        "imagePullSecrets": [{"name": "registry"}],
        "settings": {"s3_endpoint": "minio.storage:9000", "s3_secure": False},
        "deployments": {
            "unet": {"replicas": 2, "max_replicas": 8, "num_cpus": 1, "num_gpus": 0.5},
            "controlnet": {"replicas": 2, "max_replicas": 8, "num_cpus": 1, "num_gpus": 0.25},
        },
        "models": ["emoji@prod", {"model": "scenes", "unet": {"replicas": 0, "idle_s": 600}}],
        "gateway": {"replicas": 3},
        "stages": {
            "resources": {"limits": {"nvidia.com/gpu": "1"}},
            "nodeSelector": {"accelerator": "l4"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    },
}


def render(values: dict[str, Any], name: str = "demo") -> dict[str, Manifest]:
    """Manifest by kind."""
    with helm_python.Chart.load(CHART) as chart:
        texts = chart.render(values, name=name, namespace="images").values()
    manifests = [manifest for text in texts for manifest in yaml.safe_load_all(text) if manifest]
    return {manifest["kind"]: manifest for manifest in manifests}


def test_chart_lints() -> None:
    findings = helm_python.lint(CHART)
    assert findings["errors"] == []
    assert [message for message in findings["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_manifests_are_valid(values: dict[str, Any]) -> None:
    manifests = render(values)
    assert set(manifests) == {"RayService", "Service"}
    for manifest in manifests.values():
        check(manifest)


def worker_groups(service: Manifest) -> dict[str, Any]:
    """Pod template by group name."""
    return {group["groupName"]: group["template"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}


def environment(pod: Manifest) -> dict[str, str]:
    """Variables of a pod's one container."""
    [container] = pod["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
def test_serve_config_is_the_one_the_services_make(values: dict[str, Any]) -> None:
    rendered = serve_config(render(values)["RayService"])
    [application] = rendered["applications"]
    [override] = application.pop("deployments")
    [expected] = config(AppArgs.model_validate(application["args"]))["applications"]
    expected.pop("runtime_env")  # the pods' environment instead
    assert AppArgs.model_validate(expected.pop("args")) == AppArgs.model_validate(application.pop("args"))
    assert application == expected
    assert override["name"] in AppArgs.model_fields


@pytest.mark.parametrize("group", ["gateway", "stages"])
def test_pods_have_the_environment_that_replicas_need(group: str) -> None:
    variables = environment(worker_groups(render({})["RayService"])[group])
    ray = {name: value for name, value in _RAY_ENVIRONMENT.items() if name in variables}
    assert "RAY_worker_niceness" in ray
    assert {**REPLICA_ENVIRONMENT, **ray}.items() <= variables.items()


def test_settings_exist() -> None:
    with helm_python.Chart.load(CHART) as chart:
        assert chart.values["settings"].keys() <= ServingSettings.model_fields.keys()


def test_service_leads_to_the_gateway_pods() -> None:
    manifests = render(VALUES["gpu"])
    service = manifests["Service"]["spec"]
    groups = worker_groups(manifests["RayService"])
    [container] = groups["gateway"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert [port["name"] for port in service["ports"]] == ["serve-grpc"]
    assert service["selector"].items() <= groups["gateway"]["metadata"]["labels"].items()
    assert not service["selector"].items() <= groups["stages"]["metadata"]["labels"].items()
    port = ports[service["ports"][0]["targetPort"]]
    assert port == container["readinessProbe"]["grpc"]["port"]
    assert environment(groups["gateway"])["SDXS_GATEWAY_ADDRESS"] == f"0.0.0.0:{port}"


def test_a_web_port_is_there_where_the_values_say_so() -> None:
    manifests = render({"service": {"webPort": 80}})
    for manifest in manifests.values():
        check(manifest)
    gateway = worker_groups(manifests["RayService"])["gateway"]
    [container] = gateway["spec"]["containers"]
    assert environment(gateway)["SDXS_GATEWAY_HTTP_ADDRESS"] == "0.0.0.0:8501"
    assert {"name": "web", "containerPort": 8501} in container["ports"]
    assert {(port["name"], port["port"], port["targetPort"]) for port in manifests["Service"]["spec"]["ports"]} == {
        ("serve-grpc", 8500, "serve-grpc"), ("web", 80, "web"),
    }  # fmt: skip
    plain = render({})
    assert all("SDXS_GATEWAY_HTTP_ADDRESS" not in environment(pod) for pod in worker_groups(plain["RayService"]).values())
    assert [port["name"] for port in plain["Service"]["spec"]["ports"]] == ["serve-grpc"]


def test_each_gateway_pod_has_one_gateway() -> None:
    service = render(VALUES["gpu"])["RayService"]
    [group] = [each for each in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if each["groupName"] == "gateway"]
    [application] = serve_config(service)["applications"]
    [gateway] = application["deployments"]
    assert application["args"]["gateway"]["replicas"] == group["minReplicas"] == group["maxReplicas"] == 3
    assert (gateway["max_replicas_per_node"], gateway["ray_actor_options"]["resources"]) == (1, {"gateway": 1})
    assert json.loads(group["rayStartParams"]["resources"]) == '{"gateway": 1}'


def test_values_reach_the_replicas() -> None:
    service = render(VALUES["gpu"])["RayService"]
    pod = worker_groups(service)["stages"]
    assert pod["spec"]["containers"][0]["image"] == "sdxs/serve:1.2.3"
    assert environment(pod)["SDXS_S3_ENDPOINT"] == "minio.storage:9000"
    assert environment(pod)["SDXS_S3_SECURE"] == "false"
    args = serve_config(service)["applications"][0]["args"]
    beside = {"replicas": 2, "max_replicas": 8, "max_replicas_per_node": 1, "num_cpus": 1}
    assert args["unet"] == {**beside, "num_gpus": 0.5}
    assert args["controlnet"] == {**beside, "num_gpus": 0.25}


def test_each_model_has_what_holds_for_all_but_for_what_it_says() -> None:
    [application] = serve_config(render(VALUES["gpu"])["RayService"])["applications"]
    args = AppArgs.model_validate(application["args"])
    assert args.references == ("emoji@prod", "scenes")
    assert args.of("emoji@prod").unet == args.unet
    assert args.of("scenes").unet == args.unet.model_copy(update={"replicas": 0, "idle_s": 600})


def test_the_schema_knows_all_of_a_placement() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())["definitions"]
    assert schema["placement"]["properties"].keys() == Placement.model_fields.keys()
    assert schema["model"]["properties"].keys() == ModelArgs.model_fields.keys()


@pytest.mark.parametrize("fused", [False, True])
def test_controlnets_are_fused_where_the_values_say_so(fused: bool) -> None:
    [application] = serve_config(render({"fusedControlnet": fused})["RayService"])["applications"]
    assert AppArgs.model_validate(application["args"]).fused_controlnet is fused


def test_each_stage_pod_has_a_unet_and_a_controlnet_side_by_side() -> None:
    """As many of both, one to a node; and a pod has room for one replica of each room."""
    service = render({})["RayService"]
    [application] = serve_config(service)["applications"]
    args = AppArgs.model_validate(application["args"])
    assert (args.unet, args.unet.max_replicas_per_node) == (args.controlnet, 1)
    [group] = [each for each in service["spec"]["rayClusterConfig"]["workerGroupSpecs"] if each["groupName"] == "stages"]
    assert args.unet.max_replicas == group["maxReplicas"]
    [container] = group["template"]["spec"]["containers"]
    rooms = (args.text_encoder, args.unet, args.controlnet, args.decoder, args.worker)
    assert float(container["resources"]["requests"]["cpu"]) >= sum(room.num_cpus for room in rooms)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"replicas": 3}, "replicas"),
        ({"deployments": {"unet": {"minReplicas": 1}}}, "minReplicas"),
        ({"deployments": {"controlnet": {"max_replicas_per_node": 0}}}, "/deployments/controlnet/max_replicas_per_node"),
        ({"deployments": {"controlnet": None}}, "controlnet"),
        ({"fusedControlnet": "yes"}, "/fusedControlnet"),
        ({"models": []}, "/models"),
        ({"models": [{"unet": {"replicas": 0}}]}, "/models/0"),
        ({"model": "emoji"}, "model"),
        ({"fused_controlnet": True}, "fused_controlnet"),
        ({"service": {"port": "http"}}, "/service/port"),
        ({"rayVersion": "latest"}, "/rayVersion"),
        ({"settings": {"storeUrl": "s3://sdxs"}}, "storeUrl"),
    ],
)
def test_unknown_or_wrong_values_are_refused(values: dict[str, Any], complaint: str) -> None:
    with pytest.raises(helm_python.HelmError, match=complaint):
        render(values)


def test_two_releases_do_not_share_pods() -> None:
    one, two = render({}, "one")["Service"]["spec"]["selector"], render({}, "two")["Service"]["spec"]["selector"]
    assert one != two


def test_the_checks_themselves_refuse_misspelt_keys() -> None:
    def service() -> Manifest:
        return render({})["RayService"]

    wrong = service()
    wrong["spec"]["excludeHeadPodFromServeService"] = True
    with pytest.raises(jsonschema.ValidationError, match="excludeHeadPodFromServeService"):
        check(wrong)
    wrong = service()
    wrong["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePolicy"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagePolicy"):
        check(wrong)
    wrong = service()
    wrong["spec"]["serveConfigV2"] = wrong["spec"]["serveConfigV2"].replace("max_replicas_per_node", "max_replicas_a_node")
    with pytest.raises(AssertionError, match="max_replicas_a_node"):
        check(wrong)
