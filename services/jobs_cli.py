"""`sdxs jobs`: jobs of a server, and the dead ones of its queue."""

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterable
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

import typer
from google.protobuf.json_format import MessageToDict, MessageToJson
from redis.exceptions import RedisError
from rich.console import Console
from rich.table import Column, Table

from sdxs.client import DEFAULT_ADDRESS, Client, Job
from sdxs.errors import InvalidRequest, PreconditionFailed, Unavailable
from sdxs.v1 import gateway_pb2
from services.fabric.dead_jobs import dead_jobs, find_dead, replay, request_of
from services.fabric.jobs import JobQueue, open_queue
from services.settings import ServingSettings

T = TypeVar("T")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="List, show, watch and cancel jobs; replay dead ones.",
)
dead_app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Jobs given up after the last delivery; needs SDXS_REDIS_URL.",
)
app.add_typer(dead_app, name="dead")

Server = Annotated[str, typer.Option(help="host:port of a gateway.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobId = Annotated[str, typer.Argument(help="An id from SubmitJob.")]


@app.command("list")
def list_jobs(
    state: Annotated[
        list[str] | None, typer.Option(help="queued, running, succeeded, failed or cancelled; may be given again.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Most jobs.")] = 50,
    server: Server = DEFAULT_ADDRESS,
    as_json: AsJson = False,
) -> None:
    """Jobs of a server, the newest first.

    \b
    sdxs jobs list
    sdxs jobs list --state queued --state running --limit 200
    sdxs jobs list --server images.example.org:8500 --json
    """
    found: list[Job] = []
    token = ""
    with Client(server) as client:
        while len(found) < limit:
            page = client.list_jobs(state or [], min(200, limit - len(found)), token)
            found.extend(page.jobs)
            token = page.next_page_token
            if not token:
                break
    if as_json:
        typer.echo(json.dumps([MessageToDict(job) for job in found]))
        return
    table = Table(_ids(job.job_id for job in found), "state", "priority", "done", "created", box=None)
    for job in found:
        created = job.created.ToDatetime(UTC)
        table.add_row(job.job_id, _state(job), _name(gateway_pb2.JobPriority, job.priority), _progress(job), _time(created))
    Console().print(table)


@app.command()
def show(job_id: JobId, server: Server = DEFAULT_ADDRESS) -> None:
    """All that the server tells of a job, as JSON: state, position, images with URLs, errors.

    \b
    sdxs jobs show 5f1d9c0a7be34e02
    """
    with Client(server) as client:
        typer.echo(MessageToJson(client.get_job(job_id)))


@app.command()
def watch(job_id: JobId, server: Server = DEFAULT_ADDRESS) -> None:
    """A line for each change of a job, until it has ended.

    \b
    sdxs jobs watch 5f1d9c0a7be34e02
    """
    with Client(server) as client:
        for job in client.watch_job(job_id):
            where = f", position {job.position}" if job.position else ""
            typer.echo(f"{_state(job)}, {_progress(job)} done{where}")


@app.command()
def cancel(job_id: JobId, server: Server = DEFAULT_ADDRESS) -> None:
    """End a job that has not ended; what a batch has made by then is kept.

    \b
    sdxs jobs cancel 5f1d9c0a7be34e02
    """
    with Client(server) as client:
        typer.echo(f"{job_id}: {_state(client.cancel_job(job_id))}")


@dead_app.command("list")
def list_dead(limit: Annotated[int, typer.Option(min=1, help="Most jobs.")] = 50, as_json: AsJson = False) -> None:
    """Dead jobs and why they died, the last first.

    \b
    SDXS_REDIS_URL=redis://127.0.0.1:6379/0 sdxs jobs dead list
    sdxs jobs dead list --limit 1000 --json
    """

    async def read(queue: JobQueue) -> list[dict[str, str]]:
        found = [dead async for dead in dead_jobs(queue, limit)]
        return [{"job": dead.job_id, "died": _time(dead.at), "why": dead.why} for dead in found]

    rows = _with_queue(read)
    if as_json:
        typer.echo(json.dumps(rows))
        return
    table = Table(_ids(row["job"] for row in rows), "died", "why", box=None)
    for row in rows:
        table.add_row(row["job"], row["died"], row["why"])
    Console().print(table)


@dead_app.command("show")
def show_dead(job_id: JobId) -> None:
    """A dead job as JSON: why it died, what it asked for, and what a batch has made.

    \b
    sdxs jobs dead show 5f1d9c0a7be34e02
    """

    async def read(queue: JobQueue) -> dict[str, Any]:
        dead = await find_dead(queue, job_id)
        request = await request_of(queue, job_id)
        return {
            "why": dead.why,
            "died": _time(dead.at),
            "request": _without_bytes(MessageToDict(request)),
            "job": MessageToDict(await queue.get(job_id)),
        }

    typer.echo(json.dumps(_with_queue(read), indent=2))


@dead_app.command("replay")
def replay_dead(
    job_ids: Annotated[list[str] | None, typer.Argument(help="Ids of dead jobs.")] = None,
    every: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Queue dead jobs again, under their ids, when what killed them is mended. A batch keeps what it has made.

    \b
    sdxs jobs dead replay 5f1d9c0a7be34e02
    sdxs jobs dead replay --all
    """
    if bool(job_ids) == every:
        raise InvalidRequest("job_ids", job_ids or "", "some ids, or --all")

    async def again(queue: JobQueue) -> None:
        for job_id in job_ids or ():
            await replay(queue, await find_dead(queue, job_id))
            typer.echo(f"{job_id}: queued")
        for dead in reversed([dead async for dead in dead_jobs(queue)] if every else []):
            try:
                await replay(queue, dead)
                typer.echo(f"{dead.job_id}: queued")
            except PreconditionFailed as error:
                typer.echo(f"{dead.job_id}: {error}", err=True)

    _with_queue(again)


def _with_queue(work: Callable[[JobQueue], Coroutine[Any, Any, T]]) -> T:
    """Run it on the queue that the settings name. Raises Unavailable when Redis does not answer."""

    async def main() -> T:
        queue = open_queue(ServingSettings())
        try:
            return await work(queue)
        except RedisError as error:
            raise Unavailable(f"the job queue does not answer: {error}") from error
        finally:
            await queue.close()

    return asyncio.run(main())


def _ids(names: Iterable[str]) -> Column:
    """A column that is never cut short: ids are there to be copied."""
    return Column("job", no_wrap=True, min_width=max(map(len, names), default=0))


def _state(job: Job) -> str:
    """JOB_STATE_RUNNING -> running."""
    return _name(gateway_pb2.JobState, job.state)


def _name(enum: Any, value: int) -> str:
    """What comes after the enum's own name."""
    unspecified = str(enum.Name(0))
    return str(enum.Name(value)).removeprefix(unspecified.removesuffix("UNSPECIFIED")).lower()


def _progress(job: Job) -> str:
    """3/8, and how many of these failed."""
    failed = f" ({job.progress.failed} failed)" if job.progress.failed else ""
    return f"{job.progress.done}/{job.progress.total}{failed}"


def _time(at: datetime) -> str:
    return at.strftime("%Y-%m-%d %H:%M:%S UTC")


def _without_bytes(value: Any) -> Any:
    """Long texts, which are files in base64, by their length."""
    if isinstance(value, dict):
        return {name: _without_bytes(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_bytes(each) for each in value]
    return f"{len(value)} characters of base64" if isinstance(value, str) and len(value) > 5000 else value
