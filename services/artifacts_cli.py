"""`sdxs artifacts`: images of jobs and images that steer, in the store."""

import asyncio
import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Column, Table

from sdxs.client import DEFAULT_ADDRESS, Client
from sdxs.errors import InvalidRequest, Unavailable
from sdxs.store import Entry, open_store
from sdxs.store.metadata import decode
from services.fabric.jobs import open_queue
from services.fabric.keys import INPUTS, RESULTS
from services.settings import ServingSettings
from services.worker import sweep as retention

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Images of jobs and images that steer: list, show, sweep, upload.",
)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_artifacts(
    kind: Annotated[Literal["results", "inputs"] | None, typer.Option(help="Images of jobs, or images that steer.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is in the store that the settings name.

    \b
    sdxs artifacts list
    SDXS_STORE_URL=s3://sdxs SDXS_S3_ENDPOINT=s3.example.org sdxs artifacts list --kind inputs --json
    """
    store = open_store(ServingSettings(), "artifacts")
    prefixes = [RESULTS, INPUTS] if kind is None else [f"{kind}/"]
    _print([entry for prefix in prefixes for entry in store.entries(prefix)], as_json)


@app.command()
def show(key: Annotated[str, typer.Argument(help="As `list` prints it.")]) -> None:
    """What the store knows of a file, as JSON: size, time, and of an image of a job its prompt, seed, model and times.

    \b
    sdxs artifacts show results/5f1d9c0a7be34e02/0.jpg
    """
    stat = open_store(ServingSettings(), "artifacts").stat(key)
    facts = {"size": stat.size, "modified": _time(stat.modified), "type": stat.content_type}
    typer.echo(json.dumps({**facts, **decode(stat.metadata)}, indent=2))


@app.command()
def sweep(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete what is older than SDXS_RESULTS_TTL_S and SDXS_INPUTS_TTL_S and needed by no job. Workers do the same now and then.

    Needs the SDXS_REDIS_URL of the jobs; empty: there are none.

    \b
    sdxs artifacts sweep --dry-run
    SDXS_INPUTS_TTL_S=3600 sdxs artifacts sweep
    """
    settings = ServingSettings()

    async def main() -> retention.Swept:
        queue = open_queue(settings) if settings.redis_url else None
        try:
            return await retention.sweep(queue, open_store(settings, "artifacts"), settings, dry_run)
        except RedisError as error:
            raise Unavailable(f"the job queue does not answer, so what jobs need is not known: {error}") from error
        finally:
            if queue is not None:
                await queue.close()

    swept = asyncio.run(main())
    _print(swept.deleted, as_json)
    if not as_json:
        done = "would be deleted" if dry_run else "deleted"
        typer.echo(f"{len(swept.deleted)} {done}, {len(swept.kept)} old ones kept for jobs")


@app.command()
def upload(
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG or WebP file.")],
    server: Annotated[str, typer.Option(help="host:port of a gateway.")] = DEFAULT_ADDRESS,
) -> None:
    """Send an image to a server's store; prints the name that `sdxs generate --control` and requests take.

    \b
    sdxs artifacts upload sketch.png
    sdxs generate "crescent moon" -o moon.png --server 127.0.0.1:8500 --control sdxs-input:9c1f... --control-type sketch
    """
    try:
        data = image.read_bytes()
    except OSError as error:
        raise InvalidRequest("image", str(image), f"a file that can be read ({error.strerror})") from error
    with Client(server) as client:
        typer.echo(client.upload(data))


def _print(entries: list[Entry], as_json: bool) -> None:
    """A line each."""
    if as_json:
        rows = [{"key": entry.key, "size": entry.size, "modified": _time(entry.modified)} for entry in entries]
        typer.echo(json.dumps(rows))
        return
    widest = max((len(entry.key) for entry in entries), default=0)  # keys are there to be copied
    table = Table(Column("key", no_wrap=True, min_width=widest), Column("bytes", justify="right"), "modified", box=None)
    for entry in entries:
        table.add_row(entry.key, str(entry.size), _time(entry.modified))
    Console().print(table)


def _time(at: datetime) -> str:
    return at.isoformat(timespec="seconds")
