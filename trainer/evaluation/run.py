"""`sdxs eval`: one bundle beside its teacher, several beside each other, or one by a protocol. The composition root of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console

from sdxs import registry
from sdxs.errors import InvalidRequest
from sdxs.settings import Settings
from trainer import recipe as recipes
from trainer.evaluation import protocol as protocols
from trainer.evaluation.card import read_rows
from trainer.evaluation.compare import compare_bundles, write_page
from trainer.evaluation.control import ControlComparison, compare_controls, shares
from trainer.evaluation.metrics.networks import Networks
from trainer.evaluation.protocol_run import default_folder, run_protocol
from trainer.evaluation.report import WideTable, console_table
from trainer.evaluation.rows import Row
from trainer.evaluation.scoring import best_device, compare_recipe, with_recorded
from trainer.sections import EvaluationSection
from trainer.tracking.progress import Bars

PAGE = "comparison.html"
SHEET_ROWS, PICTURES = 12, (".png", ".webp", ".jpg")


@dataclass(frozen=True)
class Request:
    """What was asked for. `inception` and `clip` name networks, `protocol` a built-in one or a file, `output` where results go.
    `controls`: the bundle's ControlNets, instead of the bundle."""

    models: list[str]
    images: int | None = None
    inception: str | None = None
    clip: str | None = None
    protocol: str | None = None
    output: Path | None = None
    controls: bool = False

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
    if request.controls:
        return _controls(request, settings, console)
    if len(request.models) == 1:
        return _one(request, settings, console)
    return _several(request, settings, console)


def _one(request: Request, settings: Settings, console: Console) -> Report:
    folder, manifest = registry.open_model(request.models[0], settings)
    recipe, networks = recipes.of_bundle(folder), request.networks()
    if request.output is not None:
        raise InvalidRequest("output", str(request.output), "no output for one bundle: the page compares several")
    recipe = recipe.model_copy(update={"evaluation": _counted(recipe.evaluation, request.images)})
    with console.status("scoring") as status:
        comparison = compare_recipe(folder, manifest, recipe, settings, networks)
        rows = with_recorded(comparison.timed(comparison.scores(status.update)), read_rows(folder))
    return Report(rows, console_table(rows, comparison.judge), comparison.notes())


def _counted(evaluation: EvaluationSection, images: int | None) -> EvaluationSection:
    """With as many images of each split as were asked for."""
    return evaluation if images is None else evaluation.model_copy(update={"train_images": images, "heldout_images": images})


def _controls(request: Request, settings: Settings, console: Console) -> Report:
    """Every ControlNet of a bundle that carries its recipe; with an output, a contact sheet of each."""
    if len(request.models) != 1 or request.protocol is not None:
        raise InvalidRequest(
            "model", " ".join(request.models), "one bundle, without a protocol: controls are measured by their recipe"
        )
    if request.output is not None and request.output.suffix not in PICTURES:
        raise InvalidRequest("output", str(request.output), f"a picture for a sheet of control images: {', '.join(PICTURES)}")
    folder, manifest = registry.open_model(request.models[0], settings)
    names = sorted(path.parent.name for path in folder.glob("controlnet/*/recipe.json"))
    if not names:
        raise InvalidRequest(
            "model", request.models[0], "a bundle with a ControlNet that carries the recipe it was distilled by"
        )
    rows, notes, judge = [], [], None
    for name in names:
        own = folder / "controlnet" / name
        recipe = recipes.of_controlnet(own)
        recipe = recipe.model_copy(update={"evaluation": _counted(recipe.evaluation, request.images)})
        with console.status("scoring") as status:
            controls = compare_controls(folder, manifest, name, recipe, settings, request.networks())
            found = with_recorded(controls.timed(controls.scores(status.update)), read_rows(own))
            if request.output is not None:
                status.update("contact sheet")
                _save_sheet(controls, request.output, name if len(names) > 1 else "", console)
        judge, prefix = controls.comparison.judge, f"{name}: " if len(names) > 1 else ""
        rows += [replace(row, condition=f"{prefix}{row.condition}") for row in found]
        notes += [prefix + note for note in [*shares(found), *controls.notes()]]
    return Report(rows, console_table(rows, judge), notes)


def _save_sheet(controls: ControlComparison, output: Path, name: str, console: Console) -> None:
    path = output.with_name(f"{output.stem}-{name}{output.suffix}") if name else output
    path.parent.mkdir(parents=True, exist_ok=True)
    controls.sheet(SHEET_ROWS).save(path)
    console.print(f"contact sheet: {path}")


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
