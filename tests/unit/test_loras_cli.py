"""`sdxs loras` and `sdxs generate --lora`: published, listed, moved, drawn with, refused."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdxs import Lora, cli, images
from sdxs.pipeline import OneStepPipeline
from sdxs.settings import Settings
from tests.loras import tiny_lora


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDXS_STORE_URL", f"file://{tmp_path / 'store'}")
    monkeypatch.setenv("SDXS_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def style(tiny_bundle: Path, tmp_path: Path) -> Path:
    return tiny_lora(tiny_bundle, tmp_path / "style", seed=1)


def sdxs(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Exit code of `sdxs ARGUMENTS`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["sdxs", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_lora_is_published_shown_and_moved(
    tiny_bundle: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    about = ("--model", tiny_bundle, "--trigger", "blob", "--trigger", "wet", "--description", "blobs")
    assert sdxs(monkeypatch, "loras", "publish", style, "--name", "blobs", *about) == 0
    first = capsys.readouterr().out.strip()
    other = tiny_lora(tiny_bundle, tmp_path / "other", seed=2)
    assert sdxs(monkeypatch, "loras", "publish", other, "--name", "blobs", "--model", tiny_bundle) == 0
    second = capsys.readouterr().out.strip()
    assert first != second
    assert sdxs(monkeypatch, "loras", "list", "--model", "tiny", "--json") == 0
    [line] = json.loads(capsys.readouterr().out)
    assert (line["name"], line["pointer"], line["digest"], line["manifest"]["model"]) == ("blobs", "prod", second, "tiny")
    assert sdxs(monkeypatch, "loras", "rollback", "blobs") == 0
    assert sdxs(monkeypatch, "loras", "promote", "blobs@canary", second) == 0
    capsys.readouterr()
    assert sdxs(monkeypatch, "loras", "show", "blobs", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["digest"], shown["trigger_words"], shown["description"]) == (first, ["blob", "wet"], "blobs")
    assert shown["networks"] == {"text_encoder": 4, "unet": 30} and shown["rank"] == 2
    assert sdxs(monkeypatch, "loras", "show", "blobs") == 0 and "blob, wet" in capsys.readouterr().out
    assert sdxs(monkeypatch, "loras", "list") == 0 and "blobs@canary" in capsys.readouterr().out


def test_generate_draws_with_a_published_one_and_a_file(
    tiny_bundle: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_lora(tiny_bundle, tmp_path / "other", seed=2, text=())
    assert sdxs(monkeypatch, "loras", "publish", style, "--name", "blobs", "--model", tiny_bundle) == 0
    digest = capsys.readouterr().out.strip()
    output = tmp_path / "apple.png"
    both = ("--lora", "blobs:0.8", "--lora", other)
    assert sdxs(monkeypatch, "generate", "red apple", "-o", output, "--model", tiny_bundle, "--seed", 7, *both) == 0
    data = output.read_bytes()
    pipeline = OneStepPipeline.from_bundle(tiny_bundle, Settings())
    expected = pipeline("red apple", seed=7, loras=[Lora(digest, 0.8), Lora(other)])[0]
    assert (np.asarray(Image.open(io.BytesIO(data))) == np.asarray(expected)).all()
    told = json.loads(images.receipt_text(data))["loras"]
    assert told[0] == {"name": "blobs", "digest": digest, "scale": 0.8}
    assert (told[1]["name"], told[1]["scale"]) == ("other", 1.0)


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        ("blobs:loud", 2, "a number"),
        ("blobs:nan", 2, "-10 to 10"),
        ("blobs:11", 2, "-10 to 10"),
        ("nobody:0.5", 3, "'nobody' is not known"),
        ("sha256:" + "0" * 64, 3, "not in the store"),
        ("./nowhere:0.5", 2, "nowhere"),
    ],
)
def test_generate_refuses_in_a_sentence(
    tiny_bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    asked: str,
    code: int,
    words: str,
) -> None:
    assert sdxs(monkeypatch, "generate", "a", "-o", tmp_path / "a.png", "--model", tiny_bundle, "--lora", asked) == code
    found = capsys.readouterr().err
    assert words in found and "Traceback" not in found


def test_publish_refuses_what_does_not_fit(
    tiny_bundle: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sdxs(monkeypatch, "loras", "publish", style, "--name", "blobs", "--model", "emoji") == 2
    assert "a LoRA made for this model" in capsys.readouterr().err
    assert sdxs(monkeypatch, "loras", "publish", tmp_path / "none", "--name", "blobs", "--model", tiny_bundle) == 2
    assert sdxs(monkeypatch, "loras", "publish", style, "--name", "No", "--model", tiny_bundle) == 2
    assert sdxs(monkeypatch, "loras", "show", "blobs") == 3
    assert sdxs(monkeypatch, "loras", "list", "--json") == 0
    assert capsys.readouterr().out == "[]\n"
