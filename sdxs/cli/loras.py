"""`sdxs loras`: LoRAs by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from sdxs.lora import published
from sdxs.settings import Settings
from sdxs.store import open_store

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Publish, list and show LoRAs; move their names.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="name or name@pointer.")]


@app.command("list")
def list_loras(
    model: Annotated[str, typer.Option(help="Only those made for the model of this name.")] = "", as_json: AsJson = False
) -> None:
    """Every name and what it points at.

    \b
    sdxs loras list
    sdxs loras list --model emoji --json
    """
    found = [each for each in published.listing(open_store(Settings(), "models")) if model in ("", each.manifest.model)]
    if as_json:
        told = [{**vars(each), "manifest": each.manifest.model_dump(mode="json")} for each in found]
        typer.echo(json.dumps(told))
        return
    table = Table("name", "model", "rank", "trigger words", "digest", "since", box=None)
    for each in found:
        about = each.manifest
        words = ", ".join(about.trigger_words)
        table.add_row(f"{each.name}@{each.pointer}", about.model, str(about.rank), words, each.digest[:19], each.at)
    Console().print(table)


@app.command()
def show(lora: Annotated[str, typer.Argument(help="name, name@pointer or sha256:digest.")], as_json: AsJson = False) -> None:
    """A LoRA's facts: what it is for, what it changes, how large it is.

    \b
    sdxs loras show watercolour
    sdxs loras show watercolour@prod --json
    """
    manifest = published.read_manifest(lora, open_store(Settings(), "models"))
    if as_json:
        typer.echo(json.dumps({"digest": manifest.digest, **manifest.model_dump(mode="json")}))
        return
    table = Table("", Column(overflow="fold"), show_header=False, box=None)
    facts = {
        "name": manifest.name, "digest": manifest.digest, "model": manifest.model, "fits": manifest.base, "rank": str(manifest.rank),
        "layers": ", ".join(f"{count} of {network}" for network, count in manifest.networks.items()),
        "trigger words": ", ".join(manifest.trigger_words), "description": manifest.description,
        "size": f"{manifest.file.size / 1e6:.1f} MB", "created": manifest.created,
    }  # fmt: skip
    for name, value in facts.items():
        table.add_row(name, value)
    Console().print(table)


@app.command()
def publish(
    path: Annotated[Path, typer.Argument(help="A .safetensors file, or a folder that diffusers or PEFT saved.")],
    name: Annotated[str, typer.Option(help="name or name@pointer; it points at this LoRA from now on.")],
    model: Annotated[str, typer.Option(help="What it was made for: name, name@pointer, digest or folder.")],
    trigger: Annotated[list[str] | None, typer.Option(help="Word that the prompt should have; may be repeated.")] = None,
    description: Annotated[str, typer.Option(help="A sentence on it.")] = "",
) -> None:
    """Check a LoRA against its model, upload it, and point its name at it; prints its digest.

    \b
    sdxs loras publish out/style --name watercolour --model emoji
    sdxs loras publish style.safetensors --name watercolour@canary --model emoji --trigger watercolour
    """
    from sdxs.cli.generate import quiet

    quiet()
    from sdxs.lora.publishing import publish as put

    typer.echo(put(path, name, model, Settings(), tuple(trigger or ()), description).digest)


@app.command()
def promote(name: Name, digest: Annotated[str, typer.Argument(help="sha256:... of a published LoRA.")]) -> None:
    """Point a name at a LoRA; requests use it within seconds.

    \b
    sdxs loras promote watercolour sha256:1f0c...
    """
    base, pointer = published.split_reference(name, "name")
    found = published.promote(base, pointer, digest, open_store(Settings(), "models"))
    typer.echo(f"{base}@{pointer} -> {found}")


@app.command()
def rollback(name: Name) -> None:
    """Point a name back at the LoRA before.

    \b
    sdxs loras rollback watercolour
    """
    base, pointer = published.split_reference(name, "name")
    found = published.names(open_store(Settings(), "models")).rollback(base, pointer)
    typer.echo(f"{base}@{pointer} -> {found}")
