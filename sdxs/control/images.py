"""Image files of strangers as RGB pixels: read from the header first, so that nothing large or odd is ever decoded."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
from PIL import ImageOps

from sdxs.errors import InvalidRequest

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_BYTES = 20 << 20
MAX_PIXELS = 40_000_000
_ALLOWED = "a PNG, JPEG or WebP file"


def read_image(data: bytes, field: str = "image") -> np.ndarray:
    """uint8 (H, W, 3), RGB, upright. Grey, palette, CMYK and 16-bit images are converted, transparency becomes white.

    Raises:
        InvalidRequest: no bytes, not an image, broken, animated, or too large; names `field`.
    """
    if not data:
        raise InvalidRequest(field, "0 bytes", _ALLOWED)
    if len(data) > MAX_BYTES:
        raise InvalidRequest(field, f"{len(data)} bytes", f"at most {MAX_BYTES} bytes")
    try:
        with PIL.Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check(image, field)
            return np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except InvalidRequest:
        raise
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise InvalidRequest(field, "an image of over 89 megapixels", f"at most {MAX_PIXELS // 1_000_000} megapixels") from None
    except PIL.UnidentifiedImageError:
        raise InvalidRequest(field, f"{len(data)} bytes that are no such image", _ALLOWED) from None
    except Exception as error:  # Pillow's readers raise all kinds, struct.error among them
        raise InvalidRequest(field, f"a broken image ({error})", _ALLOWED) from None


def _check(image: PIL.Image.Image, field: str) -> None:
    """What the header says, before a pixel is decoded."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InvalidRequest(field, f"{width}x{height} pixels", f"at most {MAX_PIXELS // 1_000_000} megapixels")
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a photograph whose further frames are previews or depth
        raise InvalidRequest(field, f"an animation of {frames} frames", f"{_ALLOWED} of one frame")


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I"):  # 16 bits of grey
        image = PIL.Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resized as diffusers resizes control images (VaeImageProcessor): Lanczos, both sides at once, nothing cut off. uint8."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    resized = PIL.Image.fromarray(image_HWC).resize((width, height), resample=PIL.Image.Resampling.LANCZOS)
    return np.asarray(resized)
