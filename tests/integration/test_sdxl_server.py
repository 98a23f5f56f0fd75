"""An SDXL-like bundle behind the local gRPC server: text encoder, U-Net and decoder in rooms of their own."""

from pathlib import Path

import numpy as np

from sdxs import bundle
from sdxs.client import AsyncClient
from sdxs.embedded import free_port
from sdxs.pipeline import OneStepPipeline
from services.local import serve_local
from services.settings import ServingSettings
from tests.models import tiny_sdxl


async def test_served_images_are_the_in_process_ones(tmp_path: Path) -> None:
    folder = tiny_sdxl(tmp_path / "tiny-sdxl")
    bundle.seal(folder, "tiny-sdxl")
    settings = ServingSettings(redis_url="", gateway_address=f"127.0.0.1:{free_port()}", drain_s=1)
    pipeline = OneStepPipeline.from_bundle(folder)
    async with serve_local(str(folder), settings), AsyncClient(settings.gateway_address) as client:
        alone = await client.generate("red apple", seed=7, n=2, format="raw", deterministic=True)
        together = await client.generate("thumbs up", seed=1, n=4, format="raw")
    assert [image.data for image in alone.images] == [image.tobytes() for image in pipeline("red apple", seed=7, n=2)]
    assert together.receipt.unet_batch == 4
    for image, expected in zip(together.images, pipeline("thumbs up", seed=1, n=4), strict=True):
        assert np.abs(np.asarray(image.pil(), np.int16) - np.asarray(expected, np.int16)).max() <= 1
