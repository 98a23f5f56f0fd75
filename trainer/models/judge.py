"""The judge's network: a small classifier of images, whose features and answers the judge scores by."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

FEATURES = 64


class JudgeNet(nn.Module):
    """Four stride-2 convolution stages to a 64-d feature, then one cosine classifier per head."""

    def __init__(self, heads: dict[str, int], width: int = 32) -> None:
        super().__init__()
        self.heads, self.width = dict(heads), width
        channels = [3, width, 2 * width, 3 * width, 4 * width]
        blocks = []
        for low, high in pairwise(channels):
            blocks += [nn.Conv2d(low, high, 3, stride=2, padding=1), nn.GroupNorm(4, high), nn.SiLU()]
            blocks += [nn.Conv2d(high, high, 3, padding=1), nn.GroupNorm(4, high), nn.SiLU()]
        self.trunk = nn.Sequential(*blocks)
        self.project = nn.Linear(channels[-1] * 16, FEATURES)
        self.prototypes = nn.ParameterDict({name: nn.Parameter(torch.randn(n, FEATURES)) for name, n in heads.items()})

    def features(self, image_BCHW: Tensor) -> Tensor:
        """Features of images in [-1, 1], shape (B, 64); not normalised."""
        maps_BCHW = F.adaptive_avg_pool2d(self.trunk(image_BCHW), 4)
        features: Tensor = self.project(maps_BCHW.flatten(1))
        return features

    def logits(self, features_BF: Tensor) -> dict[str, Tensor]:
        """Cosine similarity to each class, times 16, per head."""
        unit_BF = F.normalize(features_BF, dim=-1)
        return {name: 16 * unit_BF @ F.normalize(p, dim=-1).T for name, p in self.prototypes.items()}

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.half().contiguous() for k, v in self.state_dict().items()}, folder / "judge.safetensors")
        (folder / "config.json").write_text(json.dumps({"heads": self.heads, "width": self.width}))

    @classmethod
    def load(cls, folder: Path) -> JudgeNet:
        net = cls(**json.loads((folder / "config.json").read_text()))
        net.load_state_dict({k: v.float() for k, v in load_file(folder / "judge.safetensors").items()})
        return net.eval()


def to_tensor(image_BHWC: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image_BHWC)).permute(0, 3, 1, 2).float() / 127.5 - 1
