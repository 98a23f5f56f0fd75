"""LoRAs on Ray Serve: replicas fetch what a request names, and draw as the library does."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxs import Lora
from sdxs.client import Client
from sdxs.control import Control
from sdxs.errors import InvalidRequest, NotFound
from sdxs.lora.publishing import publish
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from tests.controlnets import drawing
from tests.e2e.conftest import Served
from tests.loras import tiny_lora

pytestmark = pytest.mark.timeout(400)

PROMPT = "red apple"


@pytest.fixture(scope="module")
def settings(s3_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    values: dict[str, Any] = {name.removeprefix("SDXS_").lower(): value for name, value in s3_variables.items()}
    return Settings(**values, cache_dir=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def style(control_bundle: Path, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of one that is published as `style`."""
    path = tiny_lora(control_bundle, tmp_path_factory.mktemp("style"), seed=1)
    return publish(path, "style", str(control_bundle), settings).digest


def test_served_with_a_lora_and_a_control(served: Served, control_bundle: Path, settings: Settings, style: str) -> None:
    pipeline, controls = OneStepPipeline.from_bundle(control_bundle, settings), [Control(drawing(), "edge")]
    with Client(served.address) as client, ThreadPoolExecutor(8) as threads:
        [listed] = [each for each in client.list_loras("tiny") if each.name == "style"]
        assert listed.digest == style
        asked: list[dict[str, Any]] = [{}, {"controls": controls}]
        for options in asked:
            made = client.generate(PROMPT, seed=5, format="raw", loras=[Lora("style", 0.7)], **options)
            expected = np.asarray(pipeline(PROMPT, 5, loras=[Lora("style", 0.7)], **options)[0])
            assert made.images[0].data == expected.tobytes()
            assert made.receipt.loras[0].digest == style

        def drawn(loras: list[Lora]) -> bytes:
            return client.generate(PROMPT, seed=5, format="raw", deterministic=True, loras=loras).images[0].data

        sets = [[], [Lora(style)]] * 20
        for loras, image in zip(sets, threads.map(drawn, sets), strict=True):
            assert image == np.asarray(pipeline(PROMPT, 5, loras=loras)[0]).tobytes()


def test_wrong_ones_are_named(served: Served, control_bundle: Path, settings: Settings, style: str) -> None:
    with Client(served.address) as client:
        with pytest.raises(NotFound) as missing:
            client.generate(PROMPT, loras=[Lora("style"), Lora("nobody")])
        assert missing.value.field == "loras[1].name"
        with pytest.raises(InvalidRequest) as twice:
            client.generate(PROMPT, loras=[Lora("style"), Lora(style)])
        assert twice.value.field == "loras[1].name"
