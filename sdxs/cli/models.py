"""`sdxs models`: bundles by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from sdxs import registry
from sdxs.settings import Settings
from sdxs.store import open_store

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="List, show, publish, promote and roll back bundles.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_models(as_json: AsJson = False) -> None:
    """Every name and what it points at.

    \b
    sdxs models list
    SDXS_MODELS_URL=s3://models SDXS_S3_ENDPOINT=s3.example.org sdxs models list --json
    """
    found = registry.listing(open_store(Settings(), "models"))
    if as_json:
        typer.echo(json.dumps([vars(entry) for entry in found]))
        return
    table = Table("name", "digest", "where", "since", box=None)
    for entry in found:
        table.add_row(f"{entry.name}@{entry.pointer}", entry.digest[:19], entry.where, entry.at)
    Console().print(table)


@app.command()
def show(
    model: Annotated[str, typer.Argument(help="name, name@pointer, sha256:digest, folder or hub id.")], as_json: AsJson = False
) -> None:
    """A bundle's facts: sizes, one-step constants, metrics, lineage.

    \b
    sdxs models show emoji
    sdxs models show emoji@prod --json
    """
    folder, manifest = registry.open_model(model, Settings())
    if as_json:
        typer.echo(json.dumps({"digest": manifest.digest, **manifest.model_dump(mode="json")}))
        return
    megabytes = sum(entry.size for entry in manifest.files.values()) / 1e6
    table = Table("", Column(overflow="fold"), show_header=False, box=None)
    facts = {
        "name": manifest.name, "digest": manifest.digest, "folder": str(folder), "size": f"{megabytes:.1f} MB",
        "image": f"{manifest.image_size} x {manifest.image_size} pixels", "latent": str(manifest.latent_shape),
        "prompt": f"at most {manifest.max_prompt_tokens} tokens", "weights": manifest.dtype,
        "one step": manifest.one_step.model_dump_json(), "recipe": manifest.recipe_hash, "created": manifest.created,
    }  # fmt: skip
    for name, value in {**facts, **{k: f"{v:g}" for k, v in manifest.metrics.items()}, **manifest.lineage}.items():
        table.add_row(name, value)
    Console().print(table)


@app.command()
def publish(
    model: Annotated[
        str, typer.Argument(help="A bundle's folder, one as diffusers or others publish it, or a hub id; see options of serve.")
    ],
) -> None:
    """Upload a bundle to the store; prints its digest.

    \b
    sdxs models publish out/emoji
    sdxs models publish "owner/name@revision?controlnet=owner/sketch&name=drawn"
    """
    settings = Settings()
    folder, _ = registry.open_sealed(Path(model) if Path(model).is_dir() else model, settings)
    typer.echo(registry.publish(folder, open_store(settings, "models")).digest)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(help="name or name@pointer.")],
    digest: Annotated[str, typer.Argument(help="sha256:... of a published bundle.")],
) -> None:
    """Point a name at a bundle; servers of that name change over to it, and lose no request.

    \b
    sdxs models promote emoji sha256:1f0c...
    sdxs models promote emoji@canary sha256:1f0c...
    """
    base, pointer = registry.split_reference(name)
    registry.promote(base, digest, open_store(Settings(), "models"), pointer)
    typer.echo(f"{base}@{pointer} -> {digest}")


@app.command()
def rollback(name: Annotated[str, typer.Argument(help="name or name@pointer.")]) -> None:
    """Point a name back at the bundle before.

    \b
    sdxs models rollback emoji
    """
    base, pointer = registry.split_reference(name)
    digest = registry.rollback(base, open_store(Settings(), "models"), pointer)
    typer.echo(f"{base}@{pointer} -> {digest}")
