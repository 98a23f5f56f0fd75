"""`sdxs eval`: one bundle beside its teacher, several beside each other, or one by a protocol. The composition root of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from sdxs import registry
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.evaluation import protocol as protocols
from trainer.evaluation.card import read_rows
from trainer.evaluation.compare import compare_bundles, write_page
from trainer.evaluation.metrics.networks import Networks
from trainer.evaluation.protocol_run import default_folder, run_protocol
from trainer.evaluation.report import WideTable, console_table
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import best_device, compare_recipe, with_recorded
from trainer.tracking.progress import Bars

PAGE = "comparison.html"


@dataclass(frozen=True)
class Request:
    """What was asked for. `inception` and `clip` name networks, `protocol` a built-in one or a file, `output` where results go."""

    models: list[str]
    images: int | None = None
    inception: str | None = None
    clip: str | None = None
    protocol: str | None = None
    output: Path | None = None

    def networks(self) -> Networks:
        """Those that were named."""
        return Networks.open(self.inception, self.clip, best_device())


@dataclass(frozen=True)
class Report:
    """What came out: rows, their table for a terminal, and sentences about what was not measured."""

    rows: list[Row]
    table: WideTable
    notes: list[str] = field(default_factory=list)


def evaluate_request(request: Request, settings: Settings, console: Console) -> Report:
    """Raises InvalidRequest, NotFound: the request names two models for a protocol, the same one twice, or what is not there."""
    if request.protocol is not None:
        return _by_protocol(request, settings, console)
    if len(request.models) == 1:
        return _one(request, settings, console)
    return _several(request, settings, console)


def _one(request: Request, settings: Settings, console: Console) -> Report:
    folder, manifest = registry.open_model(request.models[0], settings)
    recipe, networks = recipes.of_bundle(folder), request.networks()
    if request.output is not None:
        raise InvalidRequest("output", str(request.output), "no output for one bundle: the page compares several")
    if request.images is not None:
        counts = {"train_images": request.images, "heldout_images": request.images}
        recipe = recipe.model_copy(update={"evaluation": recipe.evaluation.model_copy(update=counts)})
    with console.status("scoring") as status:
        comparison = compare_recipe(folder, manifest, recipe, settings, networks)
        rows = with_recorded(comparison.timed(comparison.scores(status.update)), read_rows(folder))
    return Report(rows, console_table(rows, comparison.judge), comparison.notes())


def _several(request: Request, settings: Settings, console: Console) -> Report:
    networks = request.networks()
    with console.status("scoring") as status:
        match = compare_bundles(request.models, request.images, networks, settings, status.update)
    page = request.output or Path("out") / PAGE
    write_page(match, page)
    console.print(f"page: {page}")
    return Report(match.rows, console_table(match.rows, match.judge), match.notes)


def _by_protocol(request: Request, settings: Settings, console: Console) -> Report:
    if len(request.models) != 1:
        raise InvalidRequest("model", " ".join(request.models), "one bundle: a protocol measures one at a time")
    assert request.protocol is not None
    protocol = protocols.load(request.protocol).with_networks(request.inception, request.clip)
    if request.images is not None:
        protocol = protocol.model_copy(update={"images": request.images})
    folder, manifest = registry.open_model(request.models[0], settings)
    output = request.output or default_folder(protocol, manifest)
    with Bars(console) as bars:
        row = run_protocol(protocol, folder, manifest, output, bars)
    console.print(f"images and result.json: {output}")
    return Report([row], WideTable([row], f"protocol {protocol.name}"))
