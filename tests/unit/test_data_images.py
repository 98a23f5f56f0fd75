"""Captioned images: decoding, both layouts, faults, and latents that are encoded once."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from tests.unit.test_data_prompts import write_tar
from trainer.data import latent_cache
from trainer.data.images import decode, read_images
from trainer.data.latent_cache import cached_latents, cached_pixels
from trainer.sections import ImagesSection


@pytest.fixture
def local(tmp_path: Path) -> Settings:
    return Settings(store_url=f"file://{tmp_path}/store", cache_dir=tmp_path / "cache")


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image.save(stream := io.BytesIO(), kind, **options)
    return stream.getvalue()


def picture(number: int, size: tuple[int, int] = (8, 8)) -> bytes:
    """A PNG of one colour, another for each number below 256."""
    return encoded(Image.new("RGB", size, (number, 255 - number, 7)))


def shards(folder: Path, numbers: range, size: int = 4) -> Path:
    """WebDataset shards with `size` samples each."""
    folder.mkdir(exist_ok=True)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        members = {f"{i:03}.{end}": data for i in some for end, data in (("png", picture(i)), ("txt", f"number {i}".encode()))}
        write_tar(folder / f"{start:03}.tar", members)
    return folder


def test_the_square_in_the_middle() -> None:
    wide_HWC = np.zeros((4, 12, 3), np.uint8)
    wide_HWC[:, 4:8] = (10, 200, 30)
    image, kind, _ = decode(encoded(Image.fromarray(wide_HWC)), ".png", 4)
    assert kind is None and image is not None
    np.testing.assert_array_equal(image, wide_HWC[:, 4:8])


def test_turned_as_exif_says_and_transparent_is_white() -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned, _, _ = decode(encoded(Image.fromarray(upright), exif=exif), ".png", 8)
    np.testing.assert_array_equal(turned, upright[::-1])
    clear, _, _ = decode(encoded(Image.new("RGBA", (4, 4), (200, 0, 0, 0))), ".png", 4)
    assert clear is not None and clear.min() == 255


@pytest.mark.parametrize("mode", ["L", "P", "LA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    kind, suffix = ("JPEG", ".jpg") if mode == "CMYK" else ("PNG", ".png")
    image, fault, what = decode(encoded(Image.new(mode, (4, 4)), kind), suffix, 4)
    assert (fault, what) == (None, None) and image is not None and image.shape == (4, 4, 3)


NOISE = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")


@pytest.mark.parametrize(
    ("data", "suffix", "kind", "words"),
    [
        (b"GIF89a", ".png", "image", "no JPEG, PNG or WebP"),
        (b"", ".png", "image", "no JPEG, PNG or WebP"),
        (NOISE[: len(NOISE) // 2], ".jpg", "image", "truncated"),
        (encoded(Image.new("RGB", (64, 64)))[:60], ".png", "image", ""),
        (NOISE, ".png", "extension", "JPEG in a .png file"),
        (NOISE, ".jpg", None, ""),
        (picture(1, (31, 64)), ".png", "small", "31 x 64 pixels, below 32"),
        (encoded(Image.new("1", (10_000, 9_000))), ".png", "bomb", "90000000 pixels"),
        (encoded(Image.new("1", (20_000, 9_000))), ".png", "bomb", "180000000 pixels"),
    ],
)  # fmt: skip
def test_faults_of_images(data: bytes, suffix: str, kind: str | None, words: str) -> None:
    image, found, what = decode(data, suffix, 32)
    assert (found, image is None) == (kind, kind is not None)
    assert words in (what or "")


def test_broken_images_never_escape() -> None:
    """Any bytes give an image or a fault, no exception."""
    rng = random.Random(0)
    for data, suffix in (
        (NOISE, ".jpg"),
        (picture(3, (40, 40)), ".png"),
        (encoded(Image.new("RGB", (40, 40)), "WEBP"), ".webp"),
    ):
        for _ in range(60):
            broken = bytearray(data)
            for _ in range(rng.randint(1, 20)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            image, kind, _ = decode(bytes(broken[: rng.randint(1, len(broken))]), suffix, 8)
            assert (image is None) == (kind is not None)


def image_folder(folder: Path) -> Path:
    """Three images by metadata.jsonl in its order, one of them twice, and two with captions beside them."""
    (folder / "a").mkdir(parents=True)
    rows = [("2.png", "two"), ("0.png", "zero"), ("2.png", "two again")]
    (folder / "a/metadata.jsonl").write_text("".join(json.dumps({"file_name": n, "text": t}) + "\n" for n, t in rows))
    for number in (0, 2):
        (folder / f"a/{number}.png").write_bytes(picture(number))
    for number in (7, 5):
        (folder / f"b{number}.PNG").write_bytes(picture(number))
        (folder / f"b{number}.txt").write_text(f" number {number}\n")
    return folder


def test_an_image_folder_in_its_order(tmp_path: Path, local: Settings) -> None:
    found = list(read_images(str(image_folder(tmp_path / "d")), local, 8, "text"))
    expected = [(2, "two"), (0, "zero"), (2, "two again"), (5, "number 5"), (7, "number 7")]
    assert [(int(image.image_HWC[0, 0, 0]), image.caption) for image in found if image.image_HWC is not None] == expected


def test_shards_in_their_order(tmp_path: Path, local: Settings) -> None:
    found = list(read_images(str(shards(tmp_path / "d", range(10)) / "*.tar"), local, 8))
    assert [(int(i.image_HWC[0, 0, 0]), i.caption) for i in found if i.image_HWC is not None] == [
        (n, f"number {n}") for n in range(10)
    ]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"1.png": picture(1), "1.txt": b"a", "2.png": picture(1)}, r"x\.tar:2: members \.png.*under one name"),
        ({"1.txt": b"a"}, r"x\.tar:1: members \.txt.*under one name"),
        ({"1.png": picture(1), "1.txt": b" "}, r"x\.tar:1: .*white space"),
        ({"1.png": picture(1), "1.json": b"{}"}, r"x\.tar:1: .*a caption, in caption"),
        ({"1.png": picture(1)[:50], "1.txt": b"a"}, r"x\.tar:1: .*a whole JPEG"),
    ],
)
def test_a_wrong_sample_is_refused_by_name(members: dict[str, bytes], words: str, tmp_path: Path, local: Settings) -> None:
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(InvalidRequest, match=words):
        list(read_images(str(tmp_path / "x.tar"), local, 8))


class Encoder:
    """(B, 2, 1, 1): red and blue of the first pixel, over 8; counts what it was given."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, image_BHWC: np.ndarray) -> Tensor:
        self.seen += len(image_BHWC)
        assert image_BHWC.dtype == np.uint8
        return torch.from_numpy(image_BHWC[:, :1, :1, ::2].transpose(0, 3, 1, 2) / 8.0)


def test_latents_are_encoded_once_and_only_the_new(tmp_path: Path, local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "SHARD_ROWS", 6)
    section = ImagesSection(images=str(shards(tmp_path / "d", range(10))), size=8)
    encode, done = Encoder(), list[int]()
    kept = cached_latents(section, encode, "vae", local, 4, done.append)
    assert (encode.seen, done, kept.captions[3]) == (10, [4, 8, 10], "number 3")
    torch.testing.assert_close(kept.take([9, 0])[:, 0, 0, 0], torch.tensor([9, 0]).half() / 8)
    assert kept.take([1]).dtype == torch.float16
    shards(tmp_path / "d", range(13))
    encode.seen = 0
    assert len(cached_latents(section, encode, "vae", local)) == 13 and encode.seen == 3
    latent_BCHW, captions = cached_latents(section, encode, "vae", local).draw(5, torch.Generator().manual_seed(0))
    assert latent_BCHW.dtype == torch.float32
    assert [f"number {int(8 * row[0, 0, 0])}" for row in latent_BCHW] == captions


def test_an_unchanged_set_is_not_even_read(tmp_path: Path, local: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    section = ImagesSection(images=str(shards(tmp_path / "d", range(5))), size=8)
    first = cached_latents(section, Encoder(), "vae", local)
    monkeypatch.setattr(latent_cache, "decoded_images", None)
    elsewhere = local.model_copy(update={"cache_dir": tmp_path / "another"})
    again = cached_latents(section, Encoder(), "vae", elsewhere)
    assert torch.equal(first.take(range(5)), again.take(range(5))) and first.captions == again.captions


def test_another_encoder_or_size_encodes_anew(tmp_path: Path, local: Settings) -> None:
    section = ImagesSection(images=str(shards(tmp_path / "d", range(3))), size=8)
    encode = Encoder()
    for key, size, seen in (("one", 8, 3), ("two", 8, 6), ("one", 4, 9), ("one", 8, 9)):
        cached_latents(section.model_copy(update={"size": size}), encode, key, local)
        assert encode.seen == seen


def test_what_was_encoded_before_a_fault_is_kept(tmp_path: Path, local: Settings) -> None:
    section = ImagesSection(images=str(shards(tmp_path / "d", range(8))), size=8)
    broken = tmp_path / "d/004.tar"
    whole = broken.read_bytes()
    write_tar(broken, {"x.png": b"", "x.txt": b"x"})
    with pytest.raises(InvalidRequest, match=r"004\.tar:1"):
        cached_latents(section, encode := Encoder(), "vae", local, 4)
    broken.write_bytes(whole)
    cached_latents(section, encode, "vae", local, 4)
    assert encode.seen == 8


def test_latents_beyond_float16_are_refused(tmp_path: Path, local: Settings) -> None:
    section = ImagesSection(images=str(shards(tmp_path / "d", range(2))), size=8)
    huge: Callable[[np.ndarray], Tensor] = lambda image_BHWC: torch.full((len(image_BHWC), 1), 1e6)  # noqa: E731
    with pytest.raises(InvalidRequest, match="float16"):
        cached_latents(section, huge, "vae", local)


def test_pixels_are_kept_as_they_are(tmp_path: Path, local: Settings) -> None:
    section = ImagesSection(images=str(image_folder(tmp_path / "d")), size=4, column="text")
    kept = cached_pixels(section, local)
    assert kept.take([0]).dtype == torch.uint8 and tuple(kept.take([0, 1]).shape) == (2, 4, 4, 3)
    assert kept.take([3])[0, 0, 0].tolist() == [5, 250, 7]


def test_no_image_at_all(tmp_path: Path, local: Settings) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InvalidRequest, match=r"images\.images.*WebDataset"):
        cached_latents(ImagesSection(images=str(tmp_path / "a.txt"), size=8), Encoder(), "vae", local)
