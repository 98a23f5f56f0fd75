"""The Inception network of FID and KID, with torch-fidelity's port of the original TensorFlow weights and resizing."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sdxs.errors import InvalidRequest, NotFound, PreconditionFailed

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
ALLOWED = f"the file {WEIGHTS}, downloaded from {ADDRESS}"
_PACKAGE, _BATCH = "torch_fidelity", 32


class InceptionFeatures:
    """The 2048 features of the last pooling layer.

    Raises:
        NotFound: there is no such file; says what to download.
        PreconditionFailed: torch-fidelity is not installed.
        InvalidRequest: the file holds other weights.
    """

    name = "Inception"

    def __init__(self, weights: Path, device: torch.device | str = "cpu") -> None:
        if not weights.is_file():
            raise NotFound(f"inception: there is no file {str(weights)!r}; name {ALLOWED}")
        kind = _network_class()
        try:
            torch.load(weights, map_location="meta", weights_only=True)  # torch-fidelity itself would run code in the file
            self.network = kind("inception", ["2048"], feature_extractor_weights_path=str(weights)).to(device)
        except (RuntimeError, pickle.UnpicklingError, EOFError, TypeError) as error:
            raise InvalidRequest("inception", str(weights), ALLOWED) from error
        self.device = device

    @torch.inference_mode()
    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        """float64, shape (N, 2048)."""
        image_BCHW = torch.from_numpy(np.ascontiguousarray(image_BHWC.transpose(0, 3, 1, 2)))
        parts = [self.network(part.to(self.device))[0] for part in image_BCHW.split(_BATCH)]
        return torch.cat(parts).double().cpu().numpy()


def _network_class() -> Any:
    """torch-fidelity's network without the rest of its package.

    Its `__init__` imports torchvision, which the network does not use, and whose published builds do not load beside a CPU build of torch.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        how = "pip install --no-deps 'torch-fidelity>=0.4,<0.5' is enough"
        raise PreconditionFailed(f"inception: torch-fidelity is not installed; {how} (docs/evaluation.md)")
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == _PACKAGE}
    sys.modules[_PACKAGE] = importlib.util.module_from_spec(spec)
    try:
        module = importlib.import_module(f"{_PACKAGE}.feature_extractor_inceptionv3")
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
            del sys.modules[name]
        sys.modules.update(kept)
    return module.FeatureExtractorInceptionV3
