"""Precision and recall of generated images (arXiv:1904.06991): how many look real, and how much of what is real is made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS = 3  # the paper's k
_ROWS = 1024


def precision_recall(real_NF: np.ndarray, made_NF: np.ndarray, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Shares in [0, 1]. A manifold is the union of balls about each of its points that reach to its k-th nearest neighbour.

    Precision: generated points inside the real manifold. Recall: real points inside the generated one.

    Args:
        real_NF, made_NF: more than `neighbours` feature vectors each.
    """
    real, made = torch.from_numpy(real_NF), torch.from_numpy(made_NF)
    return _inside(made, real, neighbours), _inside(real, made, neighbours)


def _inside(points_NF: Tensor, manifold_MF: Tensor, neighbours: int) -> float:
    """Share of the points that lie in a ball of the manifold."""
    parts = manifold_MF.split(_ROWS)
    radius_M = torch.cat(
        [torch.cdist(part, manifold_MF).kthvalue(neighbours + 1).values for part in parts]
    )  # itself is nearest
    found = [(torch.cdist(part, manifold_MF) <= radius_M).any(1) for part in points_NF.split(_ROWS)]
    return float(torch.cat(found).double().mean())
