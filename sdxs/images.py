"""Pixels to files and back. JPEG is what an interactive caller wants (1 ms at 512x512), PNG and raw are exact."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from PIL import Image, PngImagePlugin

from sdxs.control import Control
from sdxs.errors import InvalidRequest
from sdxs.sizes import Size
from sdxs.v1 import control_pb2, decoder_pb2

JPEG, PNG, WEBP, RAW = (
    decoder_pb2.IMAGE_FORMAT_JPEG, decoder_pb2.IMAGE_FORMAT_PNG, decoder_pb2.IMAGE_FORMAT_WEBP, decoder_pb2.IMAGE_FORMAT_RAW,
)  # fmt: skip
NAMES = {"jpeg": JPEG, "png": PNG, "webp": WEBP, "raw": RAW}
_TYPES = {
    JPEG: ("jpg", "image/jpeg"),
    PNG: ("png", "image/png"),
    WEBP: ("webp", "image/webp"),
    RAW: ("raw", "application/octet-stream"),
}
_EXIF_DESCRIPTION = 0x010E
_RECEIPT = "sdxs"


def _known(image_format: int) -> int:
    if image_format not in _TYPES:
        raise InvalidRequest("format", image_format, ", ".join(NAMES))
    return image_format


def extension(image_format: int) -> str:
    """File name ending, without the dot."""
    return _TYPES[_known(image_format)][0]  # type: ignore[index]


def media_type(image_format: int) -> str:
    """MIME type."""
    return _TYPES[_known(image_format)][1]  # type: ignore[index]


def encode(image_HWC: np.ndarray, image_format: int, receipt: str = "") -> bytes:
    """A file of one uint8 RGB image; `receipt` (a JSON text saying how it was made) is embedded where the format has room.

    Raw is the pixels themselves, row by row, three bytes each. Raises InvalidRequest(field="format").
    """
    if _known(image_format) == RAW:
        return np.ascontiguousarray(image_HWC).tobytes()
    image, buffer = Image.fromarray(image_HWC), io.BytesIO()
    if image_format == PNG:
        info = PngImagePlugin.PngInfo()
        if receipt:
            info.add_itxt(_RECEIPT, receipt)
        image.save(buffer, "PNG", pnginfo=info, compress_level=3)
        return buffer.getvalue()
    exif = Image.Exif()
    if receipt:
        exif[_EXIF_DESCRIPTION] = receipt.encode("unicode_escape").decode("ascii")
    if image_format == JPEG:
        image.save(buffer, "JPEG", quality=92, subsampling=0, exif=exif)
    else:
        image.save(buffer, "WEBP", quality=92, method=0, exif=exif)
    return buffer.getvalue()


def receipt_text(data: bytes) -> str:
    """The receipt embedded in a PNG, JPEG or WebP file; empty if there is none."""
    with Image.open(io.BytesIO(data)) as image:
        text = image.info.get(_RECEIPT)
        if text is None:
            text = image.getexif().get(_EXIF_DESCRIPTION, "").encode("ascii", "ignore").decode("unicode_escape")
    return str(text)


def receipt(prompt: str, seed: int, model: str, digest: str, steering: Mapping[str, Any] | None = None) -> str:
    """What an image follows from, as the JSON text its file carries; the same in process and served.

    Args:
        steering: see there.
    """
    return json.dumps({"prompt": prompt, "seed": seed, "model": model, "digest": digest, **(steering or {})})


def sized(size: Size, own: Size) -> dict[str, Any]:
    """A receipt's part on the image's size; empty for the model's own."""
    return {} if size == own else size._asdict()


def steering(controls: Iterable[Control | control_pb2.Control], init_image: bytes, strength: float) -> dict[str, Any]:
    """A receipt's part on images that steered; empty without any.

    Args:
        controls: each with the name of its ControlNet.
    """
    facts: dict[str, Any] = {}
    if applied := [_applied(control) for control in controls]:
        facts["controls"] = applied
    if init_image:
        facts |= {"init_image_sha256": hashlib.sha256(init_image).hexdigest(), "strength": _decimal(strength)}
    return facts


def styles(loras: Iterable[Any]) -> dict[str, Any]:
    """A receipt's part on LoRAs; empty without any.

    Args:
        loras: each with its name, digest and scale.
    """
    found = [{"name": lora.name, "digest": lora.digest, "scale": _decimal(lora.scale)} for lora in loras]
    return {"loras": found} if found else {}


def _applied(control: Control | control_pb2.Control) -> dict[str, Any]:
    """What was asked for, and the digest of the file as it came."""
    flags = {name: True for name in ("guess", "preprocessed") if getattr(control, name)}
    return {
        "type": control.type,
        "controlnet": control.controlnet,
        "scale": _decimal(control.scale),
        **flags,
        "image_sha256": hashlib.sha256(control.image).hexdigest(),
    }


def _decimal(value: float) -> float:
    """As its caller wrote it: float32 makes 0.800000011920929 of 0.8 on the wire."""
    return float(f"{value:.6g}")
