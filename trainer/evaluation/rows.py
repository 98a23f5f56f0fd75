"""The lines of an evaluation, and the table they make: columns that no line fills are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    """One line of the report. Shares are in [0, 1]; None is what was not, or cannot be, measured.

    `world` has the judge of `top1`, `top5` and `frechet`; without one the three are None. `latency_ms` is per image at batch 1, `gflop`
    10^9 FLOPs (2 per multiply-add) of the same image. `scores` are `<metric>_<network>`: frechet, kid, precision, recall, diversity;
    and those of `NAMED`. `condition` is the kind of control images that the line is about.
    """

    world: str | None
    split: str
    row: str
    top1: float | None
    top5: float | None
    frechet: float | None
    latency_ms: float | None
    images: int
    recorded: bool = False  # taken from the bundle, measured when it was made
    gflop: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    condition: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what a line of an older bundle does not have is left out where it says nothing."""
        later: dict[str, Any] = {"recorded": False, "gflop": None, "scores": {}, "condition": None}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}


@dataclass(frozen=True)
class Column:
    """A heading, and the text of a line under it."""

    heading: str
    cell: Callable[[Row], str]


Value = Callable[[Row], float | None]
METRICS = {"frechet": "Frechet", "kid": "KID", "precision": "precision", "recall": "recall", "diversity": "diversity"}
NAMED = {
    "clip_score": ("CLIP score", ".2f"),
    "edge_f1": ("edge F1", ".3f"),
    "colour_error": ("colour error", ".1f"),
    "ms_with_map": ("ms with map", ".1f"),
    "times_faster": ("times faster", ".1f"),
}
"""Scores that no network's features are needed for: heading and format."""


def _number(value: Value, form: str) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        found = value(row)
        return "" if found is None else format(found, form)

    return cell


def _score(key: str, alone: bool) -> Column:
    """The column of one of `Row.scores`; says that the judge saw it unless no other network did."""
    if key in NAMED:
        heading, form = NAMED[key]
        return Column(heading, _number(lambda row: row.scores.get(key), form))
    metric, _, network = key.partition("_")
    name = {"inception": "", "clip": " (CLIP)", "judge": "" if alone else " (judge)"}.get(network, f" ({network})")
    heading = "FID" if key == "frechet_inception" else METRICS.get(metric, metric) + name
    form = ".1%" if metric in ("precision", "recall") else ".4f" if metric == "kid" else ".3f"
    return Column(heading, _number(lambda row: row.scores.get(key), form))


def columns(rows: list[Row]) -> list[Column]:
    """Those that at least one row fills."""
    keys = dict.fromkeys(key for row in rows for key in row.scores)
    alone = all(key.endswith("_judge") for key in keys if key not in NAMED)
    every = [
        Column("captions", lambda row: row.split),
        Column("condition", lambda row: row.condition or ""),
        Column("row", lambda row: f"{row.row} *" if row.recorded else row.row),
        Column("top-1", _number(lambda row: row.top1, ".1%")),
        Column("top-5", _number(lambda row: row.top5, ".1%")),
        Column("Frechet", _number(lambda row: row.frechet, ".3f")),
        *(_score(key, alone) for key in keys),
        Column("ms per image", _number(lambda row: row.latency_ms, ".1f")),
        Column("GFLOP", _number(lambda row: row.gflop, ".4g")),
        Column("images", lambda row: str(row.images)),
    ]
    return [column for column in every if any(column.cell(row) for row in rows)]


def table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of text."""
    shown = columns(rows)
    return [column.heading for column in shown], [[column.cell(row) for column in shown] for row in rows]


def markdown(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    headings, lines = table(rows)
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, ["---"] * len(headings), *lines])
