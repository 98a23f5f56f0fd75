"""Two bundles side by side: the page holds their images, scores and differences, and loads nothing from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sdxs.bundle import read, seal
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from trainer.evaluation.compare import address, compare_bundles, flat, write_page
from trainer.evaluation.generators import SEED, served
from trainer.evaluation.metrics.networks import Networks
from trainer.evaluation.run import Request, evaluate_request


def sealed(folder: Path, teacher: Path, seed: int, **changes: object) -> Path:
    """A tiny bundle that carries a recipe of scenes."""
    tiny_folder(folder, seed=seed)
    (folder / "recipe.json").write_text(json.dumps({**tiny_recipe(teacher), "seed": seed, **changes}))
    seal(folder, "tiny", lineage={"teacher": str(teacher), "unet": f"digest-{seed}"}, recipe_hash=f"hash{seed}")
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    root = tmp_path_factory.mktemp("pair")
    teacher = tiny_teacher(root / "teacher")
    return str(sealed(root / "one", teacher, 1)), str(sealed(root / "two", teacher, 2, name="<tiny>"))


class Page(HTMLParser):
    """What a browser would see: tags, data: images with their texts, ranges."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: list[tuple[str, bytes]] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append((str(found["alt"]), base64.b64decode(str(found["src"]).partition("base64,")[2])))
        if found.get("type") == "range":
            self.labels.append(str(found["aria-label"]))


def test_the_page_of_two_bundles(pair: tuple[str, str], tmp_path: Path) -> None:
    match = compare_bundles(pair, 8, Networks(), Settings(), lambda _: None)
    labels = [f"tiny@{read(Path(model)).digest[7:14]}" for model in pair]
    assert [(row.split, row.row) for row in match.rows] == [(s, n) for s in ("train", "heldout") for n in labels]
    assert all(row.latency_ms and row.gflop and row.images == 8 for row in match.rows)
    write_page(match, tmp_path / "new" / "page.html")
    text = (tmp_path / "new" / "page.html").read_text()
    page = Page(text)
    assert len(page.images) == 2 * len(match.shown) == 24
    makers = {label: served(Path(model), read(Path(model))) for label, model in zip(labels, pair, strict=True)}
    for number, (alt, data) in enumerate(page.images):
        prompt, _, label = alt.rpartition(", by ")
        shown = match.shown[number // 2]
        assert (prompt, shown.seed) == (shown.prompt, SEED + number // 2 % 6)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), makers[label]([prompt], [shown.seed])[0])
    assert {alt.rpartition(", by ")[2] for alt, _ in page.images} == set(labels)
    assert len(page.labels) == 1 + len(match.shown)
    assert match.differences() == [("name", ['"tiny"', '"<tiny>"']), ("seed", ["1", "2"])]
    assert match.lineage()[-1] == ("unet", ["digest-1", "digest-2"])
    assert "select" not in page.tags
    for needle in (
        "&lt;tiny&gt;",
        "digest-2",
        "hash1",
        match.bundles[1].manifest.digest,
        "prefers-color-scheme: dark",
        "scored by",
    ):
        assert needle.lower() in text.lower(), needle


def test_the_page_loads_nothing(pair: tuple[str, str], tmp_path: Path) -> None:
    write_page(compare_bundles(pair, 2, Networks(), Settings(), lambda _: None), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert not {"link", "iframe", "object", "base"} & set(Page(text).tags)
    assert re.findall(r"""(?:src|href|url|import)\s*[=(]\s*["']?(?!data:)[\w./]""", text) == []
    assert "http" not in text


def test_a_third_bundle_waits_behind_the_first_two(pair: tuple[str, str], tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", seed=9)
    seal(other, "other")
    match = compare_bundles((*pair, str(other)), 2, Networks(), Settings(), lambda _: None)
    labels = [bundle.label for bundle in match.bundles]
    assert labels[2] == "other" and all("@" in label for label in labels[:2])
    assert [row.row for row in match.rows] == labels * 2
    assert ("seed", ["1", "2", ""]) in match.differences()
    write_page(match, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    assert [alt.rpartition(", by ")[2] for alt, _ in page.images] == labels * len(match.shown)
    assert page.tags.count("select") == 2 and page.tags.count("option") == 6
    assert len(re.findall(r"<img [^>]*class=top>", text)) == len(re.findall(r"<img [^>]* hidden>", text)) == len(match.shown)


def test_what_cannot_be_compared_is_named(pair: tuple[str, str], tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="another bundle"):
        compare_bundles((pair[0], pair[0]), 2, Networks(), Settings(), lambda _: None)
    other = tiny_folder(tmp_path / "other", seed=5)
    seal(other, "other")
    with pytest.raises(InvalidRequest, match=r"carries recipe.json"):
        compare_bundles((str(tiny_bundle), str(other)), 2, Networks(), Settings(), lambda _: None)
    with pytest.raises(InvalidRequest, match=r"^model: got 'a b'.*one bundle"):
        evaluate_request(Request(["a", "b"], protocol="coco-5k"), Settings(), Console(quiet=True))
    with pytest.raises(InvalidRequest, match=f"got {pair[0]!r}, allowed: another bundle than {pair[0]}"):
        compare_bundles((*pair, pair[0]), 2, Networks(), Settings(), lambda _: None)


def test_one_bundle_through_the_whole_command(pair: tuple[str, str], tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "cache", store_url=f"file://{tmp_path}/store")
    report = evaluate_request(Request([pair[0]], images=4), settings, Console(quiet=True))
    assert [(row.split, row.row) for row in report.rows] == [
        (split, row) for split in ("train", "heldout") for row in ("vae", "teacher", "final")
    ]
    final = report.rows[-1]
    assert final.latency_ms and final.gflop and final.top1 is not None
    assert set(final.scores) == {"kid_judge", "precision_judge", "recall_judge", "diversity_judge"}
    teacher = report.rows[1]
    assert (teacher.gflop or 0) > 2 * final.gflop


def test_large_images_travel_as_webp() -> None:
    assert address(np.zeros((256, 256, 3), np.uint8)).startswith("data:image/png;base64,")
    assert address(np.zeros((512, 512, 3), np.uint8)).startswith("data:image/webp;base64,")


def test_nested_fields_have_dotted_names() -> None:
    assert flat({"a": {"b": [1, 2], "c": None}, "d": "x"}) == {"a.b": "[1, 2]", "d": '"x"'}
