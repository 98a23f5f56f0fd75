"""`sdxs data check`: every kind of fault, where it is, the counts, the exit code."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from sdxs.errors import InvalidRequest, NotFound, SdxsError
from sdxs.settings import Settings
from tests.unit.test_data_images import NOISE, encoded, picture
from tests.unit.test_data_prompts import write_tar
from trainer.data import rows
from trainer.data.check import Limits, check_prompts
from trainer.data.cli import app
from trainer.data.files import find
from trainer.data.kinds import KINDS
from trainer.sources import teacher_folder


def data(*arguments: object) -> Result:
    """`sdxs data ARGUMENTS`; our own errors are raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, SdxsError):
        raise result.exception
    return result


def faults(result: Result) -> list[tuple[str, str, str]]:
    """(place, kind, what) of each fault in the JSON."""
    return [(fault["place"], fault["kind"], fault["what"]) for fault in json.loads(result.stdout)["faults"]]


def test_a_clean_set(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    result = data("check", tmp_path / "p.txt")
    assert result.exit_code == 0
    assert re.findall(r"good +2 of 2 +taken", result.stdout)


def test_every_fault_of_prompts_with_its_row(tmp_path: Path) -> None:
    lines = [
        b'{"caption": "one"}', b'{"caption": " "}', b'{"caption": 1}', b'{"text": "x"}', b"{", b'{"caption": "\xff"}',
        b'{"caption": "a\\u0000b"}', b'{"caption": " one"}', b'{"caption": null}', b"", b'{"caption": "two"}',
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.jsonl").write_text('{"caption": "two"}\n')
    result = data("check", tmp_path, "--json")
    assert result.exit_code == 1
    assert [(place, kind) for place, kind, _ in faults(result)] == [
        ("a.jsonl:2", "empty"), ("a.jsonl:3", "type"), ("a.jsonl:4", "missing"), ("a.jsonl:5", "json"), ("a.jsonl:6", "encoding"),
        ("a.jsonl:7", "control"), ("a.jsonl:8", "duplicate"), ("a.jsonl:9", "missing"), ("a.jsonl:10", "json"), ("b.jsonl:1", "duplicate"),
    ]  # fmt: skip
    report = json.loads(result.stdout)
    assert (report["rows"], report["good"]) == (12, 2)
    assert [what for _, kind, what in faults(result) if kind == "duplicate"] == [
        "the same as a.jsonl:1",
        "the same as a.jsonl:11",
    ]
    assert report["faults"][1] == {
        "place": "a.jsonl:3", "kind": "type", "field": "caption", "what": "1 (int)", "allowed": "a string"
    }  # fmt: skip


def test_the_list_is_cut_and_the_rest_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Duplicates, which are known last, stand in the order of the rows with the others."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 3)
    (tmp_path / "p.txt").write_text("same\n\nsame\n" * 10)
    result = data("check", tmp_path / "p.txt", "--limit", 3)
    shown = [line for line in result.stdout.splitlines() if line.startswith(("p.txt", "..."))]
    assert [line.split()[0] for line in shown] == ["p.txt:2", "p.txt:3", "p.txt:4", "..."]
    assert shown[-1] == "... and 26 more"
    assert re.findall(r"duplicate +19 +dropped", result.stdout) and re.findall(r"empty +10 +refused", result.stdout)
    assert re.findall(r"good +1 of 30", result.stdout)
    assert "... and 29 more" in data("check", tmp_path / "p.txt", "--limit", 0).stdout


def test_too_many_tokens_for_the_teacher(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a red circle\n" + "red circle " * 60 + "\n")
    [(place, kind, what)] = faults(data("check", tmp_path / "p.txt", "--teacher", teacher_folder("scenes-teacher"), "--json"))
    limit = json.loads((teacher_folder("scenes-teacher") / "tokenizer/tokenizer_config.json").read_text())["model_max_length"]
    assert (place, kind) == ("p.txt:2", "tokens") and what.endswith(f"of which {limit} are read")
    with pytest.raises(NotFound, match="--teacher"):
        data("check", tmp_path / "p.txt", "--teacher", tmp_path)


@pytest.mark.parametrize("size", [10_500, 10_240, 9_728])
def test_a_tar_that_breaks_off_is_a_fault(size: int, tmp_path: Path) -> None:
    """In a header, between two members and before a content; each member takes 1,024 bytes. The last sample before it may lack a member."""
    write_tar(tmp_path / "p.tar", {f"{i}.txt": b"%d" % i for i in range(40)})
    whole = (tmp_path / "p.tar").read_bytes()
    assert data("check", tmp_path).exit_code == 0
    (tmp_path / "p.tar").write_bytes(whole[:size])
    report = check_prompts(find(str(tmp_path), Settings(), "source"), None, "caption", Limits())
    assert dict(report.kinds) == {"file": 1} and report.faults[0].place == "p.tar"
    assert report.rows == report.good == {10_500: 9, 10_240: 9, 9_728: 8}[size]


def test_a_parquet_column_that_is_not_there(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "p.parquet")
    assert faults(data("check", tmp_path, "--json")) == [("p.parquet", "column", "columns text")]
    assert data("check", tmp_path, "--column", "text").exit_code == 0


def test_every_fault_of_an_image_folder(tmp_path: Path) -> None:
    files: dict[str, bytes] = {
        "a.png": picture(1), "a.txt": b"one", "b.png": picture(1), "b.txt": b"one", "c.png": picture(2), "d.png": NOISE, "d.txt": b"two",
        "e.jpg": NOISE[:900], "e.txt": b"three", "f.png": picture(3, (4, 9)), "f.txt": b"four", "g.txt": b"alone",
        "h.png": encoded(Image.new("1", (10_000, 9_000))), "h.txt": b"five",
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    result = data("check", tmp_path, "--images", "--size", 8, "--json")
    assert [(place, kind) for place, kind, _ in faults(result)] == [
        ("b.png", "duplicate"), ("c.png", "missing"), ("d.png", "extension"), ("e.jpg", "image"), ("f.png", "small"), ("h.png", "bomb"),
        ("g.txt", "partner"),
    ]  # fmt: skip
    report = json.loads(result.stdout)
    assert (result.exit_code, report["rows"], report["good"]) == (1, 8, 1)


def test_rows_of_metadata_and_a_corrupt_shard(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x  y.png").write_bytes(picture(1))
    lines = [
        '{"file_name": "x  y.png", "caption": "one"}',
        '{"file_name": "none.png", "caption": "two"}',
        '{"caption": "three"}',
        "{",
    ]
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(lines))
    assert [(place, kind) for place, kind, _ in faults(data("check", tmp_path / "a", "--images", "--json"))] == [
        ("metadata.jsonl:2", "partner"), ("metadata.jsonl:3", "partner"), ("metadata.jsonl:4", "json"),
    ]  # fmt: skip
    write_tar(tmp_path / "s.tar", {"1.png": picture(1), "1.txt": b"one", "2.png": picture(2)})
    with (tmp_path / "s.tar").open("r+b") as file:
        file.truncate(2600)
    [fault] = faults(data("check", tmp_path / "s.tar", "--images", "--json"))
    assert fault[:2] == ("s.tar", "file")


def test_every_kind_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf8")
    assert [kind for kind in KINDS if f"`{kind}`" not in page] == []


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="source: no file"):
        data("check", tmp_path / "none")
    (tmp_path / "p.md").write_text("x")
    with pytest.raises(InvalidRequest, match="--format"):
        data("check", tmp_path / "p.md")
    with pytest.raises(InvalidRequest, match="--format"):
        data("check", tmp_path, "--format", "csv")


def test_show_prints_what_training_would_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path}/store")
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\none\n")
    shown = json.loads(data("show", tmp_path / "p.txt", "--heldout", 1, "--json").stdout)
    assert (shown["rows"], shown["duplicates"], shown["train"], shown["heldout"]) == (4, 1, 2, 1)
    assert sorted(shown["first"] + shown["held"]) == ["one", "three", "two"]
    assert shown["digest"] in data("show", tmp_path / "p.txt", "--heldout", 1).stdout


@pytest.mark.parametrize("command", ["check", "show"])
def test_help_teaches_by_example(command: str) -> None:
    result = data(command, "--help")
    assert result.exit_code == 0 and f"  sdxs data {command} " in result.stdout
