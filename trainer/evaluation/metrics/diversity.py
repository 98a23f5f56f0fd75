"""Diversity: how far apart images of one prompt lie. One-step students are known to lose it."""

from __future__ import annotations

import numpy as np


def pairwise_distance(features_NF: np.ndarray) -> float:
    """Mean of 1 - cosine over all pairs of at least two feature vectors: 0 when all are alike."""
    unit_NF = features_NF / np.linalg.norm(features_NF, axis=1, keepdims=True).clip(min=1e-12)
    count, total_F = len(unit_NF), unit_NF.sum(0)
    mean_cosine = (total_F @ total_F - (unit_NF * unit_NF).sum()) / (count * (count - 1))
    return float(1 - mean_cosine)


def diversity(features_PNF: np.ndarray) -> float:
    """`pairwise_distance` of N images under each of P prompts, averaged over the prompts."""
    return float(np.mean([pairwise_distance(features_NF) for features_NF in features_PNF]))
