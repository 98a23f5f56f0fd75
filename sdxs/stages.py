"""The three networks of a bundle, one class each: what a replica hosts and the in-process pipeline composes. Imports torch.

Arrays go in and come out: B images, C latent channels, H x W elements or pixels, L tokens of D numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxs import bundle
from sdxs.errors import CorruptArtifact, InvalidRequest
from sdxs.prompts import Prompts
from sdxs.settings import Settings

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

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
    """Prompts to what conditions the U-Net: one CLIP text encoder (SD 1.x, 2.x), or two side by side (SDXL)."""

    def __init__(self, encoders: Sequence[tuple[CLIPTokenizer, Any]]) -> None:
        self.encoders = encoders

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> TextEncoder:
        from transformers import (
            CLIPTextModel,
            CLIPTextModelWithProjection,
            CLIPTokenizer,
        )  # here: other processes start without

        kinds = {"": CLIPTextModel, "_2": CLIPTextModelWithProjection}
        found = {suffix: kind for suffix, kind in kinds.items() if not suffix or (folder / f"text_encoder{suffix}").is_dir()}
        return cls(
            [
                (
                    CLIPTokenizer.from_pretrained(folder / f"tokenizer{suffix}"),
                    _load(kind, folder / f"text_encoder{suffix}", settings),
                )
                for suffix, kind in found.items()
            ]
        )

    def check(self, prompt: str) -> None:
        """Raises InvalidRequest(field="prompt") when it is empty or longer than the model reads."""
        if not prompt.strip():
            raise InvalidRequest("prompt", prompt, "some text")
        for tokenizer, _ in self.encoders:
            limit, count = tokenizer.model_max_length, len(tokenizer(prompt)["input_ids"])
            if count > limit:
                raise InvalidRequest("prompt", prompt, f"at most {limit} tokens with start and end; this has {count}")

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Prompts:
        """The last hidden states of one encoder; of two, as SDXL was trained, the last but one of both side by side, and the second's
        projection of the whole prompt (arXiv:2307.01952, section 2.1)."""
        if len(self.encoders) == 1:
            return Prompts(self._run(0, prompts).last_hidden_state.float().numpy())
        outputs = [self._run(i, prompts, output_hidden_states=True) for i in range(len(self.encoders))]
        text_BLD = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Prompts(text_BLD.float().numpy(), outputs[-1].text_embeds.float().numpy())

    def _run(self, index: int, prompts: list[str], **options: bool) -> Any:
        tokenizer, network = self.encoders[index]
        length = tokenizer.model_max_length
        tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        return network(tokens["input_ids"], **options)


class UNet:
    """One evaluation of the student, from unit noise to x0."""

    def __init__(self, network: Any, manifest: bundle.Manifest) -> None:
        self.network, self.constants = network, manifest.one_step
        self.latent_shape = manifest.latent_shape
        self.text_shape = (manifest.max_prompt_tokens, manifest.text_width)
        self.pooled_width = manifest.pooled_width
        self.image_size = manifest.image_size

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> UNet:
        import diffusers  # here: the text encoder's process starts without it

        network = _load(diffusers.UNet2DConditionModel, folder / "unet", settings)
        return cls(network, bundle.facts(folder))

    @torch.inference_mode()
    def denoise(self, noise_BCHW: Array, prompts: Prompts) -> Array:
        """x0 = a noise + b unet(c noise), combined in float32; returns float32 latents of the noise's shape."""
        noise = _tensor(noise_BCHW)
        scaled = (noise * self.constants.input_scale).contiguous(memory_format=torch.channels_last)
        added = self._added(prompts)
        text = _tensor(prompts.text_BLD)
        output = self.network(scaled, self.constants.timestep, text, added_cond_kwargs=added, return_dict=False)[0].float()
        latent = self.constants.latent_coefficient * noise + self.constants.output_coefficient * output
        combined: Array = latent.contiguous().numpy()
        return combined

    def _added(self, prompts: Prompts) -> dict[str, torch.Tensor] | None:
        """SDXL's conditioning beside the text: pooled embeddings, and sizes that say an uncropped image of the model's own."""
        if prompts.pooled_BD is None:
            return None
        size = float(self.image_size)
        time_ids_B6 = torch.tensor([[size, size, 0.0, 0.0, size, size]]).repeat(len(prompts.pooled_BD), 1)
        return {"text_embeds": _tensor(prompts.pooled_BD), "time_ids": time_ids_B6}


def _tensor(array: Array) -> torch.Tensor:
    """float32, contiguous; the array's own memory where it is so already."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


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
        latent = _tensor(latent_BCHW) / self.network.config.scaling_factor
        image = self.network.decode(latent.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        image_BHWC: Array = (image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).contiguous().numpy()
        return image_BHWC

    def decode(self, latent_BCHW: Array) -> Array:
        """uint8 images, shape (B, H, W, 3), scaled and rounded as diffusers' image processor does."""
        return np.rint(self.paint(latent_BCHW) * np.float32(255)).astype(np.uint8)
