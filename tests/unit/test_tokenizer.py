"""The worlds' tokenizers: repeatable, spelling what they do not know, the same in every file format they ship in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.models.tokenizer import tokenize, train_tokenizer

CAPTIONS = ["red apple", "green apple", "red heart", "blue heart", "apple pie"]
ROOT = Path(__file__).parents[2]


def vocabularies(folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """By the two files that loaders may choose from: tokenizer.json and vocab.json."""
    whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf8"))
    return whole["model"]["vocab"], json.loads((folder / "vocab.json").read_text(encoding="utf8"))


def test_a_resumed_run_spells_as_it_did(tmp_path: Path) -> None:
    first = train_tokenizer(CAPTIONS, tmp_path, 120, 12)
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    again = train_tokenizer([*CAPTIONS, "something new"] * 3, tmp_path, 120, 12)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept
    assert tokenize(again, CAPTIONS).tolist() == tokenize(first, CAPTIONS).tolist()


def test_unknown_words_are_spelt_and_every_row_is_padded(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(CAPTIONS, tmp_path, 120, 12)
    ids = tokenize(tokenizer, ["zebra", "red apple", ""])
    assert ids.shape == (3, 12)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "zebra"
    assert tokenizer.decode(ids[1], skip_special_tokens=True) == "red apple"
    assert set(ids[2, 1:].tolist()) == {tokenizer.eos_token_id}


@pytest.mark.parametrize(
    "folder", sorted(path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("[st][dr]*/**/tokenizer/vocab.json"))
)
def test_shipped_files_agree(folder: str) -> None:
    whole, plain = vocabularies(ROOT / folder)
    assert whole == plain


def test_written_files_agree(tmp_path: Path) -> None:
    train_tokenizer(CAPTIONS, tmp_path, 120, 12)
    whole, plain = vocabularies(tmp_path)
    assert whole == plain
