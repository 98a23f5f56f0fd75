"""Image files: exact formats are exact, lossy ones near, receipts survive."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sdxs import images
from sdxs.errors import InvalidRequest


@pytest.fixture
def picture() -> np.ndarray:
    """A smooth picture with an edge."""
    y, x = np.mgrid[0:64, 0:64]
    return np.stack([x * 4, y * 4, np.where(x + y > 64, 255, 0)], axis=-1).astype(np.uint8)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_png_and_raw_are_exact(picture: np.ndarray) -> None:
    np.testing.assert_array_equal(pixels(images.encode(picture, images.PNG, "{}")), picture)
    raw = images.encode(picture[:, ::-1], images.RAW)  # not contiguous
    np.testing.assert_array_equal(np.frombuffer(raw, np.uint8).reshape(64, 64, 3), picture[:, ::-1])


@pytest.mark.parametrize(("kind", "decibels"), [(images.JPEG, 35), (images.WEBP, 27)])  # WebP halves the colour resolution
def test_lossy_formats_are_near(picture: np.ndarray, kind: int, decibels: float) -> None:
    error = pixels(images.encode(picture, kind)).astype(float) - picture
    assert 10 * np.log10(255**2 / np.mean(error**2)) > decibels


@pytest.mark.parametrize("kind", [images.PNG, images.JPEG, images.WEBP])
@pytest.mark.parametrize("prompt", ["red apple", "brændende ild 🔥", 'a "quoted" \\ word', "\u0000\n"])
def test_receipts_survive(picture: np.ndarray, kind: int, prompt: str) -> None:
    receipt = images.receipt(prompt, 2**64 - 1, "emoji", "sha256:1")
    found = json.loads(images.receipt_text(images.encode(picture, kind, receipt)))
    assert found == {"prompt": prompt, "seed": 2**64 - 1, "model": "emoji", "digest": "sha256:1"}


def test_same_pixels_same_bytes(picture: np.ndarray) -> None:
    for kind in images.NAMES.values():
        assert images.encode(picture, kind, "x") == images.encode(picture.copy(), kind, "x")


def test_no_receipt(picture: np.ndarray) -> None:
    for kind in (images.PNG, images.JPEG, images.WEBP):
        assert images.receipt_text(images.encode(picture, kind)) == ""


@pytest.mark.parametrize(("kind", "ending", "media"), [(images.JPEG, "jpg", "image/jpeg"), (images.PNG, "png", "image/png")])
def test_names(kind: int, ending: str, media: str) -> None:
    assert (images.extension(kind), images.media_type(kind)) == (ending, media)


@pytest.mark.parametrize("kind", [0, 99])
def test_unknown_formats(picture: np.ndarray, kind: int) -> None:
    with pytest.raises(InvalidRequest, match="format"):
        images.encode(picture, kind)
    with pytest.raises(InvalidRequest, match="format"):
        images.extension(kind)
