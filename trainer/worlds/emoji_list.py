"""Which emoji make up the `emoji` world, and under which captions: a selection from Unicode's `emoji-test.txt`.

Run `python -m trainer.worlds.emoji_list` to rebuild `trainer/assets/emoji/captions.jsonl` and `gallery.webp`. It needs the
Debian packages `unicode-data` (names) and `fonts-noto-color-emoji` (artwork); training and evaluation need only the two files.

Held out of training: 10% of all captions, whole compositions only (profession x skin tone, gesture x skin tone, colour x
heart/circle/square), chosen so that every single word of a held-out caption is still seen in training.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

ASSETS = Path(__file__).parent.parent / "assets" / "emoji"
UNICODE_LIST = Path("/usr/share/unicode/emoji/emoji-test.txt")
HELD_OUT_SHARE = 0.10

WHOLE_SUBGROUPS = {
    "face-smiling", "face-affection", "face-tongue", "face-hat", "face-glasses", "face-negative", "face-costume",
    "cat-face", "monkey-face", "heart", "animal-mammal", "animal-bird", "animal-amphibian", "animal-reptile",
    "animal-marine", "animal-bug", "plant-flower", "plant-other", "food-fruit", "food-vegetable", "food-prepared",
    "food-asian", "food-marine", "food-sweet", "drink", "transport-water", "transport-air", "sport", "music",
    "musical-instrument", "sky & weather",
}  # fmt: skip
SINGLE = {
    "bus", "ambulance", "fire engine", "police car", "taxi", "automobile", "delivery truck", "tractor", "racing car",
    "bicycle", "locomotive", "house", "castle", "snow-capped mountain", "volcano", "desert island", "tent",
    "jack-o-lantern", "Christmas tree", "balloon", "wrapped gift", "party popper", "fireworks", "trophy",
    "sports medal", "bullseye", "kite", "crystal ball", "game die", "puzzle piece", "teddy bear", "artist palette",
    "sunglasses", "necktie", "t-shirt", "jeans", "scarf", "dress", "backpack", "running shoe", "crown", "top hat",
    "graduation cap", "lipstick", "ring", "gem stone", "megaphone", "bell", "mobile phone", "telephone", "battery",
    "laptop", "floppy disk", "television", "camera", "light bulb", "candle", "closed book", "green book", "blue book",
    "orange book", "scroll", "newspaper", "money bag", "coin", "envelope", "package", "pencil", "crayon", "briefcase",
    "calendar", "pushpin", "scissors", "locked", "key", "hammer", "axe", "bomb", "bow and arrow", "shield", "wrench",
    "gear", "magnet", "ladder", "microscope", "telescope", "syringe", "pill", "door", "bed", "chair", "toilet",
    "broom", "basket", "bucket", "soap", "toothbrush", "fire extinguisher", "shopping cart", "moai", "stop sign",
    "vertical traffic light", "anchor", "globe showing Americas", "hourglass done", "watch", "alarm clock",
    "warning", "no entry", "radioactive", "yin yang", "peace symbol", "check mark", "cross mark", "hundred points",
    "collision", "red question mark", "red exclamation mark", "recycling symbol", "eyes", "brain", "tooth", "bone",
}  # fmt: skip
GESTURES = {
    "waving hand", "raised hand", "OK hand", "victory hand", "call me hand", "thumbs up", "thumbs down", "raised fist",
    "oncoming fist", "clapping hands", "folded hands", "flexed biceps", "backhand index pointing right", "ear",
}  # fmt: skip
PROFESSIONS = {
    "health worker", "student", "farmer", "cook", "factory worker", "scientist", "artist", "pilot", "astronaut",
    "firefighter", "police officer", "construction worker",
}  # fmt: skip
COLOURED_SHAPE = re.compile(
    r"^(red|orange|yellow|green|blue|purple|brown|black|white|pink|grey|light blue) (circle|square|heart)$"
)
SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")


@dataclass(frozen=True)
class Emoji:
    """One caption and its character sequence."""

    caption: str
    sequence: str
    group: str
    composition: bool
    split: str = "train"


def normalise(name: str) -> str:
    """Caption of a Unicode name: lower case words, with no punctuation but hyphens ("thumbs up: dark skin tone" loses the colon)."""
    ascii_name = name.replace("’", "'").replace("ñ", "n")
    return " ".join(re.sub(r"[^a-z0-9\- ]", " ", ascii_name.lower()).split())


def _role(base: str) -> str | None:
    for sex in ("man ", "woman "):
        if base.startswith(sex):
            return base[len(sex) :]
    return None


def _wanted(name: str, subgroup: str) -> tuple[bool, bool]:
    """(is it in the world, is it a composition)."""
    base, _, tone = name.partition(": ")
    if base in GESTURES or _role(base) in PROFESSIONS:
        plain_or_tone = not tone or tone.removesuffix(" skin tone") in SKIN_TONES
        return plain_or_tone, True
    if COLOURED_SHAPE.match(name):
        return True, True
    return subgroup in WHOLE_SUBGROUPS or name in SINGLE, False


def parse(text: str) -> list[Emoji]:
    """The selected emoji of an `emoji-test.txt`, in its order, all in the train split."""
    chosen, subgroup = [], ""
    for line in text.splitlines():
        if line.startswith("# subgroup:"):
            subgroup = line[12:].strip()
        match = re.match(r"^[0-9A-F ]+; fully-qualified +# (\S+) E[\d.]+ (.*)$", line)
        if not match:
            continue
        sequence, name = match.groups()
        wanted, composition = _wanted(name, subgroup)
        if wanted:
            chosen.append(Emoji(normalise(name), sequence, subgroup, composition))
    return chosen


def hold_out(emoji: list[Emoji], share: float = HELD_OUT_SHARE, seed: int = 0) -> list[Emoji]:
    """Move `share` of the captions, compositions only, to the `heldout` split; each word keeps at least two training captions."""
    word_uses = Counter(word for e in emoji for word in e.caption.split())
    candidates = [i for i, e in enumerate(emoji) if e.composition]
    random.Random(seed).shuffle(candidates)
    held: set[int] = set()
    for i in candidates:
        words = set(emoji[i].caption.split())
        if len(held) < round(share * len(emoji)) and all(word_uses[w] >= 3 for w in words):
            held.add(i)
            word_uses.subtract(words)
    return [Emoji(**{**asdict(e), "split": "heldout" if i in held else "train"}) for i, e in enumerate(emoji)]


def main() -> None:
    from trainer.worlds.emoji import render_gallery

    emoji = hold_out(parse(UNICODE_LIST.read_text(encoding="utf8")))
    ASSETS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(e), ensure_ascii=False) for e in emoji]
    (ASSETS / "captions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf8")
    render_gallery([e.sequence for e in emoji], ASSETS / "gallery.webp")
    print(f"{len(emoji)} emoji, {sum(e.split == 'heldout' for e in emoji)} held out -> {ASSETS}")


if __name__ == "__main__":
    main()
