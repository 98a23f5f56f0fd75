"""The three networks of a bundle, one class each: what a replica hosts and the in-process pipeline composes. Imports torch.

Arrays go in and come out: B images, C latent channels, H x W elements or pixels, L tokens of D numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxs import bundle
from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.settings import Settings

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTokenizer

Array = np.ndarray


def _load(kind: Any, folder: Path, settings: Settings, unused: tuple[str, ...] = ()) -> Any:
    """A network for inference, in float32 (what a CPU is fast at), weights laid out channels last.

    Raises:
        CorruptArtifact: a weight is missing, but for those beginning with `unused`; diffusers would draw it at random.
    """
    torch.set_num_threads(settings.torch_threads)
    network, found = kind.from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True, output_loading_info=True)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(unused))
    if missing:
        raise CorruptArtifact(f"{folder.name} lacks {len(missing)} weights of its {kind.__name__}, among them {missing[0]}")
    return network.eval().requires_grad_(False).to(memory_format=torch.channels_last)


class TextEncoder:
    """Prompts to the hidden states that condition the U-Net."""

    def __init__(self, tokenizer: CLIPTokenizer, network: CLIPTextModel) -> None:
        self.tokenizer, self.network = tokenizer, network

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> TextEncoder:
        from transformers import CLIPTextModel, CLIPTokenizer  # here: the other stages' processes start without it

        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        return cls(tokenizer, _load(CLIPTextModel, folder / "text_encoder", settings))

    def check(self, prompt: str) -> None:
        """Raises InvalidRequest(field="prompt") when it is empty or longer than the model reads."""
        if not prompt.strip():
            raise InvalidRequest("prompt", prompt, "some text")
        limit = self.tokenizer.model_max_length
        count = len(self.tokenizer(prompt)["input_ids"])
        if count > limit:
            raise InvalidRequest("prompt", prompt, f"at most {limit} tokens with start and end; this has {count}")

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Array:
        """float32 hidden states, shape (B, L, D)."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        states: Array = self.network(tokens["input_ids"]).last_hidden_state.float().numpy()
        return states


class UNet:
    """One evaluation of the student, from unit noise to x0."""

    def __init__(self, network: Any, manifest: bundle.Manifest) -> None:
        self.network, self.constants = network, manifest.one_step
        self.latent_shape = manifest.latent_shape
        self.text_shape = (manifest.max_prompt_tokens, manifest.text_width)

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> UNet:
        import diffusers  # here: the text encoder's process starts without it

        network = _load(diffusers.UNet2DConditionModel, folder / "unet", settings)
        return cls(network, bundle.facts(folder))

    @torch.inference_mode()
    def denoise(self, noise_BCHW: Array, text_BLD: Array) -> Array:
        """x0 = a noise + b unet(c noise), combined in float32; returns float32 latents of the noise's shape."""
        noise = torch.from_numpy(np.ascontiguousarray(noise_BCHW, dtype=np.float32))
        text = torch.from_numpy(np.ascontiguousarray(text_BLD, dtype=np.float32))
        scaled = (noise * self.constants.input_scale).contiguous(memory_format=torch.channels_last)
        output = self.network(scaled, self.constants.timestep, text, return_dict=False)[0].float()
        latent = self.constants.latent_coefficient * noise + self.constants.output_coefficient * output
        combined: Array = latent.contiguous().numpy()
        return combined


class Decoder:
    """Latents to pixels."""

    def __init__(self, network: Any, latent_shape: tuple[int, int, int]) -> None:
        self.network, self.latent_shape = network, latent_shape

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> Decoder:
        import diffusers

        manifest = bundle.facts(folder)
        kind = bundle.read_config(folder, "vae/config.json")["_class_name"]
        if kind not in ("AutoencoderTiny", "AutoencoderKL"):
            raise InvalidRequest("vae", kind, "AutoencoderTiny or AutoencoderKL")
        return cls(
            _load(getattr(diffusers, kind), folder / "vae", settings, ("encoder.", "quant_conv.")), manifest.latent_shape
        )

    @torch.inference_mode()
    def paint(self, latent_BCHW: Array) -> Array:
        """float32 images in [0, 1], shape (B, H, W, 3)."""
        latent = torch.from_numpy(np.ascontiguousarray(latent_BCHW, dtype=np.float32)) / self.network.config.scaling_factor
        image = self.network.decode(latent.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        image_BHWC: Array = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
        return image_BHWC

    def decode(self, latent_BCHW: Array) -> Array:
        """uint8 images, shape (B, H, W, 3), scaled and rounded as diffusers' image processor does."""
        return np.rint(self.paint(latent_BCHW) * np.float32(255)).astype(np.uint8)
