"""Captioned images: decoded, cut to a square from the middle and resized, in the order of their source.

Faults are found here too: what is no image, is cut short, is too small, or is not what its name says.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image, ImageOps, UnidentifiedImageError
from pyarrow.fs import FileSystem

from sdxs.settings import Settings
from trainer.data.files import Files, find, stream
from trainer.data.kinds import refusal
from trainer.data.rows import SCHEMA, Row
from trainer.data.samples import Part, Sample, parts, read_part

FIELD = "images.images"
BLOCK_IMAGES = 32
ENDINGS = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
_SCHEMA = pa.schema([*SCHEMA, ("sha256", pa.binary()), ("pixels", pa.large_binary())])
Pixels = np.ndarray[Any, np.dtype[np.uint8]]


class CaptionedImage(NamedTuple):
    """`sha256` is that of the file's bytes. `image_HWC` is None where the reader said it is known."""

    sha256: bytes
    caption: str
    image_HWC: Pixels | None


def read_images(
    source: str,
    settings: Settings,
    size: int,
    column: str = "caption",
    known: frozenset[bytes] = frozenset(),
    kind: str | None = None,
) -> Iterator[CaptionedImage]:
    """The images of a folder or of WebDataset shards as uint8 RGB, (size, size, 3), through Ray Data where a cluster is up.

    Args:
        known: sha256 of files that need not be decoded.
        kind: `folder` or `webdataset`; by default what the files' names say.

    Raises:
        NotFound, InvalidRequest: as `find`; or an image or caption is wrong (names file and row).
    """
    files = find(source, settings, FIELD)
    yield from decoded_images(files, kind, column, size, known)


def decoded_images(
    files: Files, kind: str | None, column: str, size: int, known: frozenset[bytes] = frozenset()
) -> Iterator[CaptionedImage]:
    """As `read_images`, of files that have been listed."""
    keep: Callable[[bytes], bool] = partial(_is_new, known)
    for block in examine(files, kind, column, size, keep):
        for found in block.to_pylist():
            sha256, pixels, file = found.pop("sha256"), found.pop("pixels"), found.pop("file")
            row = Row(**found)
            if row.kind:
                raise refusal(FIELD, files.source, file, row)
            image = None if pixels is None else np.frombuffer(pixels, np.uint8).reshape(size, size, 3)
            yield CaptionedImage(sha256, row.caption or "", image)


def _is_new(known: frozenset[bytes], sha256: bytes) -> bool:
    return sha256 not in known


def examine(
    files: Files, kind: str | None, column: str, size: int, keep: Callable[[bytes], bool] | None = None
) -> Iterator[pa.Table]:
    """Each image's row, with its fault if it has one, and the sha256 of its bytes, as tables.

    With `keep`, images for which it is true of the sha256 are decoded and come as `pixels`, the others are not looked at; without,
    every image is decoded and none comes.
    """
    yield from stream(parts(files, kind, column), partial(_examined_part, files.filesystem, column, size, keep))


def _examined_part(
    filesystem: FileSystem, column: str, size: int, keep: Callable[[bytes], bool] | None, part: Part
) -> Iterator[pa.Table]:
    samples = read_part(part, filesystem, column)
    while block := list(islice(samples, BLOCK_IMAGES)):
        rows = [_examined(sample, size, keep) for sample in block]
        yield pa.table(list(map(list, zip(*rows, strict=True))), schema=_SCHEMA)


def _examined(sample: Sample, size: int, keep: Callable[[bytes], bool] | None) -> tuple[Any, ...]:
    sha256 = hashlib.sha256(sample.data).digest()
    if sample.row.kind or (keep and not keep(sha256)):
        return sample.file, *sample.row, sha256, None
    image, kind, what = decode(sample.data, sample.suffix, size)
    if image is None:
        return sample.file, *sample.row._replace(caption=None, kind=kind, field="image", what=what), sha256, None
    return sample.file, *sample.row, sha256, image.tobytes() if keep else None


def decode(data: bytes, suffix: str, size: int) -> tuple[Pixels | None, str | None, str | None]:
    """(image_HWC, None, None), or (None, kind of fault, what was found).

    The largest square in the middle, resized with Lanczos' filter; turned as EXIF says; transparent pixels on white.
    """
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=list(ENDINGS)) as image:
            if fault := _fault(image, suffix, size):
                return None, *fault
            image.load()
            return square(image, size), None, None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        return None, "bomb", str(error)
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on broken data
        return None, "image", "no JPEG, PNG or WebP" if isinstance(error, UnidentifiedImageError) else str(error)[:200]


def _fault(image: Image.Image, suffix: str, size: int) -> tuple[str, str] | None:
    """By the header alone."""
    width, height = image.size
    if width * height > (Image.MAX_IMAGE_PIXELS or 0):
        return "bomb", f"{width} x {height} pixels"
    if suffix not in ENDINGS[image.format or ""]:
        return "extension", f"{image.format} in a {suffix} file"
    if min(width, height) < size:
        return "small", f"{width} x {height} pixels, below {size}"
    return None


def square(image: Image.Image, size: int) -> Pixels:
    """See `decode`."""
    turned = ImageOps.exif_transpose(image)
    if turned.has_transparency_data:
        turned = turned.convert("RGBA")
        turned = Image.alpha_composite(Image.new("RGBA", turned.size, "white"), turned)
    fitted = ImageOps.fit(turned.convert("RGB"), (size, size), Image.Resampling.LANCZOS)
    return np.asarray(fitted)
