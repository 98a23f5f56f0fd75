"""Where a single step begins: at noise, or with an init image at an earlier timestep. No torch.

A one-step U-Net was a multi-step one before it learnt to go from t = 999, and still knows what to do at other timesteps: given the init
image diffused to t = 999 `strength`, it keeps what survives that much noise (as in SDEdit, arXiv:2108.01073) and makes the rest anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sdxs.errors import InvalidRequest, PreconditionFailed
from sdxs.onestep import OneStepConstants

Array = np.ndarray


class Init(NamedTuple):
    """An init image's latent, float32 (C, H, W), and how far to go from it: above 0, at most 1, where 1 is as if it were not there."""

    latent_CHW: Array
    strength: float


def check_strength(strength: float, init_image: bytes) -> None:
    """Raises InvalidRequest."""
    if strength != 1 and not init_image:
        raise InvalidRequest("strength", strength, "none without an init_image")
    if not 0 < strength <= 1:
        raise InvalidRequest("strength", strength, "above 0, at most 1")


@dataclass(frozen=True)
class Levels:
    """alpha_t and sigma_t of the model's noise schedule, shape (T,), and what its output means: "epsilon", "v_prediction" or "sample"."""

    alpha_T: Array
    sigma_T: Array
    prediction_type: str

    @classmethod
    def of_folder(cls, folder: Path) -> Levels:
        """Of a diffusers model folder, whatever its scheduler's class: the schedule of betas is in each one's configuration."""
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_pretrained(folder / "scheduler")
        kept = scheduler.alphas_cumprod.double().numpy()
        return cls(np.sqrt(kept), np.sqrt(1 - kept), str(scheduler.config.prediction_type))

    def coefficients(self, t: int) -> tuple[float, float]:
        """(a, b) of x0 = a x_t + b output. Raises PreconditionFailed for an output of another meaning."""
        alpha, sigma = float(self.alpha_T[t]), float(self.sigma_T[t])
        match self.prediction_type:
            case "epsilon":
                return 1 / alpha, -sigma / alpha
            case "v_prediction":
                return alpha, -sigma
            case "sample":
                return 0.0, 1.0
        raise PreconditionFailed(f"image to image: what a U-Net's {self.prediction_type!r} means is not known")


@dataclass(frozen=True)
class Entry:
    """A batch where it enters the networks: their input and timesteps, and from their output x0 = a base + b output.

    float32 arrays (B, C, H, W); timesteps, a and b are one for all, or of shape (B,) and (B, 1, 1, 1)."""

    input_BCHW: Array
    timestep: int | Array
    base_BCHW: Array
    a: float | Array
    b: float | Array


def no_levels() -> Levels:
    """Of networks that were not loaded from a bundle. Raises PreconditionFailed."""
    raise PreconditionFailed("image to image: the model's noise schedule is not known")


def enter(
    noise_BCHW: Array, constants: OneStepConstants, levels: Callable[[], Levels], inits: Sequence[Init | None] = ()
) -> Entry:
    """From unit noise, and for the rows that have one from an init image.

    Args:
        levels: the model's; asked for where there is an init image.
    """
    noise_BCHW = np.ascontiguousarray(noise_BCHW, dtype=np.float32)
    scaled = noise_BCHW * np.float32(constants.input_scale)
    if all(init is None or init.strength == 1 for init in inits):
        return Entry(scaled, constants.timestep, noise_BCHW, constants.latent_coefficient, constants.output_coefficient)
    base, schedule = noise_BCHW.copy(), levels()
    rows = [(constants.timestep, constants.latent_coefficient, constants.output_coefficient)] * len(noise_BCHW)
    for row, init in enumerate(inits):
        if init is None or init.strength == 1:
            continue
        t = round(init.strength * constants.timestep)
        noisy = schedule.alpha_T[t] * init.latent_CHW + schedule.sigma_T[t] * noise_BCHW[row]
        base[row] = scaled[row] = noisy.astype(np.float32)
        rows[row] = (t, *schedule.coefficients(t))
    a, b = (np.array([row[i] for row in rows], np.float32).reshape(-1, 1, 1, 1) for i in (1, 2))
    return Entry(scaled, np.array([row[0] for row in rows], np.int64), base, a, b)
