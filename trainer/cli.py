"""`sdxs train`, `eval`, `demo` and `bench`. A new knob is a new recipe field, not a new flag."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from sdxs.settings import Settings

train = typer.Typer(add_completion=False, rich_markup_mode=None)
evaluate = typer.Typer(add_completion=False, rich_markup_mode=None)
demo = typer.Typer(add_completion=False, rich_markup_mode=None)
bench = typer.Typer(add_completion=False, rich_markup_mode=None)


@train.command()
def train_recipe(  # noqa: PLR0913  (a command's options)
    recipe: Annotated[str, typer.Argument(help="Built-in recipe name or a .toml file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result; out/<recipe> by default.")
    ] = None,
    workers: Annotated[str, typer.Option(help="Ray Train workers: a number, or FEWEST:MOST for elastic training.")] = "1",
    gpus_per_worker: Annotated[float, typer.Option(min=0, help="GPUs of a worker, whole or in parts.")] = 0,
    teachers: Annotated[int, typer.Option(min=0, help="Members of the teacher pool; 0: a teacher inside each worker.")] = 1,
    gpus_per_teacher: Annotated[float, typer.Option(min=0, help="GPUs of a member, whole or in parts.")] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the recipe, print its costs, run every stage for two steps on small random weights."
        ),
    ] = False,
) -> None:
    """Run RECIPE on Ray: on the cluster RAY_ADDRESS names, else on this machine. Interrupted runs resume; finished stages are reused.

    \b
    sdxs train emoji                    distil the embedded emoji teacher
    sdxs train scenes -o out/scenes     the small procedural world: minutes
    sdxs train emoji-teacher            train the teacher itself: hours on CPU
    sdxs train mine.toml --workers 8 --gpus-per-worker 1 --teachers 4 --gpus-per-teacher 0.5
    sdxs train mine.toml --workers 2:8 --gpus-per-worker 1      elastic: goes on with what there is
    sdxs train sdxs-512 --workers 8 --gpus-per-worker 1 --gpus-per-teacher 1 --dry-run
    """
    from trainer import recipe as recipes
    from trainer.cluster import Cluster, parse_workers
    from trainer.runs import run_recipe

    chosen = recipes.load(recipe)
    cluster = Cluster(
        workers=parse_workers(workers), gpus_per_worker=gpus_per_worker, teachers=teachers, gpus_per_teacher=gpus_per_teacher
    )
    if dry_run:
        from trainer.preflight.dry_run import dry_run as rehearse

        rehearse(chosen, cluster, recipe, Console(width=max(120, Console().width)))  # of the tables
        return
    run_recipe(chosen, output or Path("out") / chosen.name, cluster, recipe)


@evaluate.command()
def evaluate_models(  # noqa: PLR0913
    models: Annotated[
        list[str] | None, typer.Argument(help="Bundles: name, name@pointer, sha256:digest, folder or hub id.")
    ] = None,
    images: Annotated[int | None, typer.Option(min=2, help="Images a split; the recipe's numbers by default.")] = None,
    inception: Annotated[str | None, typer.Option(help="Inception's weights, for FID and KID: a .pth file.")] = None,
    clip: Annotated[str | None, typer.Option(help="A CLIP model, for the CLIP score: folder or hub id.")] = None,
    protocol: Annotated[str | None, typer.Option(help="Follow a protocol: built-in name or a .toml file.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="The page of several models (.html), a protocol's folder, or a sheet of controls (.png)."
        ),
    ] = None,
    controls: Annotated[bool, typer.Option("--controls", help="Score the bundle's ControlNets instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Score a bundle (emoji by default) beside its teacher, several side by side, or one by a protocol.

    \b
    sdxs eval emoji
    sdxs eval ./out/emoji --images 64 --json
    sdxs eval emoji ./out/emoji -o page.html
    sdxs eval ./out/mine --inception weights.pth --clip openai/clip-vit-base-patch16
    sdxs eval ./out/mine --protocol coco-5k
    sdxs eval emoji --controls -o sheet.png
    """
    from trainer.evaluation.run import Request, evaluate_request

    request = Request(models or ["emoji"], images, inception, clip, protocol, output, controls)
    console = Console(stderr=True)
    report = evaluate_request(request, Settings(), console)
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in report.rows]))
        return
    Console().print(report.table)
    for note in report.notes:
        console.print(f"note: {note}", highlight=False)


@demo.command()
def demonstrate(
    quick: Annotated[bool, typer.Option("--quick", help="Under three minutes: everything runs, pictures stay rough.")] = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for results and state.")] = Path("out/demo"),
) -> None:
    """Distil, evaluate, publish, serve and look: the whole system once, on this machine.

    \b
    sdxs demo
    sdxs demo --quick
    """
    from trainer.session import ray_session

    with ThreadPoolExecutor(1) as background, ExitStack() as session:
        module = background.submit(import_module, "trainer.demo")  # seconds of imports, while Ray starts
        session.enter_context(ray_session())
        module.result().run_demo(output, quick, session)


@bench.command()
def benchmark(
    model: Annotated[str, typer.Argument(help="Bundle: name, name@pointer, sha256:digest, folder or hub id.")] = "emoji",
    repeats: Annotated[int, typer.Option(min=3, help="Timed repetitions; medians are printed.")] = 30,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Latency of each stage of MODEL at batch 1, in this process.

    \b
    sdxs bench emoji
    sdxs bench ./out/emoji --repeats 100 --json
    """
    from trainer.bench import stage_latencies

    medians = stage_latencies(model, repeats)
    if as_json:
        typer.echo(json.dumps(medians))
        return
    table = Table("stage", "median ms")
    for stage, value in medians.items():
        table.add_row(stage, f"{value:.2f}")
    Console().print(table)
