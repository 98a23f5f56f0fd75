"""Forward process and conversions: x_t = alpha_t x0 + sigma_t eps. Everything reads the teacher's own scheduler config."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler
from torch import Tensor


class Diffusion:
    """alpha_t, sigma_t of a discrete schedule, and what a network's output means under its prediction type.

    Args:
        scheduler_config: a diffusers scheduler config; `prediction_type` is "epsilon" or "v_prediction".
    """

    def __init__(self, scheduler_config: Mapping[str, Any]) -> None:
        scheduler = DDIMScheduler.from_config(dict(scheduler_config))
        self.prediction_type: str = scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type {self.prediction_type!r}: only epsilon and v_prediction are supported")
        self.timesteps: int = scheduler.config.num_train_timesteps
        self.alpha = scheduler.alphas_cumprod.sqrt().float()
        self.sigma = (1 - scheduler.alphas_cumprod).sqrt().float()

    @classmethod
    def of(cls, teacher_folder: Path) -> Diffusion:
        """The forward process of a diffusers model folder."""
        return cls(DDIMScheduler.from_pretrained(teacher_folder / "scheduler").config)

    def coefficients(self, t_B: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for integer timesteps, shape (B, 1, 1, 1)."""
        if self.alpha.device != torch.device(device):
            self.alpha, self.sigma = self.alpha.to(device), self.sigma.to(device)
        index = t_B.to(device)
        return self.alpha[index].view(-1, 1, 1, 1), self.sigma[index].view(-1, 1, 1, 1)

    def diffuse(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps."""
        alpha, sigma = self.coefficients(t_B, x0_BCHW.device)
        return alpha * x0_BCHW + sigma * noise_BCHW

    def target(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the network must output at x_t: eps, or v = alpha_t eps - sigma_t x0 (arXiv:2202.00512)."""
        if self.prediction_type == "epsilon":
            return noise_BCHW
        alpha, sigma = self.coefficients(t_B, x0_BCHW.device)
        return alpha * noise_BCHW - sigma * x0_BCHW

    def x0(self, x_t_BCHW: Tensor, output_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The x0 estimate of a network's output. Formed in float32: for epsilon at t = 999 an error is multiplied by 14.6."""
        alpha, sigma = self.coefficients(t_B, x_t_BCHW.device)
        x_t, output = x_t_BCHW.float(), output_BCHW.float()
        if self.prediction_type == "epsilon":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def score(self, x_t_BCHW: Tensor, x0_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """Score of an x0 estimate: s = -eps_hat / sigma_t = (alpha_t x0 - x_t) / sigma_t^2."""
        alpha, sigma = self.coefficients(t_B, x_t_BCHW.device)
        return (alpha * x0_BCHW - x_t_BCHW) / sigma.square()


def stratified_timesteps(batch: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """Integer timesteps in [low, high), one from each of `batch` equal strata, in random order: less variance than independent draws."""
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    t = low + (u * (high - low)).long().clamp_(max=high - low - 1)
    return t[torch.randperm(batch, generator=generator)]


SOLVERS: dict[str, Any] = {
    "ddim": DDIMScheduler, "dpm": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler, "lcm": LCMScheduler,
}  # fmt: skip


def row_generators(noise_BCHW: Tensor) -> list[torch.Generator]:
    """A generator for each row, seeded by that row's own noise: what it draws does not depend on who else is in the batch."""
    rows = noise_BCHW.float().cpu().contiguous().numpy()
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return [torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1) for digest in digests]


@torch.no_grad()
def sample(
    predict: Callable[[Tensor, Tensor], Tensor],
    noise_BCHW: Tensor,
    scheduler_config: Mapping[str, Any],
    steps: int,
    solver: str = "ddim",
) -> Tensor:
    """From noise to a latent, along the probability-flow ODE.

    Args:
        predict: network output (guidance applied) for (x_t, timestep of shape (B,)).
        solver: "ddim"; "dpm" for DPM-Solver++ 2M, which needs about half the steps for the same error; "euler", what few-step
            models such as SD-Turbo were made for; "lcm", multistep consistency sampling (arXiv:2310.04378), which is no ODE: each
            step jumps to x0 and draws noise anew, here from generators that the initial noise seeds.
    """
    # A configuration that says nothing of clipping would clip latents to [-1, 1], which only images are within.
    options = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    scheduler = SOLVERS[solver].from_config(dict(scheduler_config), **options)
    scheduler.set_timesteps(steps, device=noise_BCHW.device)
    x_BCHW: Tensor = noise_BCHW * scheduler.init_noise_sigma
    drawn: dict[str, Any] = {"generator": row_generators(noise_BCHW)} if solver == "lcm" else {}
    for t in scheduler.timesteps:
        output = predict(scheduler.scale_model_input(x_BCHW, t), t.expand(len(x_BCHW)))
        x_BCHW = scheduler.step(output, t, x_BCHW, **drawn).prev_sample
    return x_BCHW
