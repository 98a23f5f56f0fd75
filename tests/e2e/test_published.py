"""`sdxs serve` of models as they are published: of a hub that goes away, and of a folder, side by side on Ray Serve."""

import contextlib
import io
import os
import signal
from pathlib import Path

import pytest
from PIL import Image

from sdxs.client import Client
from sdxs.control import Control
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from tests import published
from tests.e2e.conftest import serving
from tests.hub import http_hub

pytestmark = pytest.mark.timeout(400)

PROMPT, SEED = "red apple", 7


def drawing() -> bytes:
    """A PNG file."""
    image, file = Image.new("RGB", (32, 32)), io.BytesIO()
    image.paste((255, 255, 255), (8, 8, 24, 12))
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.slow
def test_models_of_the_hub_and_of_a_folder(
    redis_variables: dict[str, str], s3_variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replicas draw what this process does, find their bundles by commit and digest, and need no hub to start again."""
    dream = published.dreamshaper(tmp_path / "dream")
    old = published.old(tmp_path / "sdxs-512-0.9")
    variables = {
        **redis_variables,
        **s3_variables,
        "SDXS_STORE_URL": "s3://sdxs/published",
        "SDXS_CACHE_DIR": str(tmp_path / "cache"),
    }
    reference = "owner/dream@main?vae=vae_large&controlnet=owner/sketch&name=drawn"
    controls = [Control(drawing(), "sketch", preprocessed=True)]
    with contextlib.ExitStack() as leaving:
        hub = leaving.enter_context(http_hub())
        commit = hub.publish("owner/dream", dream)
        hub.publish("owner/sketch", published.sketch(tmp_path / "sketch", dream / "unet"))
        hub.use(monkeypatch, tmp_path / "hf-here")
        drawn, plain = (
            OneStepPipeline.from_bundle(each, Settings(cache_dir=tmp_path / "cache-here")) for each in (reference, str(old))
        )
        expected = {
            "drawn": drawn(PROMPT, seed=SEED, controls=controls)[0].tobytes(),
            "sdxs-512-0.9": plain(PROMPT, seed=SEED)[0].tobytes(),
        }
        variables |= hub.variables(tmp_path / "hf")
        with serving(None, tmp_path / "log", variables, "--model", reference, "--model", str(old)) as served:
            leaving.close()  # the hub is away
            with Client(served.address) as client:
                digests = {model.name: model.digest for model in client.list_models()}
                assert digests == {"drawn": drawn.manifest.digest, "sdxs-512-0.9": plain.manifest.digest}
                assert drawn.manifest.lineage["source"] == f"hf://owner/dream@{commit}"
                assert pixels(client, controls) == expected
                for stage in ("unet", "decoder"):
                    [replica] = served.replicas(stage, "sdxs-drawn-")
                    os.kill(replica, signal.SIGKILL)
                assert pixels(client, controls) == expected


def pixels(client: Client, controls: list[Control]) -> dict[str, bytes]:
    """Of PROMPT and SEED, by model; the first steered."""
    asked: dict[str, list[Control]] = {"drawn": controls, "sdxs-512-0.9": []}
    return {
        model: client.generate(
            PROMPT, seed=SEED, model=model, controls=given, format="raw", deterministic=True, timeout=120
        ).images[0].data
        for model, given in asked.items()
    }  # fmt: skip
