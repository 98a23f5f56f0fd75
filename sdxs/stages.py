"""The three networks of a bundle, one class each: what a replica hosts and the in-process pipeline composes. Imports torch.

Arrays go in and come out: B images, C latent channels, H x W elements or pixels, L tokens of D numbers.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sdxs import bundle, control, weights
from sdxs.control import Control
from sdxs.errors import CorruptArtifact, InvalidRequest, PreconditionFailed
from sdxs.image_to_image import Entry, Init, Levels, enter, no_levels
from sdxs.lora.adapters import Adapters
from sdxs.prompts import Prompts
from sdxs.residuals import Residuals
from sdxs.settings import Settings

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

Array = np.ndarray


def place(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """Where networks compute, and in what. Raises InvalidRequest for a GPU that is not there."""
    device = torch.device(settings.torch_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidRequest("SDXS_TORCH_DEVICE", settings.torch_device, f"cpu, or one of {torch.cuda.device_count()} GPUs")
    default = "float32" if device.type == "cpu" else "float16"
    dtype: torch.dtype = getattr(torch, settings.torch_dtype or default)
    return device, dtype


def _load(kind: Any, folder: Path, settings: Settings, unused: tuple[str, ...] = ()) -> Any:
    """A network for inference, weights laid out channels last, without its parts `unused`.

    Raises:
        CorruptArtifact: the weights cannot be read, or one is missing, but for those beginning with `unused`.
        InvalidRequest: the settings name a GPU that is not there.
    """
    torch.set_num_threads(settings.torch_threads)
    device, dtype = place(settings)
    if kind.__name__ == "AutoencoderKL":  # overflows in float16 (SDXL's config says so itself), and is not what speed is about
        dtype = torch.float32
    network = weights.load(kind, folder, dtype, unused)
    for part in unused:  # it may have no weights, and would take room on a GPU
        if hasattr(network, part.rstrip(".")):
            setattr(network, part.rstrip("."), None)
    return network.to(device, memory_format=torch.channels_last)


class TextEncoder:
    """Prompts to what conditions the U-Net: one CLIP text encoder (SD 1.x, 2.x), or two side by side (SDXL)."""

    def __init__(self, encoders: Sequence[tuple[CLIPTokenizer, Any]]) -> None:
        self._tokenizers = [tokenizer for tokenizer, _ in encoders]
        self.adapters = Adapters({f"text_encoder{'_2' * i}": network for i, (_, network) in enumerate(encoders)})
        self._tokenizing = threading.Lock()
        """How a tokenizer pads is kept in the tokenizer, whoever calls it next."""

    @property
    def encoders(self) -> list[tuple[CLIPTokenizer, Any]]:
        """With the LoRAs that are attached."""
        return list(zip(self._tokenizers, self.adapters.networks.values(), strict=True))

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
            limit = tokenizer.model_max_length
            with self._tokenizing:
                count = len(tokenizer(prompt)["input_ids"])
            if count > limit:
                raise InvalidRequest("prompt", prompt, f"at most {limit} tokens with start and end; this has {count}")

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Prompts:
        """The last hidden states of one encoder; of two, as SDXL was trained, the last but one of both side by side, and the second's
        projection of the whole prompt (arXiv:2307.01952, section 2.1)."""
        if len(self.encoders) == 1:
            return Prompts(_array(self._run(0, prompts).last_hidden_state))
        outputs = [self._run(i, prompts, output_hidden_states=True) for i in range(len(self.encoders))]
        text_BLD = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return Prompts(_array(text_BLD), _array(outputs[-1].text_embeds))

    def _run(self, index: int, prompts: list[str], **options: bool) -> Any:
        tokenizer, network = self.encoders[index]
        length = tokenizer.model_max_length
        with self._tokenizing:
            tokens = tokenizer(prompts, padding="max_length", max_length=length, return_tensors="pt")
        return network(tokens["input_ids"].to(network.device), **options)


class UNet:
    """One evaluation of the student, from unit noise to x0."""

    def __init__(self, network: Any, manifest: bundle.Manifest, levels: Callable[[], Levels] = no_levels) -> None:
        self.constants, self.levels = manifest.one_step, functools.cache(levels)
        self.adapters = Adapters({"unet": network})
        self.latent_shape = manifest.latent_shape
        self.text_shape = (manifest.max_prompt_tokens, manifest.text_width)
        self.pooled_width = manifest.pooled_width
        self.upsampling = manifest.upsampling

    @property
    def network(self) -> Any:
        """With the LoRAs that are attached."""
        return self.adapters.networks["unet"]

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> UNet:
        import diffusers  # here: the text encoder's process starts without it

        network = _load(diffusers.UNet2DConditionModel, folder / "unet", settings)
        return cls(network, bundle.facts(folder), functools.partial(Levels.of_folder, folder))

    @torch.inference_mode()
    def denoise(
        self, noise_BCHW: Array, prompts: Prompts, residuals: Residuals | None = None, inits: Sequence[Init | None] = ()
    ) -> Array:
        """x0 = a noise + b unet(c noise), combined in float32; returns float32 latents of the noise's shape.

        Args:
            residuals: what ControlNets add, computed from the same noise, prompts and init images.
            inits: for each image the one it starts from, if any; none at all: none does.
        """
        entry, device = enter(noise_BCHW, self.constants, self.levels, inits), self.network.device
        told = {
            "added_cond_kwargs": _added(prompts, noise_BCHW, self.upsampling, self.network),
            **_additional(residuals, self.network),
        }
        text_BLD = _given(prompts.text_BLD, self.network)
        output = self.network(*_entering(entry, self.network), text_BLD, return_dict=False, **told)[0].float()
        return _array(_factor(entry.a, device) * _tensor(entry.base_BCHW).to(device) + _factor(entry.b, device) * output)


def _entering(entry: Entry, network: Any) -> tuple[torch.Tensor, int | torch.Tensor]:
    """Input and timestep of a network."""
    timestep = entry.timestep if isinstance(entry.timestep, int) else torch.from_numpy(entry.timestep).to(network.device)
    return _given(entry.input_BCHW, network).contiguous(memory_format=torch.channels_last), timestep


def _factor(value: float | Array, device: torch.device) -> float | torch.Tensor:
    return _tensor(value).to(device) if isinstance(value, np.ndarray) else value


def _added(prompts: Prompts, noise_BCHW: Array, upsampling: int, network: Any) -> dict[str, torch.Tensor] | None:
    """SDXL's conditioning beside the text: pooled embeddings, and sizes that say an uncropped image of just this size."""
    if prompts.pooled_BD is None:
        return None
    size = [float(upsampling * side) for side in noise_BCHW.shape[2:]]
    time_ids_B6 = torch.tensor([[*size, 0.0, 0.0, *size]], device=network.device).repeat(len(prompts.pooled_BD), 1)
    return {"text_embeds": _given(prompts.pooled_BD, network), "time_ids": time_ids_B6}


def _additional(residuals: Residuals | None, network: Any) -> dict[str, Any]:
    """Residuals as the U-Net's keyword arguments. Without a mid stage it adds the mid residual all the same, behind its deepest block."""
    if residuals is None:
        return {}
    *down, mid = (_given(part, network) for part in residuals.parts)
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}


class ControlNets:
    """All ControlNets of a bundle: what their maps add to the U-Net."""

    def __init__(self, networks: dict[str, Any], manifest: bundle.Manifest, levels: Callable[[], Levels] = no_levels) -> None:
        self.networks, self.names, self.levels = networks, manifest.controlnets, functools.cache(levels)
        self.constants, self.upsampling = manifest.one_step, manifest.upsampling

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> ControlNets:
        """Those of a bundle's folder. Raises CorruptArtifact."""
        from sdxs import controlnet

        torch.set_num_threads(settings.torch_threads)
        device, dtype = place(settings)
        networks = {
            name: controlnet.load(found, dtype).to(device, memory_format=torch.channels_last)
            for name, found in bundle.controlnet_folders(folder).items()
        }
        return cls(networks, bundle.facts(folder), functools.partial(Levels.of_folder, folder))

    def pick(self, asked: Control, field: str) -> str:
        """Name of the ControlNet that a control asks for. Raises InvalidRequest; see `sdxs.control.pick`."""
        return control.pick(self.names, asked.type, asked.controlnet, field)

    def weights(self, asked: Control) -> Array:
        """How strongly each residual counts, shape (R,): the scale; in guess mode times diffusers' 0.1 to 1, but for residuals that are
        means of their maps. Raises as `pick`."""
        network = self.networks[self.pick(asked, "control")]
        count, guess = len(network.controlnet_down_blocks) + 1, asked.guess and not network.config.global_pool_conditions
        ladder = torch.logspace(-1, 0, count).numpy() if guess else np.ones(count, np.float32)
        weights: Array = (ladder * np.float32(asked.scale)).astype(np.float32)
        return weights

    def residuals(self, *arguments: Any) -> Residuals:
        """What one ControlNet adds for a batch, in the host's memory; arguments as of `device_residuals`."""
        return self.device_residuals(*arguments).host()

    @torch.inference_mode()
    def device_residuals(
        self,
        noise_BCHW: Array,
        prompts: Prompts,
        maps_BHWC: Array,
        name: str,
        weights_BR: Array,
        inits: Sequence[Init | None] = (),
    ) -> Residuals:
        """What one ControlNet adds for a batch, float32, on its device, where it may still be being computed: see `finish`.

        Args:
            noise_BCHW: where the U-Net starts, unit noise.
            maps_BHWC: uint8, of the images' size.
            weights_BR: of each image and residual.
            inits: as the U-Net's.
        """
        entry, network = enter(noise_BCHW, self.constants, self.levels, inits), self.networks[name]
        maps_BCHW = (_pixels(maps_BHWC, network) / 255).to(network.dtype).contiguous(memory_format=torch.channels_last)
        down, mid = network(
            *_entering(entry, network), _given(prompts.text_BLD, network), controlnet_cond=maps_BCHW,
            added_cond_kwargs=_added(prompts, noise_BCHW, self.upsampling, network), return_dict=False,
        )  # fmt: skip
        found = Residuals(tuple(part.float().contiguous() for part in (*down, mid)))
        return found.weighted(weights_BR)

    def finish(self) -> None:
        """Wait until what this thread has asked for is computed."""
        for device in {network.device for network in self.networks.values()}:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()


def _tensor(array: Array) -> torch.Tensor:
    """float32, contiguous; the array's own memory where it is so already."""
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))


def _given(array: Array | torch.Tensor, network: Any) -> torch.Tensor:
    """As a network takes it: on its device, in its type."""
    tensor = array if isinstance(array, torch.Tensor) else _tensor(array)
    return tensor.to(network.device, network.dtype)


def _array(tensor: torch.Tensor) -> Array:
    """float32, contiguous, in the process's memory."""
    found: Array = tensor.float().contiguous().cpu().numpy()
    return found


def _pixels(image_BHWC: Array, network: Any) -> torch.Tensor:
    """float32 (B, 3, H, W), 0 to 255, of uint8, on a network's device; copied, because what is read from a file or a message is often
    read-only."""
    return torch.from_numpy(np.array(image_BHWC)).to(network.device).permute(0, 3, 1, 2).float()


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
        latent = _given(latent_BCHW, self.network) / self.network.config.scaling_factor
        image = self.network.decode(latent.contiguous(memory_format=torch.channels_last), return_dict=False)[0]
        return _array((image.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))

    def decode(self, latent_BCHW: Array) -> Array:
        """uint8 images, shape (B, H, W, 3), scaled and rounded as diffusers' image processor does."""
        return np.rint(self.paint(latent_BCHW) * np.float32(255)).astype(np.uint8)


class Encoder:
    """Pixels to latents, for image to image: the other half of the decoder's network."""

    def __init__(self, network: Any) -> None:
        self.network = network

    @classmethod
    def from_bundle(cls, folder: Path, settings: Settings) -> Encoder:
        """Raises PreconditionFailed for a bundle whose autoencoder has no encoder's weights."""
        import diffusers

        kind = bundle.read_config(folder, "vae/config.json")["_class_name"]
        if kind not in ("AutoencoderTiny", "AutoencoderKL"):
            raise InvalidRequest("vae", kind, "AutoencoderTiny or AutoencoderKL")
        try:
            return cls(_load(getattr(diffusers, kind), folder / "vae", settings, ("decoder.", "post_quant_conv.")))
        except CorruptArtifact as error:
            raise PreconditionFailed(f"image to image: this model has no image encoder ({error})") from error

    @torch.inference_mode()
    def encode(self, image_BHWC: Array) -> Array:
        """float32 latents, in the U-Net's scale, of uint8 images; the mean where the encoder gives a distribution."""
        image_BCHW = (_pixels(image_BHWC, self.network) / 127.5 - 1).to(self.network.dtype)
        found = self.network.encode(image_BCHW.contiguous(memory_format=torch.channels_last))
        latent = found.latents if hasattr(found, "latents") else found.latent_dist.mean
        return _array(latent.float() * self.network.config.scaling_factor)
