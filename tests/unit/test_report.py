"""What people look at after a run: the numbers in the page, the table, the JSON and the bundle's card are those of the rows."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sdxs import bundle
from tests.models import tiny_folder, tiny_recipe, tiny_teacher
from trainer.evaluation.card import add_card, read_rows
from trainer.evaluation.report import ZOOM, console_table, contact_sheet, write_report
from trainer.evaluation.rows import Row, columns, markdown, table
from trainer.evaluation.scoring import embedded_judge, with_recorded
from trainer.recipe import DistillRecipe

ROWS = [
    Row("scenes", "train", "vae", 0.987, None, 14.0361, None, 288),
    Row("scenes", "train", "teacher", 0.9132, None, 20.5, 512.25, 288),
    Row("scenes", "heldout", "kd", 0.5, None, 99.0, 300.0, 72),
    Row("scenes", "heldout", "final", 0.125, None, 21.75, 18.25, 72),
]
FIELDS = {"world", "split", "row", "top1", "top5", "frechet", "latency_ms", "images"}


def text_of(rows: list[Row], width: int = 200) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(console_table(rows, embedded_judge("scenes")))
    return buffer.getvalue()


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_a_table_is_split_rather_than_cut_off(width: int) -> None:
    scores = {"kid_judge": -0.01234, "precision_judge": 1.0, "recall_judge": 0.5, "diversity_judge": 0.25, "clip_score": 31.5}
    rows = [replace(row, scores=scores, gflop=0.5477) for row in ROWS]
    lines = text_of(rows, width).splitlines()
    assert max(map(len, lines)) <= width and "…" not in "".join(lines)
    headings = [cell.strip() for line in lines if line.startswith("┃") for cell in line.strip("┃").split("┃")]
    expected = [column.heading for column in columns(rows)]
    assert [h for h in headings if h not in expected[:2]] == expected[2:]
    tables = headings.count("row")
    assert headings.count("captions") == tables and (tables == 1) == (width == 160)
    for row in rows:
        found = [cell.strip() for line in lines if f"│ {row.row} " in line for cell in line.strip("│").split("│")[2:]]
        assert found == [column.cell(row) for column in columns(rows)][2:]


def test_a_contact_sheet_shows_every_image_where_it_belongs() -> None:
    colours = {("a", 0): 10, ("a", 1): 60, ("b", 0): 120, ("b", 1): 240}
    columns = {
        name: np.stack([np.full((8, 8, 3), (colours[name, i], 0, 99), np.uint8) for i in range(2)]) for name in ("a", "b")
    }
    pixels = np.asarray(contact_sheet(columns, ["first prompt", "a second prompt that is far too long for one line"]))
    left, top = {}, {}
    for value in colours.values():
        rows, places = (pixels == (value, 0, 99)).all(-1).nonzero()
        assert len(rows) == (8 * ZOOM) ** 2
        left[value], top[value] = int(places.min()), int(rows.min())
    assert left[10] == left[60] < left[120] == left[240]
    assert top[10] == top[120] < top[60] == top[240]


def test_the_report_holds_the_rows(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 10, "loss": 2.0}\n{"step": 20, "loss": 1.0}\n')
    sheet = contact_sheet({"final": np.zeros((1, 8, 8, 3), np.uint8)}, ["one"])
    write_report(
        tmp_path, "tiny", ROWS, embedded_judge("scenes"), {"unet": 12.0, "pairs": 0.0}, sheet, {"unet": log}, "a summary"
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert [set(row) for row in report["rows"]] == [FIELDS] * len(ROWS)
    assert [Row(**row) for row in report["rows"]] == ROWS
    assert report["judge"] == {"world": "scenes", "accuracy_on_real_renders": 1.0}
    assert report["stage_seconds"] == {"unet": 12.0, "pairs": 0.0}
    assert {"torch", "ray"} <= set(report["machine"])
    page = (tmp_path / "report.html").read_text()
    for cell in ("98.7%", "20.500", "512.2", "12.5%", "reused", "12 s", "a summary", "100.0% of real scenes renders", "<svg"):
        assert cell in page, cell
    with Image.open(tmp_path / "contact_sheet.png") as image:
        assert image.size == sheet.size


def test_a_card_carries_its_rows_and_seals_the_bundle(tmp_path: Path) -> None:
    recipe = DistillRecipe.model_validate(tiny_recipe(tiny_teacher(tmp_path / "teacher")))
    folder = tiny_folder(tmp_path / "bundle")
    bundle.seal(folder, "tiny", lineage={"teacher": "t"})
    manifest = add_card(folder, recipe, ROWS, 0.995)
    assert bundle.read(folder, verify=True) == manifest
    assert manifest.metrics == {"heldout_top1": 0.125, "heldout_frechet": 21.75}
    assert read_rows(folder) == ROWS
    card = (folder / "README.md").read_text()
    assert "| heldout | final | 12.5% | 21.750 | 18.2 | 72 |" in card
    assert "99.5% of real renders" in card
    assert read_rows(tmp_path) == []


def test_recorded_rows_fill_what_was_not_measured_and_say_so() -> None:
    measured = [replace(ROWS[1], latency_ms=600.0), replace(ROWS[3], latency_ms=20.0)]
    rows = with_recorded(measured, ROWS)
    assert [(row.row, row.latency_ms, row.recorded) for row in rows] == [
        ("vae", None, True), ("teacher", 600.0, False), ("kd", 300.0, True), ("final", 20.0, False),
    ]  # fmt: skip
    assert set(rows[0].as_dict()) == FIELDS | {"recorded"} and set(rows[1].as_dict()) == FIELDS
    assert with_recorded(measured, []) == measured
    assert "kd *" in text_of(rows) and "recorded in the bundle" in text_of(rows)
    assert "*" not in text_of(measured) and "100.0% of real scenes renders" in text_of(measured)


def test_columns_are_those_that_a_row_fills() -> None:
    scores = {"frechet_inception": 21.5, "kid_inception": 0.01234, "precision_judge": 0.5, "clip_score": 31.84}
    rows = [replace(ROWS[1], gflop=803.9612, scores=scores), replace(ROWS[2], top1=None, scores={"diversity_latents": 0.25})]
    headings = "captions, row, top-1, Frechet, FID, KID, precision (judge), CLIP score, diversity (latents), ms per image, GFLOP, images"
    assert table(rows) == (
        headings.split(", "),
        [
            ["train", "teacher", "91.3%", "20.500", "21.500", "0.0123", "50.0%", "31.84", "", "512.2", "804", "288"],
            ["heldout", "kd", "", "99.000", "", "", "", "", "0.250", "300.0", "", "72"],
        ],
    )
    alone = [replace(ROWS[0], scores={"kid_judge": 0.5, "recall_judge": 1.0})]
    assert markdown(alone).splitlines()[0] == "| captions | row | top-1 | Frechet | KID | recall | images |"
    assert Row(**json.loads(json.dumps(rows[0].as_dict()))) == rows[0]


def test_many_columns_become_several_tables() -> None:
    scores = {f"{metric}_{network}": 1.5 for network in ("judge", "clip") for metric in ("frechet", "kid", "diversity")}
    text = text_of([replace(ROWS[0], latency_ms=7.25, scores=scores), replace(ROWS[1], scores=scores)])
    heads = [line for line in text.splitlines() if "captions" in line]
    assert len(heads) == 1
    text = text_of([replace(ROWS[1], gflop=2.0, scores={**scores, "clip_score": 30.0, "recall_clip": 0.25})])
    heads = [line for line in text.splitlines() if "captions" in line]
    assert len(heads) == 2 and "images" in heads[1] and "images" not in heads[0]
    assert text.count("teacher") == 2 and text.count("scored by") == 1


def test_a_card_without_a_world_says_so(tmp_path: Path) -> None:
    teacher = tiny_teacher(tmp_path / "teacher")
    data = {**tiny_recipe(teacher), "data": {"prompts": "my/prompts.txt"}}
    del data["world"]
    folder = tiny_folder(tmp_path / "bundle")
    bundle.seal(folder, "tiny", lineage={"teacher": "t"})
    rows = [Row(None, "train", "final", None, None, None, 4.5, 8, gflop=2.5, scores={"diversity_latents": 0.25})]
    manifest = add_card(folder, DistillRecipe.model_validate(data), rows, None, ["KID was not measured: no network"])
    assert manifest.metrics == {"train_diversity_latents": 0.25}
    assert read_rows(folder) == rows
    card = (folder / "README.md").read_text()
    assert "for the prompts of `my/prompts.txt`" in card and "**Note**: KID was not measured: no network." in card
    assert "Apache" not in card and "None" not in card and "top-1" not in card


@pytest.mark.parametrize("row", ROWS)
def test_rows_survive_json(row: Row) -> None:
    assert Row(**json.loads(json.dumps(row.as_dict()))) == row
