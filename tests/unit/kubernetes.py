"""Checks of Kubernetes manifests without a cluster, against the schemas of Kubernetes, KubeRay and Ray Serve."""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from pydantic import BaseModel
from ray.serve.schema import ServeDeploySchema

KUBERNETES = "1.33"
KUBERAY = Path(__file__).parents[1] / "golden" / "kuberay-1.7.0.schema.json"
Manifest = dict[str, Any]


@cache
def kuberay_schemas() -> dict[str, Any]:
    """JSON schema by kind; unknown keys are refused."""
    schemas: dict[str, Any] = json.loads(KUBERAY.read_text())
    return schemas


def check(manifest: Manifest) -> None:
    """Raises on a wrong type, a misspelt key, or a kind that no schema is known for."""
    if not manifest["apiVersion"].startswith("ray.io/"):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        return
    jsonschema.validate(manifest, kuberay_schemas()[manifest["kind"]])
    for template in pod_templates(manifest["spec"]):
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    if "serveConfigV2" in manifest["spec"]:
        check_serve_config(serve_config(manifest))


def pod_templates(node: Any) -> Iterator[Manifest]:
    """Every pod template below a KubeRay spec."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key in {"template", "submitterPodTemplate"}:
                yield value
            else:
                yield from pod_templates(value)
    elif isinstance(node, list):
        for item in node:
            yield from pod_templates(item)


def serve_config(manifest: Manifest) -> Manifest:
    """The Ray Serve configuration inside a RayService."""
    config: Manifest = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    return config


def check_serve_config(config: Manifest) -> None:
    """Ray accepts misspelt keys in silence; here they raise."""
    parsed = ServeDeploySchema.model_validate(config)
    refuse_unknown(config, parsed, "serveConfigV2")


def refuse_unknown(given: Any, parsed: Any, where: str) -> None:
    """Every key of `given` must be a field of the model that was parsed from it."""
    if isinstance(parsed, BaseModel) and isinstance(given, dict):
        unknown = given.keys() - type(parsed).model_fields.keys()
        assert not unknown, f"{where}: no such keys: {sorted(unknown)}"
        for key, value in given.items():
            refuse_unknown(value, getattr(parsed, key), f"{where}.{key}")
    elif isinstance(parsed, list) and isinstance(given, list):
        for index, (value, model) in enumerate(zip(given, parsed, strict=True)):
            refuse_unknown(value, model, f"{where}[{index}]")
