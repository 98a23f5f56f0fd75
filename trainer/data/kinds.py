"""The kinds of fault that a row can have, what is allowed instead, and what training does with such a row."""

from __future__ import annotations

from dataclasses import dataclass

from sdxs.errors import InvalidRequest
from trainer.data.rows import Row


@dataclass(frozen=True)
class Kind:
    """`allowed` in place of what is there; in training the row is `refused`, `dropped` or `cut off`."""

    allowed: str
    training: str = "refused"


KINDS = {
    "file": Kind("a whole file of the format its name says"),
    "column": Kind("a column of the name that --column or the recipe says"),
    "encoding": Kind("UTF-8"),
    "json": Kind("one JSON object a line"),
    "missing": Kind("a caption"),
    "type": Kind("a string"),
    "empty": Kind("a caption of at least one character"),
    "control": Kind("no control characters but white space"),
    "duplicate": Kind("each row once", "dropped"),
    "tokens": Kind("no more tokens than the text encoder reads, start and end included", "cut off"),
    "image": Kind("a whole JPEG, PNG or WebP image"),
    "extension": Kind("the ending of the format that the file has"),
    "small": Kind("at least as many pixels on the short side as training takes"),
    "bomb": Kind("at most 89 million pixels"),
    "partner": Kind("an image and its caption under one name"),
}

OF_FILE = ("file", "column")  # no row has these, but a whole file


def refusal(field: str, source: str, file: str, row: Row) -> InvalidRequest:
    """The error for the first wrong row of a data set."""
    place = f"{file}:{row.row}" if row.row else file
    advice = f'{KINDS[row.kind or "file"].allowed}, in {row.field} ("sdxs data check {source}" lists every row)'
    return InvalidRequest(field, f"{place}: {row.what}", advice)
