"""Image files of strangers: every kind becomes the right pixels, or is refused by a name of the field."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import sdxs
from sdxs.control import fit, read_image
from sdxs.errors import InvalidRequest

FIELD = "controls[2].image"
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 16, 3), dtype=np.uint8)
PICTURE = PIL.Image.fromarray(PIXELS)


def saved(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def frames(kind: str) -> bytes:
    return saved(PICTURE, kind, save_all=True, append_images=[PICTURE.rotate(180)])


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds next to nothing."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(1000))),
        (b"IEND", b""),
    ]
    parts = (struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_header(width: int, height: int) -> bytes:
    """A small JPEG whose frame header says another size."""
    data = bytearray(saved(PICTURE, "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp_header(width: int, height: int) -> bytes:
    """A small lossless WebP whose header says another size."""
    data = bytearray(saved(PICTURE, "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    [bits] = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, bits >> 28 << 28 | height - 1 << 14 | width - 1)
    return bytes(data)


REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "got '0 bytes'"),
    "text": (b"<svg></svg>" * 9, "99 bytes that are no such image"),
    "half a png": (saved(PICTURE, "PNG")[:300], "a broken image"),
    "half a jpeg": (saved(PICTURE, "JPEG")[:-40], "a broken image"),
    "half a webp": (saved(PICTURE, "WEBP")[:-40], "image"),
    "a png's header alone": (saved(PICTURE, "PNG")[:20], "image"),
    "gif": (saved(PICTURE, "GIF"), "no such image"),
    "animated gif": (frames("GIF"), "no such image"),
    "tiff": (saved(PICTURE, "TIFF"), "no such image"),
    "bmp": (saved(PICTURE, "BMP"), "no such image"),
    "apng": (frames("PNG"), "an animation of 2 frames"),
    "animated webp": (frames("WEBP"), "an animation of 2 frames"),
    "50 megapixels": (png_header(10_000, 5_000), "10000x5000 pixels.*at most 40 megapixels"),
    "100 megapixels": (png_header(10_000, 10_000), "megapixels"),
    "200 megapixels": (png_header(20_000, 10_000), "over 89 megapixels"),
    "200 megapixels of jpeg": (jpeg_header(20_000, 10_000), "over 89 megapixels"),
    "200 megapixels of webp": (webp_header(16_000, 12_500), "over 89 megapixels"),
    "21 megabytes": (saved(PICTURE, "PNG") + bytes(21 << 20), "at most 20971520 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_single_image_names_the_field(name: str) -> None:
    data, words = REFUSED[name]
    with pytest.raises(InvalidRequest, match=words) as caught:
        read_image(data, FIELD)
    assert caught.value.field == FIELD


def test_the_largest_image_is_read() -> None:
    data = saved(PIL.Image.new("1", (8000, 5000), 1), "PNG")
    assert read_image(data).shape == (5000, 8000, 3)


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
from sdxs.control import read_image
from sdxs.errors import InvalidRequest
for name in sys.argv[1:]:
    data = open(name, "rb").read()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        read_image(data)
    except InvalidRequest as error:
        assert "megapixels" in str(error), error
    else:
        raise AssertionError("it was read")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000, f"{{grown}} KB for {{name}}"
"""


def test_200_megapixels_take_no_memory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Decoded they are 600 MB."""
    folder = tmp_path_factory.mktemp("large")
    for name in REFUSED:
        if name.startswith("200"):
            (folder / name).write_bytes(REFUSED[name][0])
    command = [
        sys.executable,
        "-c",
        LIMITED.format(root=str(Path(sdxs.__file__).parents[1])),
        *map(str, sorted(folder.iterdir())),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


GREY16 = (np.arange(12 * 16).reshape(12, 16) * 341).astype(np.uint16)
RGB16 = RNG.integers(0, 65536, (12, 16, 3), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (12, 16, 1), dtype=np.uint8)


def on_white(colour_HWC: np.ndarray, alpha_HW1: np.ndarray) -> np.ndarray:
    return colour_HWC * (alpha_HW1 / 255) + 255 * (1 - alpha_HW1 / 255)


def with_alpha(image: PIL.Image.Image) -> PIL.Image.Image:
    image.putalpha(PIL.Image.fromarray(ALPHA[..., 0]))
    return image


def palette() -> tuple[bytes, np.ndarray]:
    """Four colours, of which the last is transparent."""
    colours = np.array([[255, 0, 0], [0, 128, 0], [10, 20, 250], [40, 50, 60]], np.uint8)
    index_HW = RNG.integers(0, 4, (12, 16), dtype=np.uint8)
    image = PIL.Image.fromarray(index_HW, "L").convert("P")
    image.putdata(index_HW.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    shown = colours.copy()
    shown[3] = 255
    return saved(image, "PNG", transparency=3), shown[index_HW]


def grey(values_HW: np.ndarray) -> np.ndarray:
    return np.repeat(values_HW[..., None], 3, axis=-1)


def opencv(image: np.ndarray) -> bytes:
    """A PNG of 16 bits, which Pillow does not write in colour."""
    return bytes(cv2.imencode(".png", image[..., ::-1] if image.ndim == 3 else image)[1])


KINDS: dict[str, Callable[[], tuple[bytes, np.ndarray]]] = {
    "rgb": lambda: (saved(PICTURE, "PNG"), PIXELS),
    "webp": lambda: (saved(PICTURE, "WEBP", lossless=True), PIXELS),
    "grey": lambda: (saved(PIL.Image.fromarray(PIXELS[..., 0]), "PNG"), grey(PIXELS[..., 0])),
    "black and white": lambda: (saved(PIL.Image.fromarray(PIXELS[..., 0] > 99), "PNG"), grey((PIXELS[..., 0] > 99) * 255)),
    "16-bit grey": lambda: (opencv(GREY16), grey(GREY16 / 257)),
    "16-bit rgb": lambda: (opencv(RGB16), RGB16 / 257),
    "rgba": lambda: (saved(with_alpha(PICTURE.copy()), "PNG"), on_white(PIXELS, ALPHA)),
    "webp with alpha": lambda: (saved(with_alpha(PICTURE.copy()), "WEBP", lossless=True, exact=True), on_white(PIXELS, ALPHA)),
    "la": lambda: (saved(with_alpha(PIL.Image.fromarray(PIXELS[..., 0])), "PNG"), on_white(grey(PIXELS[..., 0]), ALPHA)),
    "palette with a transparent colour": palette,
    "one colour transparent": lambda: (
        saved(PICTURE, "PNG", transparency=tuple(PIXELS[3, 4].tolist())),
        np.where((PIXELS[3, 4] == PIXELS).all(-1, keepdims=True), 255, PIXELS),
    ),
    "one grey transparent": lambda: (
        saved(PIL.Image.fromarray(PIXELS[..., 0]), "PNG", transparency=int(PIXELS[3, 4, 0])),
        grey(np.where(PIXELS[..., 0] == PIXELS[3, 4, 0], 255, PIXELS[..., 0])),
    ),
    "a png of one frame": lambda: (saved(PICTURE, "PNG", save_all=True), PIXELS),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_becomes_the_right_pixels(name: str) -> None:
    data, expected_HWC = KINDS[name]()
    found = read_image(data)
    assert found.dtype == np.uint8 and found.shape == (12, 16, 3)
    assert np.abs(found - np.asarray(expected_HWC, float)).max() <= 1  # of 255: the rounding of blends and of 16 bits


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 200, 100, 50), (30, 60, 90, 200)])
def test_cmyk_is_converted(ink: tuple[int, int, int, int]) -> None:
    data = saved(PIL.Image.new("CMYK", (16, 16), ink), "JPEG", quality=100)
    expected = [(255 - part) * (255 - ink[3]) / 255 for part in ink[:3]]
    assert np.abs(read_image(data) - np.array(expected)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_images_stand_upright(orientation: int, kind: str) -> None:
    """EXIF 2.3: what the rows and columns of the stored pixels are when looked at."""
    a = PIXELS
    upright = {
        1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1], 5: a.transpose(1, 0, 2), 6: a[::-1].transpose(1, 0, 2),
        7: a[::-1, ::-1].transpose(1, 0, 2), 8: a.transpose(1, 0, 2)[::-1],
    }  # fmt: skip
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(read_image(saved(PICTURE, kind, exif=exif, **options)), upright[orientation])


def test_a_photograph_with_previews_is_its_first_picture() -> None:
    """Phones write JPEGs of several frames (MPO): not an animation."""
    flat = PIL.Image.new("RGB", (16, 12), (200, 100, 50))
    data = saved(flat, "MPO", save_all=True, append_images=[PIL.Image.new("RGB", (16, 12), "white")])
    assert np.abs(read_image(data).astype(int) - [200, 100, 50]).max() <= 2


SAMPLES = [
    *(KINDS[name]()[0] for name in ("rgb", "webp", "16-bit grey", "palette with a transparent colour", "la")),
    saved(PICTURE, "JPEG"), frames("PNG"), frames("WEBP"), frames("MPO"),
]  # fmt: skip
EXIF = PIL.Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "a caption"
SAMPLES += [saved(PICTURE, kind, exif=EXIF) for kind in ("PNG", "JPEG", "WEBP")]


def told(data: bytes) -> None:
    """An image, or an error that names the field; nothing else."""
    refused = ""
    try:
        found = read_image(data, FIELD)
    except InvalidRequest as error:
        refused = error.field
    assert refused == FIELD or (found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then skips
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    sample=st.sampled_from(SAMPLES), changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), max_size=6),
    kept=st.floats(0, 1),
)  # fmt: skip
def test_tampered_files_are_read_or_refused(sample: bytes, changes: list[tuple[int, int]], kept: float) -> None:
    data = bytearray(sample)
    for at, value in changes:
        data[at % len(data)] = value
    told(bytes(data))
    told(bytes(data[: round(kept * len(data))]))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of what it then skips
@settings(max_examples=100)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    told(data)
    told(b"\x89PNG\r\n\x1a\n" + data)
    told(b"\xff\xd8\xff" + data)
    told(b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tag", [0, 30])
def test_exif_that_cannot_be_written_back_is_refused(tag: int) -> None:
    """A caption under another tag's number: Pillow raises struct.error or TypeError, not one of its own."""
    data = bytearray(saved(PICTURE, "WEBP", exif=EXIF))
    data[data.index(b"EXIF") + 19] = tag
    with pytest.raises(InvalidRequest, match="a broken image") as caught:
        read_image(bytes(data), FIELD)
    assert caught.value.field == FIELD


@pytest.mark.parametrize("shape", [(64, 64), (100, 30), (7, 9), (512, 64), (63, 65)])
@pytest.mark.parametrize("size", [64, 96])
def test_control_images_are_resized_as_diffusers_does(shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    theirs = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False).preprocess(
        PIL.Image.fromarray(image), height=size, width=size
    )
    ours = fit(image, size, size)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours.astype(np.float32) / 255, theirs[0].permute(1, 2, 0).numpy())
