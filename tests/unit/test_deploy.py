"""The files of deploy/ are well-formed, and name images, commands and settings that exist."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import typer
import yaml

from services.cli import app as serve
from services.settings import ServingSettings
from tests.unit.kubernetes import check, pod_templates

DEPLOY = Path(__file__).parents[2] / "deploy"
HADOLINT = shutil.which("hadolint", path=str(Path(sys.executable).parent))


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return document


def test_dockerfile_lints() -> None:
    assert HADOLINT is not None
    result = subprocess.run([HADOLINT, "--failure-threshold", "info", DEPLOY / "Dockerfile"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_dockerfile_stages() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    stages = set(re.findall(r"^FROM \S+ AS ([\w-]+)$", text, re.MULTILINE))
    assert {"serve", "train"} <= stages
    assert set(re.findall(r"--from=([\w-]+)", text)) <= stages
    extras = {extra for group in re.findall(r"\"\.\[([\w,]+)\]\"", text) for extra in group.split(",")}
    assert extras == {"serve", "train"}
    users = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert users and "0" not in users
    ignored = (DEPLOY.parent / ".dockerignore").read_text().splitlines()
    for copied in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE):
        assert {f"!{name}" for name in copied.split()} <= set(ignored)


def test_compose_services() -> None:
    services = load("compose.yaml")["services"]
    for name, service in services.items():
        if "build" in service:
            assert (DEPLOY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        else:
            assert re.search(r":\d+\.\d+", service["image"]), f"{name}: the image has no version"
        assert set(service.get("depends_on", {})) <= services.keys()
        assert {volume.split(":")[0] for volume in service.get("volumes", [])} <= load("compose.yaml")["volumes"].keys()


def test_compose_runs_a_command_of_this_project_and_names_an_option_of_it() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    [command] = load("compose.yaml")["services"]["gateway"]["command"]
    assert command in project["entry-points"]["sdxs.commands"]
    named = set(re.findall(r"command: .*#.* (--[\w-]+)", (DEPLOY / "compose.yaml").read_text()))
    options = {option for parameter in typer.main.get_command(serve).params for option in parameter.opts}
    assert named == {"--fused-controlnet"} and named <= options


def test_compose_has_no_secret_of_its_own() -> None:
    environment = load("compose.yaml")["services"]["gateway"]["environment"]
    for name in ("SDXS_S3_ACCESS_KEY", "SDXS_S3_SECRET_KEY"):
        assert environment[name].startswith("${" + name)


def test_compose_publishes_what_its_presigned_urls_lead_to() -> None:
    services = load("compose.yaml")["services"]
    settings = services["gateway"]["environment"]
    assert {name.removeprefix("SDXS_").lower() for name in settings} <= ServingSettings.model_fields.keys()
    inside, port = settings["SDXS_S3_ENDPOINT"].split(":")
    assert f"{urlsplit(settings['SDXS_S3_PUBLIC_URL']).netloc}:{port}" in services[inside]["ports"]


def test_rayjob_is_valid() -> None:
    job = load("rayjob.yaml")
    check(job)
    assert len(list(pod_templates(job["spec"]))) == 2


def test_rayjob_runs_a_command_of_this_project() -> None:
    project = tomllib.loads((DEPLOY.parent / "pyproject.toml").read_text())["project"]
    program, subcommand = load("rayjob.yaml")["spec"]["entrypoint"].split()[:2]
    assert program in project["scripts"]
    assert subcommand in project["entry-points"]["sdxs.commands"]
