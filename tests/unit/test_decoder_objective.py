"""The decoder's loss (eq. 5) and the autoencoder's terms, recomputed in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from trainer.objectives.decoder import down8_l1
from trainer.objectives.gan import discriminator_hinge, generator_hinge
from trainer.objectives.reconstruction import gradient_l1, kl_per_element, opponent_l1

RNG = np.random.default_rng(0)
OUTPUT, TARGET = RNG.normal(size=(2, 2, 3, 16, 24))
ERROR = OUTPUT - TARGET


@pytest.mark.parametrize("factor", [4, 8])
def test_down8_is_the_l1_of_block_means(factor: int) -> None:
    blocks = ERROR.reshape(2, 3, 16 // factor, factor, 24 // factor, factor).mean((3, 5))
    found = down8_l1(torch.from_numpy(OUTPUT), torch.from_numpy(TARGET), factor)
    assert float(found) == pytest.approx(np.abs(blocks).mean())


def test_down8_leaves_high_frequencies_to_the_discriminator() -> None:
    checkers = np.indices((16, 24)).sum(0) % 2 * 2.0 - 1
    assert float(down8_l1(torch.from_numpy(TARGET + checkers), torch.from_numpy(TARGET))) == pytest.approx(0, abs=1e-12)


def test_hinges_by_hand() -> None:
    real, fake = torch.tensor([-0.5, 0.5, 2.0]), torch.tensor([-3.0, 0.0, 1.0])
    assert float(generator_hinge([fake])) == pytest.approx(2 / 3)
    assert float(discriminator_hinge([real], [fake])) == pytest.approx((1.5 + 0.5 + 0) / 3 + (0 + 1 + 2) / 3)


def test_gradient_l1_in_numpy() -> None:
    expected = np.abs(np.diff(ERROR, axis=3)).mean() + np.abs(np.diff(ERROR, axis=2)).mean()
    assert float(gradient_l1(torch.from_numpy(OUTPUT), torch.from_numpy(TARGET))) == pytest.approx(expected)


def test_opponent_l1_in_numpy() -> None:
    red, green, blue = ERROR[:, 0], ERROR[:, 1], ERROR[:, 2]
    expected = np.abs(red - blue).mean() + np.abs(4 * green - 2 * red - 2 * blue).mean()
    found = float(opponent_l1(torch.from_numpy(OUTPUT), torch.from_numpy(TARGET)))
    assert found == pytest.approx(expected)
    grey = torch.from_numpy(OUTPUT) + torch.randn(2, 1, 16, 24, dtype=torch.float64)
    assert float(opponent_l1(grey, torch.from_numpy(TARGET))) == pytest.approx(found)  # blind to lightness


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.2, 0.5), (-0.7, 2.0)])
def test_kl_is_the_integral(mean: float, std: float) -> None:
    p, q = stats.norm(mean, std), stats.norm()
    expected, _ = integrate.quad(lambda x: p.pdf(x) * (p.logpdf(x) - q.logpdf(x)), mean - 9 * std, mean + 9 * std)
    found = kl_per_element(torch.full((2, 3), mean), torch.full((2, 3), 2 * np.log(std)))
    assert float(found) == pytest.approx(expected, abs=1e-5)
