"""The single sampling step as three numbers: x0 = latent_coefficient * noise + output_coefficient * unet(input_scale * noise)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from pathlib import Path


class OneStepConstants(BaseModel):
    """One step from unit Gaussian noise. An eps error is multiplied by `output_coefficient` (14.6 for SD): combine in float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: int
    input_scale: float
    latent_coefficient: float
    output_coefficient: float


def probe(scheduler: Any) -> OneStepConstants:
    """The constants of any deterministic diffusers scheduler with one inference step.

    A step is linear in (sample, model output), so two unit calls of the scheduler itself give its coefficients; no formula is
    repeated here, and every scheduler class and setting is covered.
    """
    import torch

    def step(sample: float, output: float) -> float:
        fresh = type(scheduler).from_config(scheduler.config)
        fresh.set_timesteps(1)
        one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
        fresh.scale_model_input(one * sample, fresh.timesteps[0])  # some schedulers insist on being asked first
        return float(fresh.step(one * output, fresh.timesteps[0], one * sample).prev_sample)

    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(1)
    start = float(fresh.init_noise_sigma)
    scaled = fresh.scale_model_input(torch.full((1, 1, 1, 1), start, dtype=torch.float64), fresh.timesteps[0])
    return OneStepConstants(
        timestep=int(fresh.timesteps[0]),
        input_scale=float(scaled),
        latent_coefficient=step(start, 0.0),
        output_coefficient=step(0.0, 1.0),
    )


def probe_folder(folder: Path) -> OneStepConstants:
    """The constants of the scheduler in a diffusers model folder."""
    import json

    import diffusers

    name = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    return probe(getattr(diffusers, name).from_pretrained(folder / "scheduler"))
