"""`sdxs data`: look at a data set before training does."""

from __future__ import annotations

import json
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdxs.errors import InvalidRequest, NotFound
from sdxs.settings import Settings

if TYPE_CHECKING:
    from trainer.data.check import Limits, Report

app = typer.Typer(
    add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Check prompts and captioned images, and show them."
)
Source = Annotated[str, typer.Argument(help="File, folder, glob or s3://bucket/path.")]
Column = Annotated[str, typer.Option(help="JSON field or Parquet column of the caption.")]
Format = Annotated[
    str | None, typer.Option("--format", help="text, jsonl, parquet or webdataset; of images: folder or webdataset.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command()
def check(  # noqa: PLR0913
    source: Source,
    images: Annotated[bool, typer.Option("--images", help="Captioned images, not prompts alone.")] = False,
    kind: Format = None,
    column: Column = "caption",
    size: Annotated[int, typer.Option(min=1, help="Pixels an image must have on its short side.")] = 1,
    teacher: Annotated[Path | None, typer.Option(help="Teacher folder, whose tokenizer counts the tokens.")] = None,
    limit: Annotated[int, typer.Option(min=0, help="Faults listed at most.")] = 20,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with SOURCE, row by row: exit code 0 when nothing is, 1 when something is. RAY_ADDRESS: on that cluster.

    \b
    sdxs data check prompts.txt
    sdxs data check 's3://data/prompts/*.jsonl' --column text --teacher sd21
    sdxs data check photos --images --size 512
    sdxs data check 'shards/*.tar' --images --json --limit 1000
    """
    from trainer.data.check import check_images, check_prompts
    from trainer.data.files import find

    limits, files = _limits(limit, teacher), find(source, Settings(), "source")
    with _cluster():
        report = check_images(files, kind, column, size, limits) if images else check_prompts(files, kind, column, limits)
    if as_json:
        typer.echo(json.dumps(report.as_dict()))
    else:
        _print(report)
    raise typer.Exit(1 if report.kinds else 0)


@app.command()
def show(  # noqa: PLR0913
    source: Source,
    kind: Format = None,
    column: Column = "caption",
    heldout: Annotated[int, typer.Option(min=0, help="Prompts to hold out, as data.heldout of a recipe.")] = 256,
    seed: Annotated[int, typer.Option(help="Of the order, as a recipe's.")] = 0,
    count: Annotated[int, typer.Option("-n", min=1, help="Prompts to print of each split.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Read the prompts of SOURCE as training does, and print how many there are and the first in training's order.

    \b
    sdxs data show prompts.txt
    sdxs data show 's3://data/prompts/*.parquet' --column text --heldout 1000 -n 20
    """
    from trainer.data.order import Order
    from trainer.data.prompts import open_prompts
    from trainer.sections import DataSection

    if kind not in (None, *(formats := ("text", "jsonl", "parquet", "webdataset"))):
        raise InvalidRequest("--format", kind, ", ".join(formats))
    section = DataSection.model_validate({"prompts": source, "format": kind, "column": column, "heldout": heldout})
    with _cluster():
        table = open_prompts(section, Settings())
    first = table.take("train", Order(table.count("train"), seed).take(0, min(count, table.count("train"))))
    held = table.take("heldout", range(min(count, table.count("heldout"))))
    counts = {name: table.facts[name] for name in ("digest", "rows", "duplicates", "characters")} | table.facts["counts"]
    if as_json:
        typer.echo(json.dumps(counts | {"first": first, "held": held}))
        return
    shown = Table("", "", show_header=False, box=None)
    for name, value in [*counts.items(), ("first", "\n".join(first)), ("held out", "\n".join(held))]:
        shown.add_row(name, Text(str(value)))
    Console().print(shown)


def _cluster() -> AbstractContextManager[None]:
    """The cluster of RAY_ADDRESS, if it is set; else this process reads alone, sooner than a local Ray would start."""
    if "RAY_ADDRESS" not in os.environ:
        return nullcontext()
    from trainer.session import ray_session

    return ray_session()


def _limits(faults: int, teacher: Path | None) -> Limits:
    from trainer.data.check import Limits

    if teacher is None:
        return Limits(faults)
    from transformers import CLIPTokenizer

    folder = teacher / "tokenizer"
    if not folder.is_dir():
        raise NotFound(f"--teacher: {str(folder)!r} is not there; a diffusers text-to-image folder has it")
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return Limits(faults, tokenizer.model_max_length, lambda captions: [len(ids) for ids in tokenizer(captions)["input_ids"]])


def _print(report: Report) -> None:
    from trainer.data.kinds import KINDS

    console = Console(soft_wrap=True, highlight=False)
    for fault in report.faults:
        line = f"{fault.place}  {fault.field}: {fault.what}; allowed: {KINDS[fault.kind].allowed}"
        console.print(line, markup=False)
    if left := report.kinds.total() - len(report.faults):
        console.print(f"... and {left} more")
    table = Table("", "rows", "in training", box=None)
    for kind, number in report.kinds.most_common():
        table.add_row(kind, str(number), KINDS[kind].training)
    table.add_row("good", f"{report.good} of {report.rows}", "taken")
    console.print(table)
