"""Kernel distance of two feature sets (arXiv:1801.01401): KID, when the features are Inception's. Unbiased, so small sets will do."""

from __future__ import annotations

import numpy as np

SUBSETS, SIZE = 100, 1000  # torch-fidelity's


def kernel_distance(
    real_NF: np.ndarray, made_NF: np.ndarray, subsets: int = SUBSETS, size: int = SIZE, paired: bool = False
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased MMD^2 over random subsets. Sets no larger than `size` are taken whole, once.

    Args:
        real_NF, made_NF: at least two feature vectors each.
        paired: as `squared_mmd` has it; subsets then keep the pairs.
    """
    if max(len(real_NF), len(made_NF)) <= size:
        return squared_mmd(real_NF, made_NF, paired), 0.0
    rng, found = np.random.default_rng(0), []
    for _ in range(subsets):
        chosen = _some(len(real_NF), size, rng)
        found.append(squared_mmd(real_NF[chosen], made_NF[chosen if paired else _some(len(made_NF), size, rng)], paired))
    return float(np.mean(found)), float(np.std(found))


def squared_mmd(a_NF: np.ndarray, b_MF: np.ndarray, paired: bool = False) -> float:
    """mean k(a, a') + mean k(b, b') - 2 mean k(a, b) over distinct pairs, k(x, y) = (x.y / F + 1)^3.

    Images that were asked for what the real ones show are not independent of them. With `paired` (a_i and b_i belong together) k(a_i, b_i)
    is left out as well, which is unbiased then too: the U-statistic of Gretton et al. 2012, lemma 6.
    """
    across = _distinct(_kernel(a_NF, b_MF)) if paired else float(_kernel(a_NF, b_MF).mean())
    return _distinct(_kernel(a_NF, a_NF)) + _distinct(_kernel(b_MF, b_MF)) - 2 * across


def _distinct(kernel_NN: np.ndarray) -> float:
    """Mean without the diagonal."""
    return float((kernel_NN.sum() - np.trace(kernel_NN)) / (len(kernel_NN) * (len(kernel_NN) - 1)))


def _kernel(a_NF: np.ndarray, b_MF: np.ndarray) -> np.ndarray:
    base_NM: np.ndarray = a_NF @ b_MF.T / a_NF.shape[1] + 1
    cubed_NM: np.ndarray = base_NM * base_NM * base_NM  # numpy's ** 3 is thirty times slower
    return cubed_NM


def _some(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(count, min(size, count), replace=False)
