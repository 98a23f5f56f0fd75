"""SSIM against scikit-image and against loops in numpy; feature matching (eq. 10)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor

from trainer.objectives.feature_matching import feature_matching, gaussian_window, ssim


def pair(channels: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two correlated maps, batch of two, in float64."""
    a, noise = torch.randn(2, 2, channels, height, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return a, 0.2 + 0.8 * a + 0.3 * noise


def ssim_by_loops(a_HW: np.ndarray, b_HW: np.ndarray, data_range: float, size: int) -> float:
    """Wang et al. 2004, position by position, with centred moments."""
    line = np.exp(-((np.arange(size) - size // 2) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / np.outer(line, line).sum()
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for y in range(a_HW.shape[0] - size + 1):
        for x in range(a_HW.shape[1] - size + 1):
            a, b = a_HW[y : y + size, x : x + size], b_HW[y : y + size, x : x + size]
            mean_a, mean_b = (weight * a).sum(), (weight * b).sum()
            var_a, var_b = (weight * (a - mean_a) ** 2).sum(), (weight * (b - mean_b) ** 2).sum()
            covariance = (weight * (a - mean_a) * (b - mean_b)).sum()
            luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
            values.append(luminance * (2 * covariance + c2) / (var_a + var_b + c2))
    return float(np.mean(values))


def test_ssim_is_that_of_scikit_image() -> None:
    a, b = pair(3, 20, 24)
    data_range = torch.tensor([4.0, 9.0], dtype=torch.float64)
    found = ssim(a, b, data_range)
    for i in range(2):
        # Its mean, too, leaves out the border that the window does not cover fully.
        expected = structural_similarity(  # type: ignore[no-untyped-call]
            a[i].numpy(), b[i].numpy(), data_range=float(data_range[i]), channel_axis=0,
            gaussian_weights=True, sigma=1.5, use_sample_covariance=False, win_size=11,
        )  # fmt: skip
        assert 0.2 < expected < 0.9
        assert float(found[i]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 7), (4, 4, 3), (5, 9, 5), (2, 2, 1)])
def test_window_shrinks_to_the_map(height: int, width: int, size: int) -> None:
    a, b = pair(2, height, width)
    found = ssim(a, b, torch.full((2,), 5.0, dtype=torch.float64))
    for i in range(2):
        expected = np.mean([ssim_by_loops(a[i, c].numpy(), b[i, c].numpy(), 5.0, size) for c in range(2)])
        assert float(found[i]) == pytest.approx(expected, abs=1e-6)


def test_window_is_a_normalised_gaussian() -> None:
    window = gaussian_window(5).numpy()
    assert window.sum() == pytest.approx(1)
    assert window[2, 2] / window[2, 4] == pytest.approx(np.exp(2**2 / (2 * 1.5**2)))
    np.testing.assert_array_equal(window, window[::-1, ::-1].T)


def test_ssim_refuses_unequal_shapes() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        ssim(torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 5), torch.ones(1))


def test_feature_matching_is_the_weighted_sum_of_dissimilarities() -> None:
    first, second = pair(2, 12, 12), pair(3, 6, 6, seed=1)
    found = feature_matching([first[0], second[0]], [first[1], second[1]], [1.0, 0.25])
    expected = 0.0
    for (student, target), weight, size in ((first, 1.0, 11), (second, 0.25, 5)):
        for s, t in zip(student.numpy(), target.numpy(), strict=True):
            data_range = 6 * t.std(ddof=1)
            similarity = np.mean([ssim_by_loops(s[c], t[c], data_range, size) for c in range(len(s))])
            expected += weight / 2 * (1 - float(similarity))
    assert float(found) == pytest.approx(expected, abs=1e-6)


def test_feature_matching_is_zero_for_equal_maps_and_pulls_others_closer() -> None:
    student, target = pair(2, 12, 12)
    assert float(feature_matching([target], [target], [2.0])) == pytest.approx(0, abs=1e-12)
    student.requires_grad_(True)
    before = feature_matching([student], [target], [1.0])
    before.backward()
    assert before.item() > 0.1
    assert student.grad is not None
    after = feature_matching([student.detach() - 10 * student.grad], [target], [1.0])
    assert float(after) < before.item() - 0.01


def test_feature_matching_is_free_of_the_features_scale() -> None:
    student, target = pair(2, 12, 12)
    small = feature_matching([student], [target], [1.0])
    assert float(feature_matching([100 * student], [100 * target], [1.0])) == pytest.approx(float(small))


def test_feature_matching_grows_with_the_disturbance() -> None:
    noise, target = pair(2, 12, 12)
    losses = [float(feature_matching([target + share * noise], [target], [1.0])) for share in (0.0, 0.1, 0.3, 1.0)]
    assert losses == sorted(losses)
    assert losses[-1] > 0.3


def test_every_layer_needs_a_weight() -> None:
    a, b = pair(1, 6, 6)
    with pytest.raises(ValueError, match="shorter"):
        feature_matching([a, a], [b, b], [1.0])
