"""Frechet distance of two Gaussians fitted to features (arXiv:1706.08500): FID, when the features are Inception's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxs.errors import InvalidRequest


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features."""

    mean_F: np.ndarray
    covariance_FF: np.ndarray

    @classmethod
    def of(cls, features_NF: np.ndarray) -> Gaussian:
        """Fitted to at least two feature vectors."""
        return cls(features_NF.mean(0), np.atleast_2d(np.cov(features_NF, rowvar=False)))

    def save(self, path: Path) -> None:
        """As .npz with `mu` and `sigma`, the names other FID programs use."""
        np.savez(path, mu=self.mean_F, sigma=self.covariance_FF)

    @classmethod
    def load(cls, path: Path) -> Gaussian:
        """Raises InvalidRequest when it is not such a file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean_F, covariance_FF = file["mu"].astype(np.float64), file["sigma"].astype(np.float64)
        except (ValueError, KeyError, OSError, AttributeError) as error:
            raise InvalidRequest("statistics", str(path), "an .npz file with arrays mu (F,) and sigma (F, F)") from error
        if covariance_FF.shape != (*mean_F.shape, *mean_F.shape):
            shapes = f"mu {mean_F.shape} and sigma {covariance_FF.shape}"
            raise InvalidRequest("statistics", str(path), f"arrays mu (F,) and sigma (F, F); these are {shapes}")
        return cls(mean_F, covariance_FF)


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2), which singular covariances do not trouble.
    """
    gap = a.mean_F - b.mean_F
    overlap = np.linalg.svd(_root(a.covariance_FF) @ _root(b.covariance_FF), compute_uv=False).sum()
    return float(gap @ gap + np.trace(a.covariance_FF) + np.trace(b.covariance_FF) - 2 * overlap)


def frechet_distance(a_NF: np.ndarray, b_NF: np.ndarray) -> float:
    """Of the Gaussians fitted to two feature sets."""
    return gaussian_distance(Gaussian.of(a_NF), Gaussian.of(b_NF))


def _root(covariance_FF: np.ndarray) -> np.ndarray:
    """The symmetric square root; eigenvalues that are zero but for rounding count as zero."""
    values, vectors = np.linalg.eigh(covariance_FF)
    values[values < len(values) * np.finfo(np.float64).eps * values.max(initial=0)] = 0
    root: np.ndarray = (vectors * np.sqrt(values)) @ vectors.T
    return root
