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

from sdxs import registry
from sdxs.settings import Settings
from sdxs.store import open_store

train = typer.Typer(add_completion=False, rich_markup_mode=None)
evaluate = typer.Typer(add_completion=False, rich_markup_mode=None)
demo = typer.Typer(add_completion=False, rich_markup_mode=None)
bench = typer.Typer(add_completion=False, rich_markup_mode=None)


@train.command()
def train_recipe(
    recipe: Annotated[str, typer.Argument(help="Built-in recipe name or a .toml file.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for the result; out/<recipe> by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray Train workers.")] = 1,
    teachers: Annotated[int, typer.Option(min=1, help="Members of the teacher pool.")] = 1,
) -> None:
    """Run RECIPE on Ray: on the cluster RAY_ADDRESS names, else on this machine. Interrupted runs resume; finished stages are reused.

    \b
    sdxs train emoji                    distil the embedded emoji teacher
    sdxs train scenes -o out/scenes     the small procedural world: minutes
    sdxs train emoji-teacher            train the teacher itself: hours on CPU
    sdxs train mine.toml --workers 8 --teachers 4
    """
    from trainer import recipe as recipes
    from trainer.runs import run_recipe

    chosen = recipes.load(recipe)
    run_recipe(chosen, output or Path("out") / chosen.name, workers, teachers)


@evaluate.command()
def evaluate_model(
    model: Annotated[str, typer.Argument(help="Bundle: name, name@pointer, sha256:digest or folder.")] = "emoji",
    images: Annotated[int | None, typer.Option(min=2, help="Images a split; the recipe's numbers by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Score MODEL beside its teacher: retrieval, Frechet distance, latency; training and held-out captions.

    \b
    sdxs eval emoji
    sdxs eval ./out/emoji --images 64 --json
    """
    from trainer import recipe as recipes
    from trainer.artifacts import Artifacts
    from trainer.card import read_rows
    from trainer.report import console_table
    from trainer.scoring import compare, with_recorded

    settings = Settings()
    folder, manifest = registry.open_model(model, settings)
    recipe = recipes.of_bundle(folder)
    evaluation = recipe.evaluation
    if images is not None:
        evaluation = evaluation.model_copy(update={"train_images": images, "heldout_images": images})
    artifacts = Artifacts(open_store(settings), settings.cache_dir / "artifacts")
    console = Console(stderr=True)
    with console.status("scoring") as status:
        comparison = compare(folder, manifest, recipe.world, evaluation, artifacts)
        rows = with_recorded(comparison.timed(comparison.scores(status.update)), read_rows(folder))
    if as_json:
        typer.echo(json.dumps([row.as_dict() for row in rows]))
        return
    Console().print(console_table(rows, comparison.judge))


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
    model: Annotated[str, typer.Argument(help="Bundle: name, name@pointer, sha256:digest or folder.")] = "emoji",
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
