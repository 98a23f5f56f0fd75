"""Latency of a bundle's stages at batch 1, in this process; the served chain is measured by `benchmarks/`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from sdxs.noise import latent_noise
from sdxs.pipeline import OneStepPipeline


def median_ms(call: Callable[[], object], repeats: int) -> float:
    """Median milliseconds of `call` after two warm-up calls."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return round(statistics.median(times[2:]), 3)


def stage_latencies(model: str, repeats: int) -> dict[str, float]:
    """Median milliseconds of text encoder, U-Net, decoder and the whole pipeline."""
    pipeline = OneStepPipeline.from_bundle(model)
    prompt = "red apple"
    text_BLD = pipeline.text_encoder.encode([prompt])
    noise_BCHW = latent_noise(0, pipeline.unet.latent_shape)[None]
    latent_BCHW = pipeline.unet.denoise(noise_BCHW, text_BLD)
    return {
        "text_encoder": median_ms(lambda: pipeline.text_encoder.encode([prompt]), repeats),
        "unet": median_ms(lambda: pipeline.unet.denoise(noise_BCHW, text_BLD), repeats),
        "decoder": median_ms(lambda: pipeline.decoder.decode(latent_BCHW), repeats),
        "pipeline": median_ms(lambda: pipeline.generate(prompt, 0), repeats),
    }
