"""SSIM against scikit-image, which implements it independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from trainer.objectives.feature_matching import feature_matching, gaussian_window, ssim


@pytest.mark.parametrize("noise", [0.05, 0.5, 2.0])
def test_ssim_equals_scikit_image(noise: float) -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=(24, 20))
    b = a + noise * rng.normal(size=a.shape)
    _, full = structural_similarity(
        a, b, data_range=5.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    expected = full[5:-5, 5:-5].mean()  # where the 11x11 window lies inside
    ours = ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None], torch.tensor([5.0]))
    assert ours.item() == pytest.approx(expected, abs=1e-6)


def test_window_is_a_normalised_gaussian() -> None:
    window = gaussian_window(5)
    assert window.sum().item() == pytest.approx(1.0)
    assert (window[2, 2] / window[2, 3]).item() == pytest.approx(np.exp(1 / (2 * 1.5**2)), rel=1e-5)


def test_feature_matching_is_zero_for_equal_features_and_grows() -> None:
    features = [torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)]
    assert feature_matching(features, features, [1.0, 0.5]).item() == pytest.approx(0, abs=1e-5)
    near = [f + 0.1 * torch.randn_like(f) for f in features]
    far = [f + torch.randn_like(f) for f in features]
    assert 0 < feature_matching(near, features, [1.0, 0.5]) < feature_matching(far, features, [1.0, 0.5])


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        ssim(torch.zeros(1, 1, 8, 8), torch.zeros(1, 2, 8, 8), torch.ones(1))
