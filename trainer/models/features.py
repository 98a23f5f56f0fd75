"""Feature encoders, f^l of eq. 10: the diffusion U-Net's own encoder on latents, VGG16 or DINOv2 on decoded images.

All are frozen; gradients pass through them to the latent.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from sdxs.errors import InvalidRequest
from trainer.models.conditioning import Conditioning
from trainer.sources import load_frozen

Decode = Callable[[Tensor], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class FeatureEncoder(nn.Module):
    """`channels` are the widths of its maps, in their order."""

    channels: list[int]

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        """Feature maps, each (B, C_l, H_l, W_l)."""
        raise NotImplementedError


class UNetEncoder(FeatureEncoder):
    """The latent itself, then the output of each down block of the teacher's U-Net at t = 0. Works on latents: nothing is decoded."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        unet.up_blocks, unet.mid_block = nn.ModuleList(), None
        self.unet = unet.to(memory_format=torch.channels_last)
        self.channels = [unet.config["in_channels"], *unet.config["block_out_channels"]]

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        unet, arguments = self.unet, conditioning.arguments()
        text_BLD = arguments["encoder_hidden_states"]
        t_B = torch.zeros(len(latent_BCHW), dtype=torch.long, device=latent_BCHW.device)
        emb = unet.time_embedding(unet.get_time_embed(latent_BCHW, t_B))
        added = unet.get_aug_embed(emb, text_BLD, arguments.get("added_cond_kwargs", {}))
        emb = emb if added is None else emb + added
        hidden_BCHW = unet.conv_in(latent_BCHW.contiguous(memory_format=torch.channels_last))
        features = [latent_BCHW]
        for block in unet.down_blocks:
            extra = {"encoder_hidden_states": text_BLD} if getattr(block, "has_cross_attention", False) else {}
            hidden_BCHW, _ = block(hidden_states=hidden_BCHW, temb=emb, **extra)
            features.append(hidden_BCHW)
        return features


class ImageEncoder(FeatureEncoder):
    """Decodes latents, resizes the images and normalises them by ImageNet's mean and deviation."""

    def __init__(self, decode: Decode, multiple: int, smallest: int) -> None:
        super().__init__()
        self.decode, self.multiple, self.smallest = decode, multiple, smallest
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))

    def pixels(self, latent_BCHW: Tensor) -> Tensor:
        """Images as the network was trained on them, in float32. The shorter side becomes at least `smallest`, both a multiple of the
        patch; otherwise the images keep their size, for the texture that a smaller one has lost."""
        image_BCHW = self.decode(latent_BCHW).float()
        height, width = image_BCHW.shape[-2:]
        scale = max(1.0, self.smallest / min(height, width))
        size = tuple(int(scale * side + 0.5) // self.multiple * self.multiple for side in (height, width))
        if size != (height, width):
            image_BCHW = F.interpolate(image_BCHW, size=size, mode="bilinear", antialias=True)
        return (image_BCHW / 2 + 0.5 - self.get_buffer("mean")) / self.get_buffer("std")


class VGGEncoder(ImageEncoder):
    """VGG16 (arXiv:1409.1556): the last activation before each pooling, relu1_2, 2_2, 3_3, 4_3 and 5_3.

    The thirteen convolutions are written out: torchvision, which has them, is not a dependency. Weights are by torchvision's names,
    `features.<n>.weight`, which timm's hub files share.
    """

    widths = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512)  # 0: pooling

    def __init__(self, decode: Decode) -> None:
        super().__init__(decode, multiple=1, smallest=64)  # five levels: a map of 4x4 is the smallest that has any structure
        layers: list[nn.Module] = []
        previous = 3
        for width in self.widths:
            layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()] if width else [nn.MaxPool2d(2)]
            previous = width or previous
        self.features = nn.Sequential(*layers)
        self.channels = [64, 128, 256, 512, 512]

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        found, hidden_BCHW = [], self.pixels(latent_BCHW)
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                found.append(hidden_BCHW)
            hidden_BCHW = layer(hidden_BCHW)
        return [*found, hidden_BCHW]

    @classmethod
    def load(cls, source: str, decode: Decode) -> VGGEncoder:
        """From a file, a folder with one, or a hub id. Raises InvalidRequest when it is not VGG16."""
        cls.check(source)
        encoder = cls(decode)
        state = _weights(source)
        encoder.features.load_state_dict({name: state[f"features.{name}"] for name in encoder.features.state_dict()})
        return encoder

    @classmethod
    def check(cls, source: str) -> None:
        """Raises InvalidRequest when it is not VGG16; reads names and shapes only."""
        with torch.device("meta"):
            wanted = {f"features.{n}": v.shape for n, v in cls(lambda latent: latent).features.state_dict().items()}
        found = {name: shape for name, shape in _shapes(source).items() if name.startswith("features.")}
        if found != wanted:
            names = "VGG16 by torchvision's names (features.0.weight ... features.28.bias)"
            raise InvalidRequest("encoder_source", source, names)


class DinoV2Encoder(ImageEncoder):
    """DINOv2 (arXiv:2304.07193): the patch tokens after each quarter of the layers as maps, class and register tokens left out."""

    def __init__(self, network: Any, decode: Decode) -> None:
        patch = network.config.patch_size
        super().__init__(decode, multiple=patch, smallest=7 * patch)  # 98 pixels: the smallest crops it was trained on
        self.network, depth = network, network.config.num_hidden_layers
        self.layers = sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
        self.channels = [network.config.hidden_size] * len(self.layers)

    def forward(self, latent_BCHW: Tensor, conditioning: Conditioning) -> list[Tensor]:
        image_BCHW = self.pixels(latent_BCHW)
        height, width = (side // self.multiple for side in image_BCHW.shape[-2:])
        states = self.network(image_BCHW, output_hidden_states=True).hidden_states
        tokens = [states[layer][:, -height * width :] for layer in self.layers]
        return [token_BLC.transpose(1, 2).unflatten(2, (height, width)) for token_BLC in tokens]

    @classmethod
    def load(cls, source: str, decode: Decode) -> DinoV2Encoder:
        """From a folder or hub id. Raises InvalidRequest when it is neither, or another network."""
        from transformers import AutoModel

        cls.check(source)
        with _refusing(source, "a folder or hub id with DINOv2's weights"):
            network, told = AutoModel.from_pretrained(source, torch_dtype=torch.float32, output_loading_info=True)
        if told["missing_keys"]:
            missing = min(told["missing_keys"])
            raise InvalidRequest("encoder_source", source, f"all of DINOv2's weights; {missing} is missing")
        return cls(network, decode)

    @classmethod
    def check(cls, source: str) -> None:
        """Raises InvalidRequest when it is not DINOv2; reads the configuration only."""
        from transformers import AutoConfig

        with _refusing(source, "a folder or hub id of DINOv2"):
            kind = AutoConfig.from_pretrained(source).model_type
        if not kind.startswith("dinov2"):
            raise InvalidRequest("encoder_source", source, f"DINOv2, not {kind}")


@contextmanager
def _refusing(source: str, allowed: str) -> Iterator[None]:
    """What libraries raise of files they cannot read becomes InvalidRequest."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InvalidRequest("encoder_source", source, f"{allowed} ({reason})") from error


def _shapes(source: str) -> dict[str, torch.Size]:
    """Names and shapes of the weights in a file, without the weights."""
    path = _file(source)
    with _refusing(source, "a .safetensors file, or a state dict saved by torch"):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return {name: torch.Size(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        state = torch.load(path, map_location="meta", weights_only=True)
    named = state.items() if isinstance(state, dict) else ()
    return {name: value.shape for name, value in named if isinstance(value, Tensor)}


def _weights(source: str) -> dict[str, Tensor]:
    path = _file(source)
    if path.suffix == ".safetensors":
        return load_file(path)
    state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def _file(source: str) -> Path:
    """A .safetensors or .pth file, the only one of a folder or its `model.safetensors`, or that of a hub repository."""
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        return _from_hub(source)
    found = [*path.glob("*.safetensors"), *path.glob("*.pth")]
    if path / "model.safetensors" in found:
        return path / "model.safetensors"
    if len(found) != 1:
        raise InvalidRequest("encoder_source", source, "a folder with model.safetensors, or one .safetensors or .pth file")
    return found[0]


def _from_hub(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    with _refusing(source, "a file, a folder, or a hub id that can be reached"):
        return Path(hf_hub_download(source, "model.safetensors"))


def check_encoder(kind: str, source: str | None) -> None:
    """Refuse a recipe's encoder before anything is loaded; an image encoder on the hub is downloaded in part or whole.

    Raises:
        InvalidRequest: the source is not what `kind` says.
    """
    if kind != "unet":
        assert source is not None
        (VGGEncoder if kind == "vgg" else DinoV2Encoder).check(source)


def load_encoder(
    kind: str, source: str | None, unet_folder: Path, decode: Decode | None, device: torch.device | str = "cpu"
) -> FeatureEncoder:
    """The frozen encoder of a recipe on a device.

    Args:
        kind: "unet", "vgg" or "dinov2".
        source: where an image encoder's weights are.
        unet_folder: the teacher's.
        decode: latents to images in [-1, 1], for image encoders.

    Raises:
        InvalidRequest: the source is not what `kind` says.
    """
    encoder: FeatureEncoder
    if kind == "unet":
        encoder = UNetEncoder(load_frozen(UNet2DConditionModel, unet_folder))
    else:
        assert source is not None
        assert decode is not None
        encoder = (VGGEncoder if kind == "vgg" else DinoV2Encoder).load(source, decode)
    return encoder.eval().requires_grad_(False).to(device)
