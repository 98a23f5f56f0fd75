"""`sdxs serve`."""

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sdxs import registry
from sdxs.client import Client
from sdxs.errors import AlreadyExists, InvalidRequest, NotFound
from sdxs.references import absolute
from services.settings import ServingSettings

if TYPE_CHECKING:
    from services.placement import AppArgs

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Name, name@pointer, sha256:digest, folder, s3:// bundle or hub id; again for more, the first is the default."
        ),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port of the gateway, in place of SDXS_GATEWAY_ADDRESS's.")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="One process, no Ray.")] = False,
    fused_controlnet: Annotated[
        bool, typer.Option("--fused-controlnet", help="ControlNets inside the U-Net's replica, not one of their own.")
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Models and replicas from a file that --print-config began."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print the Ray Serve config file and end.")] = False,
) -> None:
    """Serve models over gRPC until Ctrl-C or SIGTERM.

    The gateway, text encoder, U-Net, decoder, job worker and, for a model that has any, ControlNets run as Ray Serve deployments
    on this machine; --local puts them into one process. Redis and S3 servers are started too, unless SDXS_REDIS_URL and
    SDXS_STORE_URL name some.

    \b
    sdxs serve                                # the emoji model on 127.0.0.1:8500
    sdxs serve --local --port 9000            # the same in one process, on another port
    sdxs serve --model emoji@prod             # what the name points to in the store, also when it moves
    sdxs serve --model emoji --model scenes   # two, callers say which
    sdxs serve --model owner/name@revision    # a one-step model of the Hugging Face hub, or a folder of one
    sdxs serve --model "owner/name?vae=vae_large&controlnet=owner/sketch"
    sdxs serve --print-config > serve.yaml    # for `serve deploy` and RayService
    """
    args = app_args(model or (), fused_controlnet, config)
    if print_config:
        typer.echo(serve_config(args), nl=False)
        return
    if local and config is not None:
        raise InvalidRequest("config", str(config), "none with --local: there are no replicas")
    if port is not None:
        host = ServingSettings().gateway_address.rpartition(":")[0]
        os.environ["SDXS_GATEWAY_ADDRESS"] = f"{host}:{port}"
    began = time.monotonic()
    settings = ServingSettings()
    for address in filter(None, (settings.gateway_address, settings.gateway_http_address)):
        _check_free(address)
    with _stop_signals() as stop, _servers():
        _find_models(args.references, settings)
        run = _run_local if local else _run_on_ray
        run(args, ServingSettings(), stop, began)
    _say("stopped")


def _find_models(references: Sequence[str], before: ServingSettings) -> None:
    """In the store that the caller named, where bundles are published; else in the embedded one. A missing model ends it here."""
    try:
        for reference in references:
            registry.read_manifest(reference, before)
    except NotFound:
        for reference in references:
            registry.read_manifest(reference, ServingSettings())
    else:
        os.environ["SDXS_MODELS_URL"] = before.place("models")


def _run_local(args: "AppArgs", settings: ServingSettings, stop: threading.Event, began: float) -> None:
    """All in this process."""
    from services.local import serve_local

    async def main() -> None:
        async with serve_local(args.references, settings, args.fused_controlnet):
            await asyncio.to_thread(_wait_serving, settings, stop, began)
            await asyncio.to_thread(stop.wait)

    asyncio.run(main())


def _run_on_ray(args: "AppArgs", settings: ServingSettings, stop: threading.Event, began: float) -> None:
    """Each room in its own processes."""
    from services.cluster import application, check_application, local_cluster
    from services.fabric.pointers import open_all

    found = open_all(args.references, settings)
    _say("starting Ray")
    with local_cluster():
        _say("starting the replicas")
        with application(args, found):
            _wait_serving(settings, stop, began, check_application)
            stop.wait()
            _say("stopping")


def _wait_serving(
    settings: ServingSettings, stop: threading.Event, began: float, check: Callable[[], None] = lambda: None
) -> None:
    """Say so when the gateway does; `check` raises when it never will."""
    with Client(settings.gateway_address) as client:
        for turn in itertools.count():
            if client.ready():
                break
            if turn % 10 == 9:
                check()
            if stop.wait(0.2):
                return
        models = client.list_models()
    seconds = time.monotonic() - began
    served = ", ".join(f"{model.name} ({model.digest})" for model in models)
    _say(f"SERVING {served} on {settings.gateway_address} after {seconds:.1f} s; Ctrl-C ends it")


@contextlib.contextmanager
def _servers() -> Iterator[None]:
    """Redis and S3 for what the settings do not name; their addresses go into the environment."""
    from sdxs import embedded

    with embedded.missing(ServingSettings()) as variables:
        os.environ.update(variables)
        yield


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by the first SIGINT or SIGTERM; a second one ends the process at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _check_free(address: str) -> None:
    """gRPC shares a port with whoever has it already; say so instead. Raises AlreadyExists."""
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise AlreadyExists(f"{address} is taken ({error.strerror}); another --port?") from None


def app_args(models: Sequence[str], fused_controlnet: bool, file: Path | None = None) -> "AppArgs":
    """Of a file, with what the command says in place of the file's. Raises InvalidRequest."""
    import yaml
    from pydantic import ValidationError

    from services.placement import AppArgs

    try:
        said = _args_of(yaml.safe_load(file.read_text())) if file is not None else {}
        if models:
            said = {name: value for name, value in said.items() if name not in ("model", "models")}
            references = [absolute(model) for model in models]  # replicas run in other folders
            said |= {"model": references[0]} if len(references) == 1 else {"models": references}
        if fused_controlnet:
            said["fused_controlnet"] = True
        return AppArgs.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "models"
        raise InvalidRequest(where, first["input"], first["msg"].removeprefix("Value error, ")) from error
    except yaml.YAMLError as error:
        raise InvalidRequest("config", str(file), f"a YAML file ({error})") from error


def _args_of(config: Any) -> dict[str, Any]:
    """Of the one application of a Serve config file, or the arguments alone."""
    if isinstance(config, dict) and "applications" in config:
        config = config["applications"][0].get("args", {})
    if not isinstance(config, dict):
        raise InvalidRequest("config", config, "a file that --print-config began, or its `args` alone")
    return config


def serve_config(args: "AppArgs") -> str:
    """deploy/serve.yaml for these."""
    import yaml

    from services.app import config

    return "# Made by `sdxs serve --print-config`.\n" + yaml.safe_dump(config(args), sort_keys=False)


def _say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)
