"""One-step constants: the paper's numbers, and the closed forms of DDIM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import diffusers
import pytest

from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.onestep import probe, probe_folder

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDIM: dict[str, Any] = {**SD, "clip_sample": False, "set_alpha_to_one": True, "timestep_spacing": "trailing"}


def alpha_bar(timestep: int) -> float:
    """Cumulative product of 1 - beta for the scaled-linear schedule, without torch."""
    low, high = math.sqrt(0.00085), math.sqrt(0.012)
    return math.prod(1 - (low + (high - low) * t / 999) ** 2 for t in range(timestep + 1))


def test_euler_trailing_gives_the_papers_numbers() -> None:
    found = probe(diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing"))
    assert found.timestep == 999
    assert found.input_scale == pytest.approx(0.99767, abs=5e-6)
    assert found.latent_coefficient == pytest.approx(14.6146, abs=5e-5)  # x0 = 14.6146 (z - eps)
    assert found.output_coefficient == pytest.approx(-14.6146, abs=5e-5)


def test_deis_gives_the_papers_numbers() -> None:
    found = probe(diffusers.DEISMultistepScheduler(**SD))
    assert (found.timestep, found.input_scale) == (999, 1.0)
    assert found.latent_coefficient == pytest.approx(14.642591, rel=1e-7)
    assert found.output_coefficient == pytest.approx(-14.579279, rel=1e-7)


def test_ddim_v_prediction_is_the_closed_form() -> None:
    found = probe(diffusers.DDIMScheduler(**DDIM, prediction_type="v_prediction"))
    assert (found.timestep, found.input_scale) == (999, 1.0)
    assert found.latent_coefficient == pytest.approx(math.sqrt(alpha_bar(999)), rel=1e-4)  # x0 = alpha x - sigma v
    assert found.output_coefficient == pytest.approx(-math.sqrt(1 - alpha_bar(999)), rel=1e-4)


def test_ddim_epsilon_is_the_closed_form() -> None:
    found = probe(diffusers.DDIMScheduler(**DDIM))
    assert found.latent_coefficient == pytest.approx(1 / math.sqrt(alpha_bar(999)), rel=1e-4)  # x0 = (x - sigma eps) / alpha
    assert found.output_coefficient == pytest.approx(-math.sqrt(1 / alpha_bar(999) - 1), rel=1e-4)


def test_flow_matching_is_noise_minus_velocity() -> None:
    found = probe(diffusers.FlowMatchEulerDiscreteScheduler())
    assert (found.input_scale, found.latent_coefficient) == (1.0, 1.0)
    assert found.output_coefficient == pytest.approx(-1.0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_clipping_is_refused(prediction: str) -> None:
    with pytest.raises(InvalidRequest, match="DDIMScheduler"):
        probe(diffusers.DDIMScheduler(**{**DDIM, "clip_sample": True}, prediction_type=prediction))


@pytest.mark.parametrize("text", [None, "no json", '{"_class_name": "DiffusionPipeline"}', '{"_class_name": "os"}', "{}"])
def test_folder_without_a_scheduler(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "scheduler").mkdir()
    if text is not None:
        (tmp_path / "scheduler" / "scheduler_config.json").write_text(text)
    with pytest.raises(CorruptArtifact, match=r"scheduler_config\.json"):
        probe_folder(tmp_path)
