"""The `emoji` world: Noto Color Emoji artwork under its Unicode names, 64x64 pixels on white.

Knows how to render (Debian package fonts-noto-color-emoji, through Pillow) and how to augment; it does not know any network.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdxs.errors import PreconditionFailed
from trainer.worlds.emoji_list import ASSETS, Emoji

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
PACKAGE = "fonts-noto-color-emoji"  # Debian's
FONT_SIZE = 109  # the only strike in the font: 136x128 bitmaps
SIZE = 64
ARTWORK = 128  # pixels of a master render, from which augmented views are scaled down
GALLERY_COLUMNS = 32
BACKGROUNDS = {
    "yellow": (255, 221, 87), "pink": (255, 183, 206), "light blue": (173, 216, 240), "green": (160, 214, 150),
    "grey": (190, 190, 190), "black": (24, 24, 24),
}  # fmt: skip


@cache
def load() -> tuple[Emoji, ...]:
    """All emoji of the world, train and heldout, in gallery order."""
    lines = (ASSETS / "captions.jsonl").read_text(encoding="utf8").splitlines()
    return tuple(Emoji(**json.loads(line)) for line in lines)


def captions(split: str) -> list[str]:
    """Captions of one split ("train" or "heldout")."""
    return [e.caption for e in load() if e.split == split]


def render(sequence: str) -> Image.Image:
    """One emoji sequence (ZWJ and skin tone sequences included) as a 128x128 RGBA master. Raises PreconditionFailed without the font."""
    if not FONT.exists():
        raise PreconditionFailed(f"{FONT} is missing: install the Debian package {PACKAGE}")
    font = ImageFont.truetype(str(FONT), FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    canvas = Image.new("RGBA", (136, 136), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((0, 4), sequence, font=font, embedded_color=True)
    return canvas.resize((ARTWORK, ARTWORK), Image.Resampling.LANCZOS)


def compose(master: Image.Image, size: int, offset: tuple[int, int], background: tuple[int, int, int]) -> Image.Image:
    """`master` scaled to `size` pixels, pasted at `offset` on a 64x64 canvas of one colour."""
    canvas = Image.new("RGB", (SIZE, SIZE), background)
    small = master.resize((size, size), Image.Resampling.LANCZOS)
    canvas.paste(small, offset, small)
    return canvas


def plain(master: Image.Image) -> Image.Image:
    """The canonical view: 60 pixels wide, centred, on white."""
    return compose(master, 60, (2, 2), (255, 255, 255))


def augment(master: Image.Image, caption: str, rng: np.random.Generator, background_share: float) -> tuple[Image.Image, str]:
    """A view with a small random shift and scale; with probability `background_share` on a colour that the caption then names."""
    size = int(rng.integers(56, 63))
    slack = SIZE - size
    offset = tuple(int(v) for v in np.clip(rng.integers(-1, 2, size=2) + slack // 2, 0, slack))
    if rng.random() >= background_share:
        return compose(master, size, (offset[0], offset[1]), (255, 255, 255)), caption
    name = str(rng.choice(list(BACKGROUNDS)))
    return compose(master, size, (offset[0], offset[1]), BACKGROUNDS[name]), f"{caption} on {name} background"


def render_gallery(sequences: list[str], path: Path) -> None:
    """Write the canonical views as one lossless sheet, 32 a row."""
    rows = -(-len(sequences) // GALLERY_COLUMNS)
    sheet = Image.new("RGB", (GALLERY_COLUMNS * SIZE, rows * SIZE), (255, 255, 255))
    for i, sequence in enumerate(sequences):
        sheet.paste(plain(render(sequence)), (i % GALLERY_COLUMNS * SIZE, i // GALLERY_COLUMNS * SIZE))
    sheet.save(path, lossless=True, quality=100, method=6)


@cache
def gallery() -> np.ndarray:
    """Canonical views of all emoji from the shipped sheet: uint8, shape (N, 64, 64, 3), in the order of `load()`."""
    sheet = np.asarray(Image.open(ASSETS / "gallery.webp").convert("RGB"))
    rows = sheet.reshape(-1, SIZE, GALLERY_COLUMNS, SIZE, 3).swapaxes(1, 2).reshape(-1, SIZE, SIZE, 3)
    return rows[: len(load())]


class EmojiWorld:
    """848 captions, 85 of them, all compositions, held out of training."""

    name, image_size, retrieval = "emoji", SIZE, True
    background_share = 0.1  # of the training views: few, so that a caption that names no background means white

    def __init__(self) -> None:
        self.emoji = load()
        self.heads = {"emoji": len(self.emoji)}
        self._index = {e.caption: i for i, e in enumerate(self.emoji)}
        self._masters: list[Image.Image] | None = None

    @property
    def masters(self) -> list[Image.Image]:
        """High-resolution renders of all emoji; rendered from the font on first use (about ten seconds)."""
        if self._masters is None:
            self._masters = [render(e.sequence) for e in self.emoji]
        return self._masters

    def missing(self) -> str | None:
        return None if FONT.exists() else f"the Debian package {PACKAGE}"

    def captions(self, split: str) -> list[str]:
        return captions(split)

    def vocabulary(self) -> list[str]:
        return [e.caption for e in self.emoji] + [f"{self.emoji[0].caption} on {name} background" for name in BACKGROUNDS]

    def training_images(self, count: int, rng: np.random.Generator, split: str = "train") -> tuple[np.ndarray, list[str]]:
        members = [i for i, e in enumerate(self.emoji) if e.split == split]
        chosen = rng.choice(members, size=count)
        views = [augment(self.masters[i], self.emoji[i].caption, rng, self.background_share) for i in chosen]
        return np.stack([np.asarray(image) for image, _ in views]), [text for _, text in views]

    def judge_images(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        chosen = rng.integers(len(self.emoji), size=count)
        views = [augment(self.masters[i], "", rng, 0.1)[0] for i in chosen]
        return np.stack([np.asarray(image) for image in views]), chosen[:, None]

    def reference_images(self, captions: list[str]) -> np.ndarray:
        return gallery()[[self._index[c] for c in captions]]

    def labels(self, captions: list[str]) -> np.ndarray:
        return np.array([[self._index[c]] for c in captions], dtype=np.int64)
