"""Metrics by an independent route: matrix square roots, sums over all pairs, closed forms, neighbours counted one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from sdxs.errors import InvalidRequest
from trainer.evaluation.metrics.diversity import diversity, pairwise_distance
from trainer.evaluation.metrics.flops import gflop
from trainer.evaluation.metrics.frechet import Gaussian, frechet_distance, gaussian_distance
from trainer.evaluation.metrics.kernel import kernel_distance, squared_mmd
from trainer.evaluation.metrics.manifold import precision_recall
from trainer.evaluation.metrics.networks import distribution_scores
from trainer.models.students import student_config


def cloud(count: int, width: int, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, size=(count, width))


def test_frechet_distance_is_that_of_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    b = rng.normal(0.5, 1.5, size=(300, 6)) @ rng.normal(size=(6, 6))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(0) - b.mean(0)
    expected = gap @ gap + np.trace(cov_a + cov_b - 2 * linalg.sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_diagonal_gaussians_in_closed_form() -> None:
    deviation_a, deviation_b = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 2.0])
    a = Gaussian(np.zeros(3), np.diag(deviation_a**2))
    b = Gaussian(np.array([1.0, -2.0, 0.5]), np.diag(deviation_b**2))
    assert gaussian_distance(a, b) == pytest.approx(5.25 + ((deviation_a - deviation_b) ** 2).sum(), rel=1e-9)


def test_frechet_distance_of_a_shift_and_of_a_scale_by_hand() -> None:
    a = cloud(100, 4)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9)
    # Centred, scaled by 2: tr(C + 4C - 4C) = tr C.
    centred = a - a.mean(0)
    assert frechet_distance(centred, 2 * centred) == pytest.approx(np.trace(np.cov(a, rowvar=False)))


def test_frechet_distance_stands_fewer_images_than_features() -> None:
    few = cloud(8, 64)
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(few, few + 1) == pytest.approx(64, rel=1e-8)


def test_statistics_survive_their_file_and_other_files_are_refused(tmp_path: Path) -> None:
    gaussian = Gaussian.of(cloud(50, 5))
    gaussian.save(tmp_path / "real.npz")
    assert gaussian_distance(Gaussian.load(tmp_path / "real.npz"), gaussian) == pytest.approx(0, abs=1e-12)
    np.savez(tmp_path / "bent.npz", mu=np.zeros(3), sigma=np.eye(4))
    np.savez(tmp_path / "other.npz", mean=np.zeros(3))
    (tmp_path / "text.npz").write_text("no")
    for name, word in (("bent", r"\(4, 4\)"), ("other", "mu"), ("text", "mu"), ("absent", "mu")):
        with pytest.raises(InvalidRequest, match=word):
            Gaussian.load(tmp_path / f"{name}.npz")


def mmd_by_loops(a: np.ndarray, b: np.ndarray) -> float:
    def k(x: np.ndarray, y: np.ndarray) -> float:
        return float((sum(p * q for p, q in zip(x, y, strict=True)) / len(x) + 1) ** 3)

    among_a = np.mean([k(x, y) for i, x in enumerate(a) for j, y in enumerate(a) if i != j])
    among_b = np.mean([k(x, y) for i, x in enumerate(b) for j, y in enumerate(b) if i != j])
    return float(among_a + among_b - 2 * np.mean([k(x, y) for x in a for y in b]))


def test_kernel_distance_is_the_sum_over_all_pairs() -> None:
    a, b = cloud(12, 5), cloud(9, 5, 1, 0.7)
    expected = mmd_by_loops(a, b)
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-10)
    assert kernel_distance(a, b) == (pytest.approx(expected, rel=1e-10), 0.0)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    """In one dimension E[(x y + 1)^3] of independent standard normals is 1 + 3 = 4; with means m the moments below are multiplied."""
    same, _ = kernel_distance(cloud(4000, 1), cloud(4000, 1, 1), subsets=40, size=500)
    assert abs(same) < 0.1
    m = 0.5
    moments = [1.0, m, 1 + m**2, 3 * m + m**3]
    among = sum(c * x * x for c, x in zip((1, 3, 3, 1), moments, strict=True))
    across = sum(c * x * y for c, x, y in zip((1, 3, 3, 1), moments, (1, 0, 1, 0), strict=True))
    found, spread = kernel_distance(cloud(8000, 1, 2, m), cloud(8000, 1, 3), subsets=40, size=500)
    assert found == pytest.approx(among + 4 - 2 * across, rel=0.1)
    assert spread > 0


def test_kernel_distance_of_pairs_does_not_reward_being_like_ones_own_image() -> None:
    """The same distribution, image by image nearly the same: about 0, as for other images of it; its own image counted, far below."""
    real = cloud(60, 4)
    made = real + 0.01 * cloud(60, 4, 1)
    expected = mmd_by_loops(real, made)
    n, own = 60, np.mean([(float(x @ y) / 4 + 1) ** 3 for x, y in zip(real, made, strict=True)])
    across = np.mean([(float(x @ y) / 4 + 1) ** 3 for x in real for y in made])
    assert squared_mmd(real, made, paired=True) == pytest.approx(
        expected + 2 * across - 2 * (across * n - own) / (n - 1), rel=1e-9
    )
    assert abs(squared_mmd(real, made, paired=True)) < 0.01 < -squared_mmd(real, made)
    found, spread = kernel_distance(real, made, subsets=10, size=20, paired=True)
    assert abs(found) < 0.01 and spread < 0.02
    shifted = kernel_distance(cloud(400, 3), cloud(400, 3) + 0.5, paired=True)[0]
    assert shifted == pytest.approx(kernel_distance(cloud(400, 3), cloud(400, 3, 1, 0.5))[0], abs=0.3) and shifted > 0.5


def inside_by_loops(points: np.ndarray, manifold: np.ndarray, k: int) -> float:
    found = []
    for point in points:
        hits = []
        for i, centre in enumerate(manifold):
            others = sorted(np.linalg.norm(centre - other) for j, other in enumerate(manifold) if j != i)
            hits.append(np.linalg.norm(point - centre) <= others[k - 1])
        found.append(any(hits))
    return float(np.mean(found))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(0, 3), k=st.integers(1, 3))
def test_precision_and_recall_by_counting_neighbours(seed: int, shift: float, k: int) -> None:
    real, made = cloud(14, 3, seed), cloud(11, 3, seed + 1, shift)
    expected = inside_by_loops(made, real, k), inside_by_loops(real, made, k)
    assert precision_recall(real, made, k) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_one_repeated_image_is_precise_and_recalls_nothing() -> None:
    real = cloud(200, 4)
    precision, recall = precision_recall(real, real[:1] + np.zeros((50, 1)))
    assert precision == 1.0
    assert recall == pytest.approx(1 / 200)


def test_pairwise_distance_by_hand() -> None:
    right_angles = np.array([[2.0, 0.0], [0.0, 5.0]])
    assert pairwise_distance(right_angles) == pytest.approx(1.0)
    assert pairwise_distance(np.vstack([right_angles, [[-1.0, 0.0]]])) == pytest.approx((1 + 2 + 1) / 3)
    assert pairwise_distance(np.ones((4, 3))) == pytest.approx(0, abs=1e-12)
    features = cloud(7, 5)
    pairs = [1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b) for i, a in enumerate(features) for b in features[:i]]
    assert pairwise_distance(features) == pytest.approx(np.mean(pairs))
    assert diversity(np.stack([features, np.ones((7, 5))])) == pytest.approx(np.mean(pairs) / 2)


class Named:
    name = "Net"

    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        return image_BHWC.reshape(len(image_BHWC), -1).astype(float)


def test_too_few_images_leave_scores_out_instead_of_making_them_up() -> None:
    real = cloud(20, 3)
    pairs = [(real[:4], cloud(4, 3)), (real[:3], cloud(3, 3)), (real[:1], cloud(1, 3))]
    keys = {"frechet_net", "kid_net", "precision_net", "recall_net"}
    assert distribution_scores(Named(), *pairs[0]).keys() == keys
    assert distribution_scores(Named(), *pairs[1]).keys() == {"frechet_net", "kid_net"}
    assert distribution_scores(Named(), *pairs[2]) == {}


def test_flops_of_stable_diffusion_are_those_of_the_arithmetic() -> None:
    """GFLOP at 512x512: SD 2.1's U-Net 804, SDXS-512's 370, the KL decoder 2515, the tiny one 141."""
    sd21 = {
        "sample_size": 64, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20), "use_linear_projection": True,
    }  # fmt: skip
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**sd21)
        student = UNet2DConditionModel.from_config(student_config(teacher.config))
        large = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        latent, t, text = torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.long), torch.empty(1, 77, 1024)
        with torch.no_grad():
            counts = [
                gflop(lambda: teacher(latent, t, text)), gflop(lambda: student(latent, t, text)),
                gflop(lambda: large.decode(latent)), gflop(lambda: AutoencoderTiny().decode(latent)),
            ]  # fmt: skip
    assert [round(count) for count in counts] == [804, 370, 2515, 141]


def test_flops_of_a_product_a_convolution_and_attention_on_the_cpu() -> None:
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    assert gflop(lambda: a @ b) == pytest.approx(2 * 3 * 5 * 7 / 1e9)
    image, kernel = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    assert gflop(lambda: torch.conv2d(image, kernel, padding=1)) == pytest.approx(2 * 2 * 8 * 8 * 4 * 3 * 9 / 1e9)
    q, k = torch.rand(1, 2, 16, 8), torch.rand(1, 2, 10, 8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found = gflop(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, k))
        assert found == pytest.approx(2 * 2 * 2 * 16 * 10 * 8 / 1e9)
