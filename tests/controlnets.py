"""Small random ControlNets in the real format, and the image files that strangers send to them."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch
from diffusers import AutoencoderTiny, UNet2DConditionModel

from sdxs.bundle import CONTROL_TYPES, seal
from sdxs.controlnet import StudentControlNetModel, config_for
from tests.models import tiny_folder

TYPES = {"lines": ("edge", "sketch"), "paint": ("colour",)}


def add_controlnets(folder: Path, types: Mapping[str, Sequence[str]], upsampling: int = 8, seed: int = 3) -> Path:
    """Random ControlNets for a folder's U-Net, one of each name. No convolution is zero, as some of a new one's are: they steer."""
    torch.manual_seed(seed)
    config = UNet2DConditionModel.load_config(folder / "unet")
    for name, known in types.items():
        network = StudentControlNetModel(**config_for(config, upsampling))
        for convolution in network.controlnet_down_blocks:
            torch.nn.init.normal_(convolution.weight, std=0.5)
        for layer in network.controlnet_cond_embedding.modules():
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight)
                layer.bias = torch.nn.Parameter(torch.zeros(layer.out_channels))
        network.save_pretrained(folder / "controlnet" / name)
        (folder / "controlnet" / name / CONTROL_TYPES).write_text(json.dumps(list(known)))
    return folder


def control_folder(folder: Path) -> Path:
    """A sealed bundle `tiny` of 32x32 images with the ControlNets of TYPES."""
    seal(add_controlnets(_vivid(tiny_folder(folder)), TYPES), "tiny")
    return folder


def _vivid(folder: Path) -> Path:
    """With a decoder of strong contrast: what steers the latent a little is seen in the image."""
    network = AutoencoderTiny.from_pretrained(folder / "vae")
    last = network.decoder.layers[-1]
    last.weight.data *= 12 / last.weight.data.std() / last.weight.shape[1] ** 0.5
    network.save_pretrained(folder / "vae")
    return folder


def drawing(size: tuple[int, int] = (32, 32), file_format: str = "PNG", mode: str = "RGB", shift: int = 0) -> bytes:
    """A circle and a stroke on white paper, (width, height), as a file."""
    image = PIL.Image.new("RGB", size, "white")
    draw, (width, height) = PIL.ImageDraw.Draw(image), size
    pen = max(1, min(size) // 12)
    draw.ellipse((width // 6, height // 6, width // 2, height // 2), outline="red", width=pen)
    draw.line((0, height - 1 - shift, width - 1, height // 3 + shift), fill="navy", width=pen)
    return encoded(image.convert(mode), file_format)


def encoded(image: PIL.Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def animation(file_format: str) -> bytes:
    """Two frames: GIF, WEBP, or PNG (an APNG)."""
    frames = [PIL.Image.fromarray(np.full((32, 32, 3), level, np.uint8)) for level in (0, 255)]
    return encoded(frames[0], file_format, save_all=True, append_images=frames[1:], duration=100)


def sixteen_bit() -> bytes:
    """A PNG of 16-bit grey."""
    return encoded(PIL.Image.fromarray(np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64))


def huge_header(width: int = 20_000, height: int = 10_000) -> bytes:
    """A PNG that says it has 200 megapixels and holds next to none."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
