"""CLIP: features of images, and the CLIP score of images and their prompts (arXiv:2104.08718)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sdxs.errors import InvalidRequest, NotFound
from trainer.sources import load_frozen

USUAL = "openai/clip-vit-base-patch16"
ALLOWED = f"a CLIP model in transformers format: a local folder or a hub id such as {USUAL}"
_BATCH = 32
_WEIGHTS = (
    "model*.safetensors",
    "pytorch_model*.bin",
)  # older models, OpenAI's among them, have only the second; no code is run from it


class ClipFeatures:
    """A CLIP model: its projected image embeddings, and how well they fit prompts.

    Args:
        source: a local folder, or a hub id that is downloaded once.

    Raises:
        NotFound: no such folder, and the hub does not give it; says what to download.
        InvalidRequest: it is not a CLIP model.
    """

    name = "CLIP"

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        from transformers import AutoImageProcessor, CLIPModel, CLIPTokenizer

        folder, self.device = clip_folder(source), device
        try:
            self.network = load_frozen(CLIPModel, folder).to(device)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder)
            self.processor: Any = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (OSError, ValueError, KeyError) as error:
            raise InvalidRequest("clip", source, f"{ALLOWED} ({str(error).splitlines()[0]})") from error

    @torch.inference_mode()
    def features(self, image_BHWC: np.ndarray) -> np.ndarray:
        """float64 unit vectors, shape (N, projection)."""
        starts = range(0, len(image_BHWC), _BATCH)
        return torch.cat([self._see(image_BHWC[i : i + _BATCH]) for i in starts]).double().cpu().numpy()

    @torch.inference_mode()
    def score(self, image_BHWC: np.ndarray, prompts: list[str]) -> float:
        """Mean of max(100 cos(image, prompt), 0), eq. 1 of arXiv:2104.08718 times 40; long prompts are cut to CLIP's length and keep their
        end token, which CLIP reads. torchmetrics cuts that off too, and takes max(mean, 0) of the whole."""
        return self.fit(self.features(image_BHWC), prompts)

    @torch.inference_mode()
    def fit(self, features_NF: np.ndarray, prompts: list[str]) -> float:
        """The score of images whose features are known."""
        text_NF = torch.cat([self._read(prompts[i : i + _BATCH]) for i in range(0, len(prompts), _BATCH)]).double().cpu()
        return float((100 * (torch.from_numpy(features_NF) * text_NF).sum(1)).clamp(min=0).mean())

    def _see(self, image_BHWC: np.ndarray) -> Tensor:
        pixels = self.processor(list(image_BHWC), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
        states = self.network.vision_model(pixel_values=pixels.to(self.device)).pooler_output
        return F.normalize(self.network.visual_projection(states), dim=-1)

    def _read(self, prompts: list[str]) -> Tensor:
        length = self.network.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt").to(self.device)
        states = self.network.text_model(**tokens).pooler_output
        return F.normalize(self.network.text_projection(states), dim=-1)


def clip_folder(source: str) -> Path:
    """The local folder of a CLIP model. Raises NotFound."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return _from_hub(source)
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        raise NotFound(f"clip {source!r}: no such folder, and the hub does not give it; name {ALLOWED}") from error


def _from_hub(source: str) -> Path:
    """One file format of the weights: the first of `_WEIGHTS` that the hub has."""
    from huggingface_hub import snapshot_download

    for weights in _WEIGHTS:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", "*.txt", weights]))
        if any(folder.glob(weights)):
            break
    return folder
