"""The single sampling step as numbers: x0 = latent_coefficient * noise + output_coefficient * unet(input_scale * noise).

The noise is unit Gaussian, whatever the scheduler's own scale of it is (14.6 for Euler).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sdxs.errors import CorruptArtifact, InvalidRequest, SdxsError


class OneStepConstants(BaseModel):
    """One step from unit Gaussian noise. An eps error is multiplied by `output_coefficient` (14.6 for SD): use float32."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    timestep: int
    input_scale: float
    latent_coefficient: float
    output_coefficient: float


def probe(scheduler: Any) -> OneStepConstants:
    """The constants of any diffusers scheduler with one inference step.

    A step is linear in (sample, model output), so two unit calls of the scheduler itself give its coefficients; no formula is
    repeated here, and every scheduler class and setting is covered. A third call checks the linearity.

    Raises:
        InvalidRequest: the step clips, thresholds or adds noise.
    """
    fresh = _one_step(scheduler)
    start = float(getattr(fresh, "init_noise_sigma", 1.0))
    scale = getattr(fresh, "scale_model_input", lambda sample, _: sample)
    latent, output = _step(scheduler, start, 0.0), _step(scheduler, 0.0, 1.0)
    both, expected = _step(scheduler, 2 * start, 30.0), 2 * latent + 30 * output
    if abs(both - expected) > 1e-4 * (2 * abs(latent) + 30 * abs(output)):
        allowed = "one whose step is linear: clip_sample, thresholding and noise off"
        raise InvalidRequest("scheduler", type(scheduler).__name__, allowed)
    return OneStepConstants(
        timestep=int(fresh.timesteps[0]),
        input_scale=float(scale(_pixel(start), fresh.timesteps[0])),
        latent_coefficient=latent,
        output_coefficient=output,
    )


def _one_step(scheduler: Any) -> Any:
    """A new scheduler of the same configuration, set to one step: schedulers keep state between calls."""
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(1)
    return fresh


def _pixel(value: float) -> Any:
    import torch

    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def _step(scheduler: Any, sample: float, output: float) -> float:
    """The scheduler's step for a sample and a model output of one element each."""
    fresh = _one_step(scheduler)
    if hasattr(fresh, "scale_model_input"):  # some schedulers insist on being asked first
        fresh.scale_model_input(_pixel(sample), fresh.timesteps[0])
    return float(fresh.step(_pixel(output), fresh.timesteps[0], _pixel(sample)).prev_sample)


def probe_folder(folder: Path) -> OneStepConstants:
    """The constants of the scheduler in a diffusers model folder.

    Raises:
        CorruptArtifact: there is none, or its configuration is not one that diffusers takes.
        InvalidRequest: as `probe`.
    """
    import diffusers
    from diffusers.schedulers import SchedulerMixin

    path = folder / "scheduler" / "scheduler_config.json"
    try:
        name = str(json.loads(path.read_text(encoding="utf8")).get("_class_name"))
    except (FileNotFoundError, ValueError, AttributeError) as error:
        raise CorruptArtifact("scheduler/scheduler_config.json is missing or not a JSON object") from error
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        raise CorruptArtifact(f"scheduler/scheduler_config.json: {name!r} is not a scheduler of diffusers")
    loaded: Any = kind
    try:
        return probe(loaded.from_pretrained(path.parent))
    except SdxsError:
        raise
    except Exception as error:  # each scheduler refuses settings, prediction types among them, in its own way
        raise CorruptArtifact(f"scheduler/scheduler_config.json: no single step of {name} follows from it: {error}") from error
